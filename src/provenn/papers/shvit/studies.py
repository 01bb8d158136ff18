"""Data, networks and what is read off them in SHViT's experiments."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset, TensorDataset

from provenn.core.narrowing import present
from provenn.core.progress import quiet_loggers
from provenn.nn.fusion import fuse
from provenn.nn.resnet import resnet50
from provenn.papers.shvit import model as presets
from provenn.papers.shvit.layers import MultiHeadAttention, SHViTBlock, SingleHeadAttention
from provenn.papers.shvit.model import SHViT, four_stage_baseline
from provenn.papers.shvit.rivals import EfficientViT, FasterNet, MobileNetV3, MobileOne
from provenn.tasks import TaskData, fingerprint, get_task
from provenn.tasks.image_classification import NARROW, SOURCES, wide_patches

# Which glyph is it, and where is it once more? Nine cells; the first asks.

GLYPHS, TINTS, CELL = 8, 3, 8
RECALL_COUNTS = {"train": 48_000, "val": 1_000, "test": 2_000}
LEVELS = 100.0  # of a byte, to 1


@cache
def _glyphs() -> Tensor:
    """The first image of each of eight digits, in 0…1."""
    from sklearn.datasets import load_digits

    content = load_digits()
    firsts = [int(np.flatnonzero(content.target == digit)[0]) for digit in range(GLYPHS)]
    return torch.from_numpy(content.images[firsts].astype(np.float32)) / 16


def recall_scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 2, 24, 24) as bytes, and the tint of the cell that shows the first cell's glyph.

    Cells 2 to 9 show the eight glyphs in random order, each in one of three tints, the second channel; the first cell
    shows one of them, without a tint.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(count, GLYPHS, generator=generator).argsort(1)
    tints = torch.randint(TINTS, (count, GLYPHS), generator=generator)
    asked = torch.randint(GLYPHS, (count,), generator=generator)
    shown = torch.cat([order.gather(1, asked[:, None]), order], 1)
    shapes = _glyphs()[shown]
    levels = torch.cat([torch.ones(count, 1), tints.float()], 1)[..., None, None].expand_as(shapes) / 2
    cells = torch.stack([shapes, levels], 2) + 0.1 * torch.randn(count, 9, 2, CELL, CELL, generator=generator)
    grid = cells.view(count, 3, 3, 2, CELL, CELL).permute(0, 3, 1, 4, 2, 5).reshape(count, 2, 3 * CELL, 3 * CELL)
    return ((grid + 0.5) * LEVELS).round().clamp(0, 255).byte(), tints.gather(1, asked[:, None])[:, 0]


def recall_data(seed: int, smoke: bool) -> TaskData:
    parts = {
        split: recall_scenes(200 if smoke else count, 3 * seed + i)
        for i, (split, count) in enumerate(RECALL_COUNTS.items())
    }
    train, val, test = (TensorDataset(*part) for part in parts.values())
    return TaskData("glyph recall", train, val, test, fingerprint=fingerprint(*parts["test"]))


class FromBytes(nn.Module):
    """A network of bytes."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.float() / LEVELS - 0.75)


def recall_network(mixer: Callable[[int], nn.Module | None], dim: int = 64, blocks: int = 3) -> nn.Module:
    """A stem of stride 8, so that a token is a cell, and blocks of one width with a mixer each."""
    network = SHViT(widths=(dim,), depths=(0,), patch=CELL, num_classes=TINTS, in_channels=2)
    network.stages[0] = nn.Sequential(*(SHViTBlock(dim, mixer(dim)) for _ in range(blocks)))
    return FromBytes(network)


# Of which photograph is this patch?


@lru_cache(maxsize=8)  # drawing them takes longer than a short training
def patch_data(seed: int, smoke: bool, size: int = 32) -> TaskData:
    """Grey patches of 16 photographs; training, validation and test are of other columns of each."""
    data = get_task("image-classification").load("patches", seed=seed, size=size)
    if not smoke:
        return data
    train, val, test = (Subset(part, range(0, 320, 20)) for part in (data.train, data.val, data.test))
    return replace(data, train=train, val=val, test=test)


def large_patch_data(seed: int, smoke: bool) -> TaskData:
    return patch_data(seed, smoke, size=40)


WIDE_COUNTS = {"train": 250, "val": 40, "test": 100}


@lru_cache(maxsize=8)
def wide_patch_data(seed: int, smoke: bool) -> TaskData:
    """250 patches of each photograph to learn from, 40 to choose a rate by, and 100 to test."""
    parts = {split: wide_patches(split, 2 if smoke else count, seed) for split, count in WIDE_COUNTS.items()}
    train, val, test = (TensorDataset(*part) for part in parts.values())
    options = {"num_classes": len(SOURCES) - len(NARROW), "in_channels": 1}
    return TaskData("wide patches", train, val, test, fingerprint(*parts["train"]), options)


# Widths of equal time for a picture of 64 pixels, to a few percent; strides are halved, as for 128 pixels.
FRONT: dict[str, Callable[..., nn.Module]] = {
    "SHViT": partial(SHViT, widths=(48, 88, 120), depths=(2, 4, 5), patch=8),
    "MobileNetV3": partial(MobileNetV3, width=0.5, stride=2),
    "EfficientViT": partial(EfficientViT, width=0.55, stride=2, windows=(4, 4, 2)),
    "FasterNet": partial(FasterNet, width=0.225, stride=2),
    "MobileOne": partial(MobileOne, width=0.175, stride=2),
}


FOUR: dict[str, Any] = {"widths": (32, 64, 128, 160), "depths": (1, 1, 2, 2)}
THREE: dict[str, Any] = {"widths": (64, 128, 160), "depths": (2, 2, 2)}


def four_stages(**options: Any) -> SHViT:
    """A stem of stride 4 and four stages, no attention."""
    return four_stage_baseline(**FOUR, **options)


def three_stages(**options: Any) -> SHViT:
    """A stem of stride 16 and three stages, as many blocks, no attention."""
    return SHViT(**THREE, mixer="none", **options)


def attending(*stages: bool) -> Callable[..., SHViT]:
    """The three stages at half the stride, so that there are positions to attend to: 5×5, 3×3 and 2×2."""
    return lambda **options: SHViT(**THREE, patch=8, attention=stages, **options)


def made(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return build(**options)


def alike_neighbours(model: nn.Module, data: TaskData) -> float:
    """Mean cosine of neighbouring tokens of the first stage on test images, each channel's mean taken off."""
    images = torch.stack([image for image, _ in data.test])  # type: ignore[attr-defined]  # map-style
    backbone: Any = model
    tokens = torch.cat([backbone.features(part)[0] for part in images.to(next(model.parameters()).device).split(100)])
    tokens = F.normalize(tokens - tokens.mean((0, 2, 3), keepdim=True), dim=1)
    beside = (tokens[..., 1:] * tokens[..., :-1]).sum(1).mean()
    below = (tokens[..., 1:, :] * tokens[..., :-1, :]).sum(1).mean()
    return ((beside + below) / 2).item()


# Heads of a small vision Transformer.


def head_network(heads: int, dim: int = 64, blocks: int = 6, **options: Any) -> nn.Module:
    """A stem of stride 4 and blocks with multi-head attention, of one width, as DeiT's."""
    network = SHViT(widths=(dim,), depths=(0,), patch=4, **options)
    network.stages[0] = nn.Sequential(*(SHViTBlock(dim, MultiHeadAttention(dim, heads)) for _ in range(blocks)))
    return network


def head_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What each layer's heads attend to, (images, heads, positions, positions)."""
    maps: list[Tensor] = []
    layers = [part for part in model.modules() if isinstance(part, MultiHeadAttention)]
    handles = [
        layer.register_forward_pre_hook(lambda layer, inputs: maps.append(layer.attention(inputs[0])))
        for layer in layers
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def alike_heads(maps: Tensor) -> float:
    """Mean cosine of the maps of two heads."""
    flat = F.normalize(maps.flatten(2), dim=2)
    pairs = list(combinations(range(maps.shape[1]), 2))
    return sum((flat[:, a] * flat[:, b]).sum(1).mean().item() for a, b in pairs) / len(pairs)


def late_less_early(model: nn.Module, data: TaskData) -> float:
    """How much more alike the heads of the later half of the layers are, on 128 test images as in the paper."""
    images = torch.stack([data.test[i][0] for i in range(min(128, len(data.test)))])  # type: ignore[arg-type]
    alike = [alike_heads(maps) for maps in head_maps(model, images.to(next(model.parameters()).device))]
    half = len(alike) // 2
    return sum(alike[half:]) / (len(alike) - half) - sum(alike[:half]) / half


def left_with_one_head(layer: int) -> Callable[[nn.Module, TaskData], float]:
    """Test accuracy when one layer keeps one head, less that of the whole; which one, validation images say."""

    def probe(model: nn.Module, data: TaskData) -> float:
        attention = [part for part in model.modules() if isinstance(part, MultiHeadAttention)][layer]
        weight: Tensor = attention.project[1].conv.weight.data  # type: ignore[union-attr,assignment]  # of a ConvBN
        kept, width = weight.clone(), weight.shape[1] // attention.heads

        def accuracy(head: int, part: Any) -> float:
            weight.zero_()
            weight[:, head * width : (head + 1) * width] = kept[:, head * width : (head + 1) * width]
            reached = _accuracy(model, part)
            weight.copy_(kept)
            return reached

        best = max(range(attention.heads), key=lambda head: accuracy(head, data.val))
        return accuracy(best, data.test) - _accuracy(model, data.test)

    return probe


def _accuracy(model: nn.Module, dataset: Any) -> float:
    device = next(model.parameters()).device
    right = [
        (model(images.to(device)).argmax(1).cpu() == labels).double() for images, labels in DataLoader(dataset, 256)
    ]
    return torch.cat(right).mean().item()


# What it costs.


class _Traffic(TorchDispatchMode):
    """Bytes that operators read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), result))
        storages = {t.untyped_storage()._cdata for t in given}
        if any(t.untyped_storage()._cdata not in storages for t in made):
            self.moved += sum(t.numel() * t.element_size() for t in (*given, *made))
        return result


def traffic(build: Callable[..., nn.Module]) -> Callable[[int, str], Callable[[], int]]:
    """Bytes that a network moves for an image of some side, weights included."""

    def make(side: int, device: str) -> Callable[[], int]:
        with torch.device("meta"):
            network, x = build(num_classes=1000, in_channels=3).eval(), torch.empty(1, 3, side, side)

        def count() -> int:
            with torch.no_grad(), _Traffic() as counter:
                network(x)
            return counter.moved

        return count

    return make


@cache
def _fused(build: Callable[[], nn.Module]) -> nn.Module:
    """As a trained network would be: batch norms that know the data, and none of weight 0.

    With fresh statistics the values of a deep network shrink from layer to layer until whole maps are denormal
    numbers, which a trained network never computes with.
    """
    torch.manual_seed(0)
    network = build()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            part.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 64, 64))
    return fuse(network.eval(), torch.randn(1, 3, 64, 64))


BATCH = 16  # the paper's on a CPU; below 16 and on one thread torch convolves 1×1 by a path several times slower

GPU_BATCH = 256  # the authors' on a GPU


def inference(build: Callable[[], nn.Module]) -> Callable[[int, str], Callable[[], object]]:
    """A network in its form for inference on images of some side."""

    def make(side: int, device: str) -> Callable[[], object]:
        network, x = _fused(build).to(device), torch.randn(BATCH, 3, side, side, device=device)

        def run() -> object:
            with torch.no_grad():
                return network(x)

        return run

    return make


def inference_in_half(build: Callable[[], nn.Module]) -> Callable[[int, str], Callable[[], object]]:
    """As the authors time a GPU: 256 images at a time, under autocast to float16."""

    def make(side: int, device: str) -> Callable[[], object]:
        network, x = _fused(build).to(device), torch.randn(GPU_BATCH, 3, side, side, device=device)

        def run() -> object:
            with torch.no_grad(), torch.autocast(torch.device(device).type, torch.float16):
                return network(x)

        return run

    return make


def in_onnxruntime(build: Callable[[], nn.Module]) -> Callable[[int, str], Callable[[], object]]:
    """The same by ONNX Runtime on one thread, an image at a time."""

    def make(side: int, device: str) -> Callable[[], object]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(_as_onnx(build, side), options)
        name, value = session.get_inputs()[0].name, torch.randn(1, 3, side, side).numpy()
        return lambda: session.run(None, {name: value})

    return make


def batches_in_onnxruntime(build: Callable[..., nn.Module]) -> Callable[[int, str], Callable[[], object]]:
    """A batch of the paper's size by ONNX Runtime on one thread."""

    def make(side: int, device: str) -> Callable[[], object]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        images = torch.randn(BATCH, 3, side, side)
        with quiet_loggers("torch.onnx", "onnxscript", "onnx_ir"):
            program = torch.onnx.export(_fused(build), (images,), dynamo=True, verbose=False)
        model = present(program, "program").model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(model, options)
        name, value = session.get_inputs()[0].name, images.numpy()
        return lambda: session.run(None, {name: value})

    return make


@cache
def _as_onnx(build: Callable[[], nn.Module], side: int) -> bytes:
    with quiet_loggers("torch.onnx", "onnxscript", "onnx_ir"):
        program = torch.onnx.export(_fused(build), (torch.randn(1, 3, side, side),), dynamo=True, verbose=False)
    return present(program, "program").model_proto.SerializeToString()


class Logits(nn.Module):
    """A classifier of transformers that gives its logits alone."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).logits


def mobilevit_v2() -> nn.Module:
    """MobileViTv2 ×1.0 for 1,000 classes."""
    from transformers import MobileViTV2Config, MobileViTV2ForImageClassification

    return Logits(MobileViTV2ForImageClassification(MobileViTV2Config(id2label={i: str(i) for i in range(1000)})))


def as_built(build: Callable[[], nn.Module]) -> Callable[[int, str], Callable[[], object]]:
    """One image through a network on the meta device, to be counted."""

    def make(side: int, device: str) -> Callable[[], object]:
        with torch.device("meta"):
            network, x = build().eval(), torch.empty(1, 3, side, side)
        return lambda: network(x)

    return make


MIXERS: dict[str, Callable[[int], nn.Module | None]] = {
    "none": lambda dim: None,
    "shsa": SingleHeadAttention,
    "eighth": lambda dim: SingleHeadAttention(dim, ratio=1 / 8),
    "full": lambda dim: SingleHeadAttention(dim, ratio=1.0),
    "bottleneck": presets.BottleneckAttention,
    "mhsa": lambda dim: MultiHeadAttention(dim, heads=4),
}


def s3_mhsa() -> nn.Module:
    """SHViT-S3 with multi-head attention instead of SHSA."""
    return presets.shvit_s3(mixer="mhsa")


def s1_everywhere() -> nn.Module:
    """SHViT-S1 with attention in its first stage too, on the channels that its preset names for it."""
    return SHViT(widths=(128, 224, 320), depths=(2, 4, 5), pdims=(32, 48, 68), attention=(True, True, True))


class Pyramid(nn.Module):
    """A backbone's maps alone."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone.features(x))


def s4_pyramid() -> nn.Module:
    return Pyramid(presets.shvit_s4(num_classes=0))


def resnet50_pyramid() -> nn.Module:
    return Pyramid(resnet50(num_classes=0))

"""Data, networks and counts of EMOv2's experiments."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from provenn.core import cost
from provenn.core.errors import UserError
from provenn.core.narrowing import of_kind, present
from provenn.nn.mobilenet import InvertedResidual
from provenn.nn.segmentation import Segmenter
from provenn.papers.emov2.layers import I2RMB, SEWMHSA, group_pixels, ungroup_pixels
from provenn.papers.emov2.model import EMOv2, emov2_small, emov2_small_segmenter
from provenn.tasks import Task, TaskData, count_examples, device_of, fingerprint, get_task, join_scores
from provenn.tasks.base import Scores

SIDE, WINDOW = 8, 4  # of the fields of noise: 2×2 windows of neighbours, and as many groups of every second pixel


NOTHING: dict[str, str] = {}


class Fields(Task):
    """A number for every pixel of a map; the share of its variance that is explained."""

    name = "fields"
    metric = "explained"
    higher_is_better = True
    embedded = NOTHING
    reads = "nothing"

    def load(self, source: str | Path, *, seed: int = 0, **options: Any) -> TaskData:
        raise UserError("the fields are drawn for one study alone")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, target = batch
        return (model(x) - target).square().mean()

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """R² over the fields; their target has mean 0."""
        device, rows = device_of(model), []
        for x, target in DataLoader(dataset, batch_size=batch_size):
            target = target.to(device)
            error = (model(x.to(device)) - target).square().flatten(1).sum(1)
            rows.append([error.double(), target.square().flatten(1).sum(1).double()])
        return join_scores(("error", "power"), rows)

    def summary(self, scores: Scores) -> dict[str, float]:
        return {"explained": 1 - float(scores["error"].sum() / scores["power"].sum())}

    def dummy_baseline(self, data: TaskData) -> float:
        """Of the mean, which is 0."""
        return 0.0


def field_data(seed: int, smoke: bool) -> TaskData:
    """White noise, and at each pixel four times the sum of its window's mean and its remote group's."""
    parts = []
    for part, count in enumerate((64, 64, 64) if smoke else (12_800, 512, 2_048)):
        generator = torch.Generator().manual_seed(3 * seed + part)
        x = torch.randn(count, 1, SIDE, SIDE, generator=generator)
        target = torch.zeros_like(x)
        for grouping in ("close", "remote"):
            groups = group_pixels(x, grouping, (WINDOW, WINDOW))
            means = groups.mean(2, keepdim=True).expand_as(groups)
            target += 4 * ungroup_pixels(means, grouping, (WINDOW, WINDOW), (SIDE, SIDE))
        parts.append(TensorDataset(x, target))
    train, val, test = parts
    return TaskData("fields", train, val, test, fingerprint=fingerprint(*train.tensors))


def field_network(part: tuple[str, int]) -> nn.Module:
    """Some blocks of one operator between two 1×1 convolutions: nothing else moves anything across the map."""
    mode, depth = part
    options: dict[str, Any] = {"exp_ratio": 2, "window": WINDOW, "head_dim": 8, "kernel_size": 0, "norm": "none"}
    blocks = [I2RMB(16, mode=mode, layer_scale=None, **options) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(1, 16, 1), *blocks, nn.Conv2d(16, 1, 1))


def patch_data(seed: int, smoke: bool) -> TaskData:
    data = get_task("image-classification").load("patches", seed=seed, size=16)
    return shortened(data, 160) if smoke else data


def small_network(part: Mapping[str, Any] | Callable[..., nn.Module], **options: Any) -> nn.Module:
    """`emov2_small` with some options changed, or another network."""
    return part(**options) if callable(part) else emov2_small(**options, **part)


class SmallMobileNet(nn.Sequential):
    """MobileNetV2's blocks in the frame of `emov2_small`: the same depths, widths and strides."""

    def __init__(self, *, num_classes: int = 10, in_channels: int = 1, expansion: int = 3):
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
        ]
        channels = 12
        for width, stride in ((24, 1), (48, 2), (96, 2)):
            for block in range(2):
                layers.append(InvertedResidual(channels, width, stride=1 if block else stride, expansion=expansion))
                channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def mosaic_data(seed: int, smoke: bool) -> TaskData:
    data = get_task("semantic-segmentation").load("textures", seed=seed)
    return shortened(data, 8) if smoke else data


def shortened(data: TaskData, count: int) -> TaskData:
    """With every n-th example of each split, so that about `count` are left of the larger ones."""
    splits: dict[str, Any] = {"train": data.train, "val": data.val, "test": data.test}
    every = {name: max(1, count_examples(split) // count) for name, split in splits.items()}
    kept: dict[str, Any] = {n: Subset(s, range(0, count_examples(s), every[n])) for n, s in splits.items()}
    return replace(data, **kept)


def segmenter(part: Mapping[str, Any], **options: Any) -> Segmenter:
    return emov2_small_segmenter(**options, **part)


def on_meta(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A network without its weights: enough to count."""
    with torch.device("meta"):
        return build(**options).eval()


def macs_at(network: nn.Module, side: int) -> int:
    return cost.macs(lambda: network(torch.empty(1, 3, side, side, device="meta")))


def norm_operations(network: nn.Module, side: int) -> int:
    """What the paper's counter, fvcore's, adds for norms: 2 for each element of a batch norm, 5 of a layer norm."""
    counted = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal counted
        counted += output.numel() * (2 if isinstance(module, nn.BatchNorm2d) else 5)

    hooks = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)
    ]
    network(torch.empty(1, 3, side, side, device="meta"))
    for hook in hooks:
        hook.remove()
    return counted


def counter(build: Callable[..., nn.Module], **options: Any) -> Callable[[int, str], Callable[[], int]]:
    """Multiply-adds of a network on a square image of some side."""
    return lambda side, device: lambda: macs_at(on_meta(build, **options), side)


def forward_pass(build: Callable[[], nn.Module]) -> Callable[[int, str], Callable[[], object]]:
    """A forward pass of one image of some side."""

    def make(side: int, device: str) -> Callable[[], object]:
        network, x = build().to(device).eval(), torch.randn(1, 3, side, side, device=device)

        def forward() -> object:
            with torch.no_grad():
                return network(x)

        return forward

    return make


def mobilevit_v2() -> nn.Module:
    """MobileViTV2-1.0 of transformers, 4.9 million parameters."""
    from transformers import MobileViTV2Config, MobileViTV2ForImageClassification

    return MobileViTV2ForImageClassification(MobileViTV2Config(id2label=dict.fromkeys(range(1000), "")))


def largest_deviation(network: EMOv2, x: Float[Tensor, "batch channels height width"]) -> float:
    """The largest standard deviation among a network's maps, its batch norms as in training."""
    with torch.no_grad():
        return max(m.std().item() for m in network.train().features(x))


def saved_bytes(network: nn.Module) -> int:
    """Of the file that `torch.save` writes of the weights."""
    file = BytesIO()
    torch.save(network.state_dict(), file)
    return file.getbuffer().nbytes


def real_share(side: int, window: int) -> Tensor:
    """Of each pixel the share of what it attends to that is no padding, read off uniform attention to ones."""
    layer = SEWMHSA(1, window=window, head_dim=1, activation="none")
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(next(layer.v.parameters()))
    with torch.no_grad():
        return layer(torch.ones(1, 1, side, side)) / 2  # of both groupings


def equals_multihead_attention(width: int = 16, heads: int = 2) -> float:
    """How far a block with global attention, no expansion and no filter is from torch's attention with a residual."""
    block = I2RMB(
        width, exp_ratio=1, mode="close", window=0, head_dim=width // heads, kernel_size=0, activation="none",
        layer_scale=None,
    ).double()  # fmt: skip
    host = nn.MultiheadAttention(width, heads, batch_first=True).double()
    operator, x = of_kind(block.operator, SEWMHSA, "operator"), torch.randn(2, width, 5, 4, dtype=torch.float64)
    value = of_kind(operator.v[0], nn.Conv2d, "v")
    biases = [present(operator.qk.bias, "qk.bias"), present(value.bias, "v.bias")]
    with torch.no_grad():
        host.in_proj_weight.copy_(torch.cat([operator.qk.weight, value.weight]).flatten(1))
        host.in_proj_bias.copy_(torch.cat(biases))
        host.out_proj.weight.copy_(2 * block.project.weight.flatten(1))  # without a filter, e + l(e) is 2e
        host.out_proj.bias.zero_()
        tokens = block.norm(x).flatten(2).mT
        expected = x + host(tokens, tokens, tokens)[0].mT.unflatten(2, (5, 4))
        return float((block(x) - expected).abs().max())


def equals_feed_forward(width: int = 16) -> float:
    """How far a block of convolutions without a filter is from norm, linear, GELU, linear and a residual."""
    block = I2RMB(width, exp_ratio=4, mode="conv", kernel_size=0, layer_scale=None).double()
    up, down, x = block.operator[0], block.project, torch.randn(2, width, 5, 4, dtype=torch.float64)  # type: ignore[index]  # a Sequential
    with torch.no_grad():
        tokens = block.norm(x).flatten(2).mT
        hidden = nn.functional.gelu(tokens @ up.weight.flatten(1).mT + up.bias)
        expected = x + (hidden @ (2 * down.weight.flatten(1)).mT).mT.unflatten(2, (5, 4))
        return float((block(x) - expected).abs().max())


def equals_inverted_residual(width: int = 16) -> float:
    """How far a block of convolutions that changes the shape is from expand, filter, project, written out."""
    block = I2RMB(width, 24, exp_ratio=6, mode="conv", stride=2, norm="none", activation="silu", layer_scale=None)
    block, x = block.double().eval(), torch.randn(2, width, 6, 8, dtype=torch.float64)
    hidden = 6 * width
    written = nn.Sequential(
        nn.Conv2d(width, hidden, 1),
        nn.SiLU(),
        nn.Conv2d(hidden, hidden, 5, 2, 2, groups=hidden, bias=False),
        nn.BatchNorm2d(hidden, eps=1e-6),
        nn.SiLU(),
        nn.Conv2d(hidden, 24, 1, bias=False),
    )
    written = written.double().eval()
    written.load_state_dict(dict(zip(written.state_dict(), block.state_dict().values(), strict=True)))
    with torch.no_grad():
        return float((block(x) - written(x)).abs().max())

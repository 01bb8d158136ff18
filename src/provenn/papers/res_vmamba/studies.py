"""Data, networks and counts of Res-VMamba's experiments."""

from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from provenn.nn import resnet
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import SwiGLU
from provenn.nn.positions import sinusoidal_encoding
from provenn.papers.res_vmamba.layers import SS2D
from provenn.papers.res_vmamba.mamba import Mamba
from provenn.papers.res_vmamba.model import ResVMamba
from provenn.tasks import TaskData, fingerprint, get_task

# Textures at zooms: classes that differ in how coarse a grain is.

TEXTURES, ZOOMS, SIDE = ("brick", "grass", "gravel", "cell"), (1.0, 1.25, 1.6, 2.0), 32
# Columns of each photograph that a split is cut from, as shares of its width: no pixel is in two.
BANDS = {"train": (0.0, 0.55), "val": (0.55, 0.72), "test": (0.72, 1.0)}


@cache
def _band(name: str, split: str) -> Tensor:
    with (files("skimage.data") / f"{name}.png").open("rb") as file, Image.open(file) as image:
        pixels = torch.from_numpy(np.array(image.convert("L"), dtype=np.float32))
    first, last = (round(share * pixels.shape[1]) for share in BANDS[split])
    band = pixels[:, first:last]
    return (band - band.mean()) / band.std()


def zoomed_textures(split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Squares of 32 pixels from photographs of a texture at one of four zooms; the class is the pair.

    Each is lit from a side, by a strength of its own, and has sensor noise. So mean and contrast do not show the class.
    """
    rng = np.random.default_rng([seed, list(BANDS).index(split)])
    images, labels = torch.empty(count, 1, SIDE, SIDE), torch.from_numpy(rng.integers(len(TEXTURES) * 4, size=count))
    ramp = torch.linspace(-0.5, 0.5, SIDE)
    for i, label in enumerate(labels.tolist()):
        name, zoom = TEXTURES[label // 4], ZOOMS[label % 4]
        band, side = _band(name, split), round(SIDE * zoom)
        top, left = (int(rng.integers(length - side + 1)) for length in band.shape)
        square = band[None, None, top : top + side, left : left + side]
        patch = F.interpolate(square, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0, 0]
        patch = (patch - patch.mean()) / patch.std().clamp_min(0.1)
        angle = rng.uniform(0, 2 * np.pi)
        light = np.cos(angle) * ramp[:, None] + np.sin(angle) * ramp
        noise = torch.from_numpy(rng.standard_normal((SIDE, SIDE), dtype=np.float32))
        images[i, 0] = rng.uniform(0.6, 1.4) * patch * (1 + 0.5 * light) + 0.5 * light + 0.3 * noise
    return images, labels


def texture_data(seed: int, smoke: bool) -> TaskData:
    """3,200 images to learn from, 320 to choose a rate by, and 1,200 to test."""
    counts = {"train": 64, "val": 32, "test": 32} if smoke else {"train": 3200, "val": 320, "test": 1200}
    parts = {split: zoomed_textures(split, count, seed) for split, count in counts.items()}
    train, val, test = (TensorDataset(*part) for part in parts.values())
    checksum = fingerprint(*parts["train"])
    return TaskData("zoomed textures", train, val, test, checksum, {"num_classes": 16, "in_channels": 1})


def vmamba(source: str, dims: tuple[int, ...] = (16, 32, 64, 128)) -> Callable[..., nn.Module]:
    """One block a stage, with residual paths that start there."""

    def build(**options: Any) -> nn.Module:
        model = ResVMamba(dims, (1,) * len(dims), source=source, state=4, **options)
        # Passes of an experiment are repeatable; the released code draws from wherever its process is.
        return model.draw_from(torch.Generator().manual_seed(0)) if source == "official_random" else model

    return build


def convolutional(**options: Any) -> nn.Module:
    """A ResNet of one block a stage, with about as many parameters as `vmamba("stage")`."""
    return resnet.ResNet(resnet.BasicBlock, (1, 1, 1), widths=(29, 57, 113), **options)


class PatchTransformer(nn.Module):
    """A vision transformer of about as many parameters as `vmamba("stage")`: 64 patches, 4 layers, the tokens' mean."""

    def __init__(self, *, num_classes: int, in_channels: int, dim: int = 88, layers: int = 4, hidden: int = 160):
        super().__init__()
        self.embed = nn.Conv2d(in_channels, dim, 4, 4)
        self.layers: Any = nn.ModuleList(
            nn.ModuleList(
                [nn.LayerNorm(dim), SoftmaxAttention(dim, 4, causal=False), nn.LayerNorm(dim), _mlp(dim, hidden)]
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        x = x + sinusoidal_encoding(torch.arange(x.shape[1], device=x.device), x.shape[-1]).to(x)
        for norm1, attention, norm2, feedforward in self.layers:
            x = x + attention(norm1(x))
            x = x + feedforward(norm2(x))
        return self.head(self.norm(x).mean(1))


def _mlp(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def built(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return build(**options)


def changed_predictions(model: nn.Module, data: TaskData) -> float:
    """The share of test images whose predicted class differs between two evaluations."""
    device = next(model.parameters()).device

    def predicted() -> Tensor:
        images = (batch[0] for batch in DataLoader(data.test, batch_size=256))
        return torch.cat([model(x.to(device)).argmax(1) for x in images])

    return (predicted() != predicted()).float().mean().item()


# Selective copying


class SequenceModel(nn.Module):
    """Tokens through residual layers, a norm and a linear map."""

    def __init__(self, layers: list[nn.Module], *, vocab: int, dim: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-5) for _ in layers)
        self.head = nn.Sequential(nn.RMSNorm(dim, eps=1e-5), nn.Linear(dim, vocab, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x))
        return self.head(x)


DIM, STATE = 32, 8


def mamba_model(selective: bool, *, vocab: int) -> nn.Module:
    return SequenceModel([Mamba(DIM, state=STATE, selective=selective) for _ in range(2)], vocab=vocab, dim=DIM)


def transformer(*, vocab: int) -> nn.Module:
    """Two blocks of as many parameters as two of Mamba's."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [SoftmaxAttention(DIM, 4, bias=False, rotary=True), SwiGLU(DIM, hidden=45)]
    return SequenceModel(layers, vocab=vocab, dim=DIM)


def copy_data(seed: int, smoke: bool) -> TaskData:
    counts = {"examples": 64, "test_examples": 32} if smoke else {"examples": 12_800, "test_examples": 512}
    return get_task("recall").load("selective-copy", seed=seed, length=20, pairs=4, values=8, **counts)


# Cost


def on_maps(
    make: Callable[[], nn.Module], dim: int, *, training: bool = False
) -> Callable[[int, str], Callable[[], Any]]:
    """A layer on square maps of so many pixels a side."""

    def sized(side: int, device: str) -> Callable[[], Any]:
        torch.manual_seed(0)
        layer = make().to(device)
        x = torch.randn(1, dim, side, side, device=device)

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return (lambda: layer(x).sum().backward()) if training else forward

    return sized


class OnPixels(nn.Module):
    """Global self-attention of all pixels."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention = SoftmaxAttention(dim, heads, causal=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x.flatten(2).mT).mT.unflatten(-1, x.shape[2:])


MAP = 32  # channels
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "selective scan": partial(SS2D, MAP),
    "attention": partial(OnPixels, MAP, 4),
    "convolution": partial(nn.Conv2d, MAP, MAP, 3, padding=1),
}


def operations(model: ResVMamba, side: int) -> int:
    """Of one square image, by the rule of VMamba's authors: multiply-adds, 9 for each pixel, route, channel and state.

    Of the scan besides one for each skip; norms count five a number, as their counter does; activations nothing.
    """
    total = 0
    pixels = (-(-side // model.patch_size)) ** 2
    stem: Any = model.patch_embed[0]
    total += pixels * stem.weight.numel()
    total += 5 * pixels * model.widths[0]
    for i, layer in enumerate(model.layers):
        side_here = -(-side // model.strides[i])
        pixels = side_here**2
        for block in layer.blocks:
            op = block.op
            products = (op.in_proj, op.out_proj, op.conv2d)
            total += pixels * sum(part.weight.numel() for part in products)
            total += pixels * (op.x_proj_weight.numel() + op.dt_projs_weight.numel())
            total += pixels * (9 * op.A_logs.numel() + op.Ds.numel())
            total += 5 * pixels * (op.dim + op.out_norm.weight.numel())
        if i + 1 < len(model.layers):
            merged = (-(-side // model.strides[i + 1])) ** 2
            total += merged * (layer.downsample.reduction.weight.numel() + 5 * 4 * model.widths[i])
            if model.residual is not None:
                total += merged * model.widths[i] * model.widths[i + 1]
    if model.classifier is not None:
        total += 5 * pixels * model.widths[-1] + model.classifier.head.weight.numel()
    return total

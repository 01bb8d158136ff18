"""Data, networks, probes and pictures of CRAFT's experiments."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core import cost
from provenn.nn.norms import ChannelNorm
from provenn.papers.craft.layers import GDFN, HFB, HFERB, SRWAB
from provenn.papers.craft.model import CRAFT, CRFB, craft_x2, craft_x3, craft_x4
from provenn.tasks import TaskData, count_examples
from provenn.tasks.super_resolution import TASK, Whole, before_and_after, luma, psnr, reduced, restore
from provenn.testing import seeded_state
from provenn.training import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALE = 2
DIM, HEADS = 16, 2  # heads of 8 channels, as in the paper
INPUT = 32  # pixels: side of what a training step sees
REMOVED = (10, 20, 30, 40, 50)  # % of an input's frequencies


# Networks: all have as many parameters as the full one, within 3 %


def small_network(block: Callable[[int], nn.Module]) -> CRAFT:
    """A network of two groups of one block, over bicubic interpolation."""
    return CRAFT(SCALE, dim=DIM, groups=2, depth=1, block=block, over_bicubic=True)


def whole_network(part: Callable[[], nn.Module]) -> nn.Module:
    """A network of its own frame, of about as many parameters as the small CRAFT."""
    return part()


def windows(dim: int) -> nn.Sequential:
    """The published global branch: a plain and a shifted SRWAB."""
    return nn.Sequential(*(SRWAB(dim, HEADS, shifted=shifted) for shifted in (False, True)))


def full(dim: int) -> CRFB:
    return CRFB(windows(dim), HFERB(dim), HFB(dim, HEADS))


def without_hferb(dim: int) -> CRFB:
    """The features themselves replace the high-frequency prior."""
    return match_parameters(dim, windows(dim), nn.Identity(), HFB(dim, HEADS))


def without_srwab(dim: int) -> CRFB:
    """The features themselves replace the global representation."""
    return match_parameters(dim, nn.Identity(), HFERB(dim), HFB(dim, HEADS))


def without_fusion(dim: int) -> CRFB:
    """The two branches are added up, where the HFB lets one ask the other."""
    return match_parameters(dim, windows(dim), HFERB(dim), SumFusion(dim))


class SumFusion(nn.Module):
    """y = low + high; y ← y + GDFN(LN(y)): an HFB without its attention."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm2, self.feed = ChannelNorm(dim), GDFN(dim)

    def forward(
        self, low: Float[Tensor, "batch dim height width"], high: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch dim height width"]:
        y = low + high
        return y + self.feed(self.norm2(y))


def match_parameters(dim: int, low: nn.Module, high: nn.Module, fuse: HFB | SumFusion) -> CRFB:
    """A block that lacks a part; what it lacks in parameters, its gated feed-forward gets."""
    missing = cost.count_parameters(full(dim)) - sum(map(cost.count_parameters, (low, high, fuse)))
    hidden = fuse.feed.project.in_channels + round(missing / (3 * dim + 18))  # a hidden channel has 3·dim + 2·9 weights
    fuse.feed = GDFN(dim, (hidden + 0.5) / dim)
    return CRFB(low, high, fuse)


def convolutions(dim: int) -> nn.Sequential:
    """What convolutional super-resolution (EDSR) is made of."""
    return nn.Sequential(ConvPair(dim), ConvPair(dim))


class ConvPair(nn.Module):
    """x + conv3×3(GELU(conv3×3(x)))"""

    def __init__(self, dim: int):
        super().__init__()
        hidden = dim + 1  # the full network's parameters, within 3 %
        self.expand, self.project = nn.Conv2d(dim, hidden, 3, padding=1), nn.Conv2d(hidden, dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return x + self.project(F.gelu(self.expand(x)))


def attention(dim: int, side: int = 8) -> nn.Sequential:
    """What transformers for super-resolution (SwinIR) are made of: square windows, every second moved and masked.

    Positions are known from a bias, as there; no convolution stands inside a block.
    """
    blocks = [SRWAB(dim, HEADS, window=(side, side), shifted=bool(k % 2), wrap=False, position_dim=6) for k in range(4)]
    for block in blocks:
        block.add_module("locality", Nothing())
    return nn.Sequential(*blocks)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


# Data and probes


def photographs(seed: int, smoke: bool) -> TaskData:
    """Crops whose input is 32×32 pixels; pieces of the validation and test photographs, which take less time."""
    data = TASK.load("photographs", patch=SCALE * (INPUT + 4), crops=2 if smoke else 16)
    side = 64 if smoke else 256
    val, test = (
        Whole([crop_centre(split[i], side) for i in range(count_examples(split))]) for split in (data.val, data.test)
    )
    return replace(data, val=val, test=test, meta={"scale": SCALE})


def crop_centre(photo: Tensor, side: int) -> np.ndarray:
    top, left = ((length - side) // 2 for length in photo.shape[-2:])
    return photo[:, top : top + side, left : left + side].permute(1, 2, 0).numpy()


def list_photographs(data: TaskData) -> list[Tensor]:
    return [data.test[i] for i in range(count_examples(data.test))]


def radius(image: Float[Tensor, "*channels height width"]) -> Float[Tensor, "height width"]:
    """Distance of each discrete frequency from zero, in cycles a pixel; Nyquist's is 0.5."""
    rows, columns = (torch.fft.fftfreq(side, device=image.device) for side in image.shape[-2:])
    return (rows[:, None] ** 2 + columns**2).sqrt()


def band_error(model: nn.Module, data: TaskData, *, high: bool) -> float:
    """|F(restored − original)|² / |F(original)|² on Y, above or below half the Nyquist radius; the mean over photos."""
    errors = []
    for photo in list_photographs(data):
        lr, hr = reduced(photo, SCALE)
        original = luma(hr)
        band = (radius(original) > 0.25) == high
        difference = luma(restore(model, lr)) - original
        spectra = [torch.fft.fft2(y)[band].abs().square().sum() for y in (difference, original - original.mean())]
        errors.append(float(spectra[0] / spectra[1]))
    return sum(errors) / len(errors)


def without_highest(image: Float[Tensor, "channels height width"], percent: int) -> Tensor:
    """An 8-bit image without that share of its frequencies, those farthest from zero."""
    distance = radius(image)
    low_band = distance <= torch.quantile(distance.flatten(), 1 - percent / 100)
    return torch.fft.ifft2(torch.fft.fft2(image) * low_band).real.round().clamp(0, 255)


def drop(model: nn.Module, data: TaskData) -> float:
    """PSNR in dB that is lost when the input loses its highest frequencies; the mean over the shares in `REMOVED`."""
    drops = []
    for photo in list_photographs(data):
        lr, hr = reduced(photo[:, :128, :128], SCALE)
        full_psnr = psnr(restore(model, lr), hr, border=SCALE)
        drops += [full_psnr - psnr(restore(model, without_highest(lr, p)), hr, border=SCALE) for p in REMOVED]
    return sum(drops) / len(drops)


def gain(model: nn.Module, data: TaskData) -> float:
    """PSNR above bicubic interpolation, in dB."""
    return TASK.evaluate(model, data.test)[TASK.metric] - TASK.dummy_baseline(data)


def sharpness(model: nn.Module, data: TaskData) -> float:
    """The share of a branch's output that lies above half Nyquist: HFERB's over SRWAB's.

    The mean over blocks and photographs; 0 where a branch is missing.
    """
    ratios: list[float] = []

    def record(block: Any, inputs: tuple[Tensor]) -> None:  # a CRFB, which torch types as nn.Module
        (x,) = inputs
        high, low = (high_share(branch(x)) for branch in (block.high, block.low))
        ratios.append(high / low)

    blocks = [m for m in model.modules() if isinstance(m, CRFB)]
    if not blocks or any(isinstance(branch, nn.Identity) for m in blocks for branch in (m.low, m.high)):
        return 0.0
    hooks = [block.register_forward_pre_hook(record) for block in blocks]
    for photo in list_photographs(data):
        restore(model, reduced(photo, SCALE)[0])
    for hook in hooks:
        hook.remove()
    return sum(ratios) / len(ratios)


def high_share(features: Float[Tensor, "1 dim height width"]) -> float:
    """The share of the energy that lies above half the Nyquist radius, the mean of each map left out."""
    energy = torch.fft.fft2(features - features.mean((2, 3), keepdim=True)).abs().square()
    return float(energy[..., radius(features) > 0.25].sum() / energy.sum())


def draw(fit: Fit, data: TaskData, seed: int) -> "Figure":
    return before_and_after({"CRAFT, small": fit.model}, data.test[0])


# Counts


def randomise_weights(module: nn.Module) -> nn.Module:
    """Random weights of a size at which every branch matters."""
    module.load_state_dict(seeded_state({name: t.shape for name, t in module.state_dict().items()}))
    return module.eval()


def reach(block: nn.Module, side: int) -> int:
    """How many positions of a map change when its middle pixel does."""
    draw = torch.Generator().manual_seed(0)
    x, change = (torch.randn(1, DIM, side, side, generator=draw, dtype=torch.float64) for _ in range(2))
    changed = x.clone()
    changed[..., side // 2, side // 2] += change[..., 0, 0]
    with torch.no_grad():
        block = randomise_weights(block).double()
        return int(((block(changed) - block(x)).abs().amax(dim=1) > 1e-6).sum())


PRESETS = {2: craft_x2, 3: craft_x3, 4: craft_x4}


def parameters(build: Callable[[int], nn.Module]) -> Callable[[int, str], Callable[[], int]]:
    def make(scale: int, device: str) -> Callable[[], int]:
        with torch.device("meta"):
            return partial(cost.count_parameters, build(scale))

    return make


def swinir_light(scale: int) -> nn.ModuleList:
    """The weights of SwinIR-light (Liang et al., 2021, arXiv:2108.10257), from its published configuration.

    Four groups of six blocks and a convolution; 60 channels, 6 heads, windows of 8×8, an MLP of twice the width.
    """
    dim, heads, window = 60, 6, 8

    def block() -> nn.ModuleList:
        table = nn.Linear((2 * window - 1) ** 2, heads, bias=False)  # of learnt position biases
        mlp = [nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)]
        return nn.ModuleList(
            [nn.LayerNorm(dim), table, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.LayerNorm(dim), *mlp]
        )

    groups = [nn.ModuleList([*(block() for _ in range(6)), nn.Conv2d(dim, dim, 3)]) for _ in range(4)]
    ends = [nn.Conv2d(3, dim, 3), nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Conv2d(dim, dim, 3)]
    return nn.ModuleList([*groups, *ends, nn.Conv2d(dim, 3 * scale**2, 3)])


def on_maps(module: Callable[[], nn.Module], channels: Sequence[int]) -> Callable[[int, str], Callable[[], object]]:
    """A module on square maps of so many pixels, one map for each number of channels."""

    def make(pixels: int, device: str) -> Callable[[], object]:
        network, side = module().to(device).eval(), isqrt(pixels)
        maps = [torch.zeros(1, count, side, side, device=device) for count in channels]

        def forward() -> object:
            with torch.no_grad():
                return network(*maps)

        return forward

    return make

"""What Terminator is set against: wider ResNets, one with squeeze-excite, a CCNN, and itself with other bottlenecks."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.channel_gates import SqueezeExcitation
from provenn.papers.terminator.layers import SFNEBlock
from provenn.papers.terminator.model import Terminator2d
from provenn.papers.terminator.optim import Kar3

# Widths of stages. Terminator's parameters are those of (18, 36, 68), to a percent.
WITH_SE, TWICE, FOUR_TIMES = (18, 36, 67), (26, 50, 96), (36, 72, 136)
INSIDE = (6, 12, 60)  # channels of branches where no bottleneck follows


class ContinuousKernel(nn.Module):
    """Kernels of a coordinate network, twice as wide as the map but for one place (Romero et al., 2021, 2110.08059).

        g_i(c) = exp(−½ |γ_i (c − μ_i)|²) sin(A_i c + a_i);  h_0 = g_0;  h_i = g_i ⊙ (U_i h_{i−1} + u_i)
        kernel(c) = (O h_ℓ + o) · exp(−½ |c / σ|²)

    Args:
        channels: kernels to give.
        size: side of the map.
        hidden, layers: of the coordinate network.
        omega: the range of A at first.

    Shapes: nothing to (channels, 2 size − 1, 2 size − 1).
    """

    points: Tensor

    def __init__(self, channels: int, size: int, *, hidden: int = 32, layers: int = 3, omega: float = 10.0):
        super().__init__()
        self.side = 2 * size - 1
        axis = torch.linspace(-1, 1, self.side)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)
        self.register_buffer("points", grid, persistent=False)
        self.waves = nn.ModuleList(nn.Linear(2, hidden) for _ in range(layers))
        self.centres = nn.Parameter(2 * torch.rand(layers, hidden, 2) - 1)
        shapes = (torch.full((hidden, 2), 6 / (i + 1)) for i in range(layers))
        self.sharpness = nn.Parameter(torch.stack([torch._standard_gamma(shape) for shape in shapes]))
        self.mixers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.out = nn.Linear(hidden, channels)
        self.reach = nn.Parameter(torch.full((2,), 0.5))
        with torch.no_grad():
            for wave in self.waves:
                wave.weight.mul_(omega)  # type: ignore[operator]  # a Linear's
                wave.bias.uniform_(-math.pi, math.pi)  # type: ignore[operator]
            self.out.weight.div_(self.side)  # a sum over the map is as large as its terms

    def forward(self) -> Float[Tensor, "channels side side"]:
        envelopes = ((self.points[None, :, None] - self.centres[:, None]) * self.sharpness[:, None]).square().sum(-1)
        h: Tensor | None = None
        for i, (wave, envelope) in enumerate(zip(self.waves, envelopes, strict=True)):
            filtered = torch.exp(-envelope / 2) * wave(self.points).sin()
            h = filtered if h is None else filtered * self.mixers[i - 1](h)
        mask = torch.exp(-(self.points / self.reach).square().sum(-1, keepdim=True) / 2)
        return (self.out(h) * mask).T.unflatten(-1, (self.side, self.side))


def global_convolution(
    x: Float[Tensor, "batch channels size size"], kernel: Float[Tensor, "channels side side"]
) -> Float[Tensor, "batch channels size size"]:
    """Each channel with its own kernel of twice the map's side, by Fourier: zeros stand outside of the map."""
    size = x.shape[-1]
    period = 2 * size  # no two of the kernel's offsets, −size + 1 to size − 1, meet
    placed = F.pad(kernel, (0, 1, 0, 1)).roll((1 - size, 1 - size), dims=(-2, -1))
    spectrum = torch.fft.rfft2(x, s=(period, period)) * torch.fft.rfft2(placed)
    return torch.fft.irfft2(spectrum, s=(period, period))[..., :size, :size]


class ContinuousBlock(nn.Module):
    """x + W₂ GELU(W₁ GELU(k * BN(x))): a global depthwise convolution of continuous kernels between pointwise maps."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.kernel = ContinuousKernel(channels, size)
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.mix, self.out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "batch channels size size"]) -> Float[Tensor, "batch channels size size"]:
        y = F.gelu(global_convolution(self.norm(x), self.kernel()) + self.bias)
        return x + self.out(F.gelu(self.mix(y)))


class CCNN(nn.Module):
    """A continuous convolutional network in two dimensions (Romero et al., 2022, arXiv:2206.03398), without dropout.

    Shapes: (batch, in_channels, size, size) to (batch, num_classes). The resolution stays to the end.
    """

    def __init__(self, num_classes: int, in_channels: int, *, channels: int = 146, blocks: int = 4, size: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels, 1)
        self.blocks = nn.Sequential(*(ContinuousBlock(channels, size) for _ in range(blocks)))
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Float[Tensor, "batch in_channels size size"]) -> Float[Tensor, "batch num_classes"]:
        return self.head(self.norm(self.blocks(self.stem(x))).mean((2, 3)))


class KarCCNN(CCNN):
    """A CCNN with Terminator's optimizer."""

    def optimizers(self, recipe: Any) -> torch.optim.Optimizer:
        return Kar3(self.parameters(), recipe.lr)


SQUEEZE_EXCITE = partial(SqueezeExcitation, reduction=4)


# Bottlenecks


class FixedBottlenecks(Terminator2d):
    """Terminator whose bottlenecks stay the random projections that they start as."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        for block in self.blocks:
            block.bottleneck.requires_grad_(False)


class JoinedBlock(SFNEBlock):
    """An SFNE block that gives all of its branches' channels, joined: norm, GELU and bias follow as they do there.

    It works on fewer channels than it is given: groups of them are averaged, which is the transpose of how earlier
    outputs are tiled. Nothing is learned in between.

    Args:
        channels, size, layers, earlier, dropout: as in `SFNEBlock`; channels · (10 + earlier) is a multiple of 12.

    Shapes: (batch, m · channels, size, size) to (batch, (10 + earlier) · channels, size, size).
    """

    def __init__(self, channels: int, size: int, *, layers: int, earlier: int, dropout: float | int):
        super().__init__(channels, 10 + earlier, size, layers=layers, earlier=earlier, dropout=dropout)
        self.bottleneck = nn.Identity()  # type: ignore[assignment]

    def forward(
        self, x: Float[Tensor, "batch wide size size"], before: Sequence[Tensor] = ()
    ) -> tuple[Float[Tensor, "batch out size size"], Float[Tensor, "1 channels size size"]]:
        return super().forward(x.unflatten(1, (-1, self.channels)).mean(1), before)


class WithoutBottlenecks(Terminator2d):
    """Terminator without bottlenecks: its branches are narrower, so that it has as many parameters.

    Args:
        inside: channels that the branches of each block have; by default as many parameters as those of the small
            Terminator, to a few percent.
        options: of Terminator.
    """

    def __init__(self, inside: tuple[int, ...] = INSIDE, **options: Any):
        super().__init__(**options)
        layers = (3, *(2,) * (len(inside) - 1))
        self.blocks = nn.ModuleList(
            JoinedBlock(width, self.size, layers=layers[i], earlier=len(self.earlier[i]), dropout=0.05 if i else 0.0)
            for i, width in enumerate(inside)
        )
        self.repeats = inside[0] // self.in_channels
        self.widths = [inside[-1] * (10 + len(self.earlier[len(inside) - 1]))]
        self.head = nn.Linear(self.widths[0], self.head.out_features)  # type: ignore[arg-type]  # a Linear's
        nn.init.kaiming_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

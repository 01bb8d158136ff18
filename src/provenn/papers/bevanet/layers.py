"""Large kernels at a small price: SDLSKA, its kernel selection, and the EVA block (arXiv:2508.07300).

Beside SDLSKA stand the two decompositions that it comes from: LKA, one small and one dilated square, and LSKA, the same
as strips in series. What all three have in common is `y = x ⊙ conv1×1(depthwise part of x)`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.narrowing import present
from provenn.nn.arguments import check_finite, check_whole

Maps = Float[Tensor, "batch channels height width"]


class Decomposition(NamedTuple):
    """A large kernel as two small ones: K = small + dilation · (taps − 1)."""

    small: int
    taps: int
    dilation: int


KERNELS = {
    7: Decomposition(3, 3, 2),
    11: Decomposition(3, 5, 2),
    23: Decomposition(5, 7, 3),
    35: Decomposition(5, 11, 3),
    41: Decomposition(5, 13, 3),
    53: Decomposition(5, 17, 3),
}
"""How each kernel size is decomposed. The paper's networks have 23 and 35."""


def decomposition(kernel_size: int) -> Decomposition:
    """The parts of a large kernel.

    Raises:
        ValueError: a size that the paper and LSKA do not decompose.
    """
    check_whole(kernel_size=kernel_size)
    if kernel_size not in KERNELS:
        raise ValueError(f"kernel_size must be one of {', '.join(map(str, KERNELS))}, got {kernel_size}")
    return KERNELS[kernel_size]


def depthwise(channels: int, kernel: int | tuple[int, int], dilation: int = 1) -> nn.Conv2d:
    """A convolution of each channel by itself, with bias, the map's size kept."""
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (dilation * (height // 2), dilation * (width // 2))
    return nn.Conv2d(channels, channels, (height, width), padding=padding, dilation=dilation, groups=channels)


class PooledNorm(nn.BatchNorm2d):
    """Batch norm of pooled maps. A single value has no variance: in training too its running statistics serve.

    The plain norm ends the training with an error at a last batch of one. `SyncBatchNorm`, which takes the statistics
    over several devices, replaces it as any other batch norm.
    """

    def forward(self, x: Maps) -> Maps:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class PooledLayer(nn.Module):
    """ReLU(BN(dw3×3(conv1×1(x)))) of 1×1 maps.

    Of the 3×3 kernels only the centre meets the map; the other eight taps are the authors', and do nothing.
    """

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.point = nn.Conv2d(channels, out, 1)
        self.depth = depthwise(out, 3)
        self.norm = PooledNorm(out)

    def forward(self, x: Float[Tensor, "batch channels 1 1"]) -> Float[Tensor, "batch out 1 1"]:
        return self.norm(self.depth(self.point(x))).relu()

    def fused(self) -> nn.Sequential:
        """ReLU(conv1×1(x)): all that is left of it in eval mode."""
        point, depth, norm = self.point, self.depth, self.norm
        mean, variance = present(norm.running_mean, "running_mean"), present(norm.running_var, "running_var")
        before, after = present(point.bias, "point.bias"), present(depth.bias, "depth.bias")
        scale = norm.weight * (variance + norm.eps).rsqrt()
        centre = depth.weight[:, 0, 1, 1]
        merged = nn.Conv2d(point.in_channels, point.out_channels, 1).to(point.weight)
        merged.weight = nn.Parameter((scale * centre)[:, None, None, None] * point.weight)
        merged.bias = nn.Parameter(norm.bias + scale * (centre * before + after - mean))
        return nn.Sequential(merged, nn.ReLU())


class CKS(nn.Module):
    """Comprehensive kernel selection: each of three maps is weighed per channel and per pixel, and they are summed.

        A = a₀ + a₁ + a₂
        c = σ(ReLU(BN(dw3×3(conv1×1(z))))), z = ReLU(BN(dw3×3(conv1×1(mean over space of A))))      3 a channel
        s = σ(conv7×7([mean over channels of A, max over channels of A]))                           3 a pixel
        output = Σ_j a_j · c_j · s_j

    The ReLU before σ keeps c in [0.5, 1). The gates are independent sigmoids, no softmax over the three.

    Args:
        channels: C of each map.
        hidden: width of z; max(C / 16, 32) by default.

    Shapes: three of (batch, channels, height, width) to one.
    """

    def __init__(self, channels: int, hidden: int | None = None):
        check_whole(channels=channels, hidden=hidden)
        super().__init__()
        hidden = max(channels // 16, 32) if hidden is None else hidden
        self.reduce = PooledLayer(channels, hidden)
        self.expand = PooledLayer(hidden, 3 * channels)  # the three heads side by side
        self.squeeze = nn.Conv2d(2, 3, 7, padding=3)

    def gates(
        self, total: Maps
    ) -> tuple[Float[Tensor, "batch 3 channels 1 1"], Float[Tensor, "batch 3 1 height width"]]:
        """c and s, given A."""
        pooled = total.mean(dim=(2, 3), keepdim=True)
        by_channel = self.expand(self.reduce(pooled)).sigmoid().unflatten(1, (3, -1))
        summary = torch.cat([total.mean(1, keepdim=True), total.max(1, keepdim=True).values], dim=1)
        return by_channel, self.squeeze(summary).sigmoid().unsqueeze(2)

    def forward(self, small: Maps, horizontal: Maps, vertical: Maps) -> Maps:
        c, s = self.gates(small + horizontal + vertical)
        first, second, third = (a * c[:, j] * s[:, j] for j, a in enumerate((small, horizontal, vertical)))
        return first + second + third


class SelectedStrips(nn.Module):
    """The depthwise part of SDLSKA: a small square, two dilated strips of its output in parallel, and their selection.

        a₀ = dw(x), a₁ = dw strip 1×t(a₀), a₂ = dw strip t×1(a₀), output = CKS(a₀, a₁, a₂)

    It spans K×K, of which it reaches a cross: 325 of 1,225 positions for K = 35.

    Args:
        channels: C.
        kernel_size: K: 7, 11, 23, 35, 41 or 53.
        select: whether CKS weighs the three; without, they are added.

    Shapes: (batch, channels, height, width) to the same. Slot: map-mixer.
    """

    def __init__(self, channels: int, kernel_size: int = 35, *, select: bool = True):
        check_whole(channels=channels)
        super().__init__()
        small, taps, dilation = decomposition(kernel_size)
        self.small = depthwise(channels, small)
        self.horizontal = depthwise(channels, (1, taps), dilation)
        self.vertical = depthwise(channels, (taps, 1), dilation)
        self.select = CKS(channels) if select else None

    def forward(self, x: Maps) -> Maps:
        small = self.small(x)
        horizontal, vertical = self.horizontal(small), self.vertical(small)
        if self.select is None:
            return small + horizontal + vertical
        return self.select(small, horizontal, vertical)


class Gated(nn.Module):
    """y = x ⊙ conv1×1(spread(x)), the form of large-kernel attention: no sigmoid, no softmax.

    Args:
        channels: C.
        spread: the depthwise part.
    """

    def __init__(self, channels: int, spread: nn.Module):
        super().__init__()
        self.spread = spread
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Maps) -> Maps:
        return x * self.point(self.spread(x))


class SDLSKA(Gated):
    """Sparse decomposed large separable kernel attention: y = x ⊙ conv1×1(CKS(a₀, a₁, a₂)), as `SelectedStrips` has it.

    Args: those of `SelectedStrips`.

    Shapes: (batch, channels, height, width) to the same. Slot: map-mixer.

    >>> sum(p.numel() for p in SDLSKA(512).parameters())
    374473
    """

    def __init__(self, channels: int, kernel_size: int = 35, *, select: bool = True):
        super().__init__(channels, SelectedStrips(channels, kernel_size, select=select))


class LSKA(Gated):
    """Large separable kernel attention (Lau et al., 2024, arXiv:2309.01439): small and dilated strips in series.

    Args, shapes: as for `SDLSKA`. It reaches all K² positions. Slot: map-mixer.
    """

    def __init__(self, channels: int, kernel_size: int = 35):
        check_whole(channels=channels, kernel_size=kernel_size)
        small, taps, dilation = decomposition(kernel_size)
        strips = nn.Sequential(
            depthwise(channels, (1, small)),
            depthwise(channels, (small, 1)),
            depthwise(channels, (1, taps), dilation),
            depthwise(channels, (taps, 1), dilation),
        )
        super().__init__(channels, strips)


class LKA(Gated):
    """Large kernel attention (Guo et al., 2023, arXiv:2202.09741): a small square, then a dilated one.

    Args, shapes: as for `SDLSKA`; VAN has K = 23, which its paper calls 21. Slot: map-mixer.
    """

    def __init__(self, channels: int, kernel_size: int = 35):
        check_whole(channels=channels, kernel_size=kernel_size)
        small, taps, dilation = decomposition(kernel_size)
        super().__init__(channels, nn.Sequential(depthwise(channels, small), depthwise(channels, taps, dilation)))


class ParallelKernels(Gated):
    """K×5 and 5×K in full beside 5×5, summed, as in SLaK (Liu et al., 2023, arXiv:2207.03620), with the gate of LKA.

    Args, shapes: as for `SDLSKA`; `kernel_size` is any odd number from 5 on. Slot: map-mixer.
    """

    def __init__(self, channels: int, kernel_size: int = 35):
        check_whole(channels=channels, kernel_size=kernel_size)
        if kernel_size < 5 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 5, got {kernel_size}")
        super().__init__(channels, _Sum(*(depthwise(channels, k) for k in (5, (kernel_size, 5), (5, kernel_size)))))


class _Sum(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self]).sum(0)


ATTENTIONS: dict[str, Callable[..., nn.Module]] = {
    "sdlska": SDLSKA,
    "sdlska-sum": lambda channels, kernel_size: SDLSKA(channels, kernel_size, select=False),
    "lska": LSKA,
    "lka": LKA,
    "slak": ParallelKernels,
}


class SpatialAttention(nn.Module):
    """u + conv1×1(attention(GELU(conv1×1(u)))).

    Args:
        channels: C.
        attention: the large kernel, such as `SDLSKA(channels, 35)`.
    """

    def __init__(self, channels: int, attention: nn.Module):
        super().__init__()
        self.enter = nn.Conv2d(channels, channels, 1)
        self.attention = attention
        self.leave = nn.Conv2d(channels, channels, 1)

    def forward(self, u: Maps) -> Maps:
        return u + self.leave(self.attention(F.gelu(self.enter(u))))


class LayerScale(nn.Module):
    """λ ⊙ x with a λ for each channel, which starts small.

    Args:
        channels: C.
        start: of λ.
    """

    def __init__(self, channels: int, start: float = 1e-2):
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels,), float(start)))

    def forward(self, x: Maps) -> Maps:
        return x * self.scale[:, None, None]


class EVA(nn.Module):
    """The efficient visual attention block.

        x ← x + λ₁ ⊙ SA(BN(x)),   SA(u) = u + conv1×1(attention(GELU(conv1×1(u))))
        x ← x + λ₂ ⊙ FFN(BN(x)),  FFN(u) = conv1×1(GELU(dw3×3(conv1×1(u)))), four times as wide inside

    λ start at 0.01, kernels from N(0, 2 / (k² · out / groups)), biases at 0, as in the authors' code.

    Args:
        channels: C.
        kernel_size: K of the attention.
        attention: "sdlska", "sdlska-sum" (without selection), "lska", "lka" or "slak".
        expansion: how much wider the feed-forward part is.
        scale: where λ₁ and λ₂ start.

    Shapes: (batch, channels, height, width) to the same. Slot: map-mixer.

    >>> sum(p.numel() for p in EVA(512).parameters())
    3023049
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 35,
        *,
        attention: str = "sdlska",
        expansion: int = 4,
        scale: float | int = 1e-2,
    ):
        check_whole(channels=channels, expansion=expansion)
        check_finite(scale=scale)
        super().__init__()
        if channels < 1 or expansion < 1:
            raise ValueError(f"channels and expansion must be at least 1, got {channels} and {expansion}")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        inner = expansion * channels
        self.norm1 = nn.BatchNorm2d(channels)
        self.spatial = SpatialAttention(channels, ATTENTIONS[attention](channels, kernel_size))
        self.scale1 = LayerScale(channels, scale)
        self.norm2 = nn.BatchNorm2d(channels)
        self.feed_forward = nn.Sequential(
            nn.Conv2d(channels, inner, 1), depthwise(inner, 3), nn.GELU(), nn.Conv2d(inner, channels, 1)
        )
        self.scale2 = LayerScale(channels, scale)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
                nn.init.zeros_(present(module.bias, "bias"))

    def forward(self, x: Maps) -> Maps:
        x = x + self.scale1(self.spatial(self.norm1(x)))
        return x + self.scale2(self.feed_forward(self.norm2(x)))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel, ε 1e-5."""

    def forward(self, x: Maps) -> Maps:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def reach(mixer: nn.Module, channels: int, size: int) -> Float[Tensor, "size size"]:
    """How strongly each position of a map of zeros moves the centre of a depthwise part, summed over channels.

    Args:
        mixer: (1, channels, size, size) to the same, such as the `spread` of an attention.
        channels, size: of the map.
    """
    x = torch.zeros(1, channels, size, size, dtype=next(mixer.parameters()).dtype, requires_grad=True)
    centre: Any = mixer(x)[0, :, size // 2, size // 2].sum()
    return torch.autograd.grad(centre, x)[0][0].abs().sum(0)

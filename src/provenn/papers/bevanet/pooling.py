"""Pyramid pooling: context of several reaches added to a coarse map.

DLKPPM is BEVANet's (arXiv:2508.07300). DAPPM (DDRNet, arXiv:2101.06085) and PAPPM (PIDNet, arXiv:2206.02066) are what
it is held against.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.segmentation import resize
from provenn.papers.bevanet.layers import LSKA, LayerScale, PooledNorm, SpatialAttention

Maps = Float[Tensor, "batch channels height width"]
Context = Float[Tensor, "batch out height width"]


def norm_relu_conv(channels: int, out: int, kernel_size: int = 1, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """conv(ReLU(BN(x))) without bias, the map's size kept."""
    padding = dilation * (kernel_size // 2)
    convolution = nn.Conv2d(channels, out, kernel_size, padding=padding, dilation=dilation, groups=groups, bias=False)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), convolution)


class Pooled(nn.Sequential):
    """conv1×1(ReLU(BN(pool(x)))), resized to the map that it came from.

    Args:
        channels, out: of the map and of what is given.
        window, stride: of the average, whose padding of half the window counts as zeros; or
        cells: how many cells a side the whole map is averaged to.
    """

    def __init__(self, channels: int, out: int, *, window: int = 0, stride: int = 1, cells: int = 0):
        pool = nn.AdaptiveAvgPool2d(cells) if cells else nn.AvgPool2d(window, stride, window // 2)
        super().__init__(pool, PooledNorm(channels), nn.ReLU(), nn.Conv2d(channels, out, 1, bias=False))

    def forward(self, x: Maps) -> Context:
        return resize(super().forward(x), x.shape[-2:])


class DLKPPM(nn.Module):
    """Deep large-kernel pyramid pooling: dilated convolutions and large-kernel attention join pooled context.

        f₀ = pre1×1(x),  g = f₀ + λ ⊙ SA(BN(f₀)) with LSKA of 35, λ from 0.01
        p₁ = dil(up(pool5/2) + f₀),  p₂ = dil(up(pool9/4) + p₁),  p₃ = pre3×3(g + p₂)
        p₄ = pre3×3(up(2×2 cells) + p₃),  p₅ = pre3×3(up(mean) + p₄)
        output = pre1×1([f₀, p₁, …, p₅]) + pre1×1(x)

    where "pre" is BN, ReLU, convolution; dil is pre3×3 with dilation 2; each pooled map goes through pre1×1.

    Args:
        channels: of the map.
        branch: of each f and p.
        out: of what is given.

    Attributes:
        strides: of the pooled maps, in cells of the map.

    Shapes: (batch, channels, height, width) to (batch, out, height, width).
    """

    def __init__(self, channels: int, branch: int, out: int):
        super().__init__()
        self.strides = (2, 4)
        self.enter = norm_relu_conv(channels, branch)
        self.norm = nn.BatchNorm2d(branch)
        self.spatial = SpatialAttention(branch, LSKA(branch, 35))
        self.scale = LayerScale(branch)
        self.pooled = nn.ModuleList(
            [
                Pooled(channels, branch, window=5, stride=2),
                Pooled(channels, branch, window=9, stride=4),
                Pooled(channels, branch, cells=2),
                Pooled(channels, branch, cells=1),
            ]
        )
        dilations = (2, 2, 1, 1, 1)
        self.process = nn.ModuleList(norm_relu_conv(branch, branch, 3, dilation) for dilation in dilations)
        self.compress = norm_relu_conv(6 * branch, out)
        self.shortcut = norm_relu_conv(channels, out)

    def forward(self, x: Maps) -> Context:
        first = self.enter(x)
        wide = first + self.scale(self.spatial(self.norm(first)))
        near, far, quarters, whole = (pool(x) for pool in self.pooled)
        maps = [first]
        for context, process in zip((near, far, wide, quarters, whole), self.process, strict=True):
            maps.append(process(context + maps[-1]))
        return self.compress(torch.cat(maps, dim=1)) + self.shortcut(x)


class DAPPM(nn.Module):
    """Deep aggregation pyramid pooling: each pooled map joins the one before it by a 3×3 convolution.

    Args, shapes: as for `DLKPPM`.
    """

    def __init__(self, channels: int, branch: int, out: int):
        super().__init__()
        self.strides = (2, 4, 8)
        self.enter = norm_relu_conv(channels, branch)
        self.pooled = nn.ModuleList(_four_pools(channels, branch))
        self.process = nn.ModuleList(norm_relu_conv(branch, branch, 3) for _ in range(4))
        self.compress = norm_relu_conv(5 * branch, out)
        self.shortcut = norm_relu_conv(channels, out)

    def forward(self, x: Maps) -> Context:
        maps = [self.enter(x)]
        for pool, process in zip(self.pooled, self.process, strict=True):
            maps.append(process(pool(x) + maps[-1]))
        return self.compress(torch.cat(maps, dim=1)) + self.shortcut(x)


class PAPPM(nn.Module):
    """Parallel aggregation pyramid pooling: DAPPM with all 3×3 convolutions at once, in groups.

    Args, shapes: as for `DLKPPM`.
    """

    def __init__(self, channels: int, branch: int, out: int):
        super().__init__()
        self.strides = (2, 4, 8)
        self.enter = norm_relu_conv(channels, branch)
        self.pooled = nn.ModuleList(_four_pools(channels, branch))
        self.process = norm_relu_conv(4 * branch, 4 * branch, 3, groups=4)
        self.compress = norm_relu_conv(5 * branch, out)
        self.shortcut = norm_relu_conv(channels, out)

    def forward(self, x: Maps) -> Context:
        first = self.enter(x)
        joined = self.process(torch.cat([pool(x) + first for pool in self.pooled], dim=1))
        return self.compress(torch.cat([first, joined], dim=1)) + self.shortcut(x)


def _four_pools(channels: int, branch: int) -> list[nn.Module]:
    sizes = ((5, 2), (9, 4), (17, 8))
    pools: list[nn.Module] = [Pooled(channels, branch, window=window, stride=stride) for window, stride in sizes]
    return [*pools, Pooled(channels, branch, cells=1)]


POOLINGS: dict[str, type[DLKPPM] | type[DAPPM] | type[PAPPM]] = {"dlkppm": DLKPPM, "dappm": DAPPM, "pappm": PAPPM}

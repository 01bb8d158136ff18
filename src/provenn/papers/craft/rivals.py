"""What CRAFT is held against as whole networks: SwinIR and RFDN, for any scale and size."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.ops.softmax_attention import softmax_attention
from provenn.papers.craft.layers import windows_without_wrap
from provenn.papers.craft.model import MEAN

Maps = Float[Tensor, "batch channels height width"]


class OverBicubic(nn.Module):
    """A network for super-resolution whose output is added to the bicubic interpolation of its input.

    The published networks learn the image itself, which takes long trainings; CRAFT has the same addition here.

    Args:
        scale: s.
        body: features from the input less its mean colour, (batch, 3, height, width) to (batch, channels, …).
        channels: of the features.
        multiple: height and width of the input must be multiples of it.

    Shapes: (batch, 3, height, width) in 0…1 to (batch, 3, scale · height, scale · width).
    """

    mean: Tensor

    def __init__(self, scale: int, body: nn.Module, channels: int, *, multiple: int = 1):
        super().__init__()
        self.scale, self.body, self.multiple = scale, body, multiple
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        pixels = nn.Conv2d(channels, 3 * scale**2, 3, padding=1)
        nn.init.trunc_normal_(pixels.weight, std=1e-3)  # as CRAFT over bicubic interpolation starts
        self.upsample = nn.Sequential(pixels, nn.PixelShuffle(scale))

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height2 width2"]:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))  # not implemented for bfloat16 on CPU
        base = F.interpolate(precise, scale_factor=self.scale, mode="bicubic", antialias=True).to(x.dtype)
        return self.upsample(self.body(x - self.mean)) + base


# SwinIR (Liang et al., 2021, arXiv:2108.10257), section 3; the structure is that of JingyunLiang/SwinIR.


WINDOW = 8  # pixels a side


class SwinBlock(nn.Module):
    """Swin's block: x ← x + attention(LN(x)) in square windows, x ← x + MLP(LN(x)).

    A = softmax(q kᵀ / √d + b), b a learned number for each head and offset. Shifted windows are moved by half their
    side, and what stands at opposite borders of the image is kept apart.

    Args:
        dim: C.
        heads: of the attention.
        window: side of a window, in pixels.
        shifted: whether the windows are moved.
        ratio: hidden width of the MLP over C.

    Shapes: (batch, height, width, dim) to the same; height and width are multiples of `window`.
    """

    index: Tensor

    def __init__(self, dim: int, heads: int, *, window: int = WINDOW, shifted: bool = False, ratio: int = 2):
        check_whole(dim=dim, heads=heads, window=window, ratio=ratio)
        super().__init__()
        self.heads, self.window, self.shift = heads, window, window // 2 if shifted else 0
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))
        self.bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = places[:, None] - places + window - 1
        self.register_buffer("index", offset[..., 0] * (2 * window - 1) + offset[..., 1], persistent=False)
        nn.init.trunc_normal_(self.bias, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        """The attention of each window, projected."""
        (batch, height, width, _), side, shift = x.shape, self.window, self.shift
        if height % side or width % side:
            raise ValueError(f"height and width must be multiples of {side}, got {height}×{width}")
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
        pattern = "b (i r) (j c) (three head d) -> three (b i j) head (r c) d"
        q, k, v = rearrange(self.qkv(x), pattern, three=3, head=self.heads, r=side, c=side)
        mask = self.bias[self.index].permute(2, 0, 1)[None].to(q.dtype)  # (1, heads, tokens, tokens)
        if shift:
            apart = ~windows_without_wrap(height, width, (side, side), (shift, shift), device=x.device)
            mask = mask.masked_fill(apart.repeat(batch, 1, 1)[:, None], -torch.inf)
        y = softmax_attention(q, k, v, mask=mask)
        back = "(b i j) head (r c) d -> b (i r) (j c) (head d)"
        y = rearrange(y, back, b=batch, i=height // side, r=side)
        return self.project(y.roll((shift, shift), dims=(1, 2)) if shift else y)


class SwinGroup(nn.Module):
    """x + conv3×3(blocks(x)), every second block with shifted windows: SwinIR's RSTB.

    Args:
        dim, heads: as in `SwinBlock`.
        depth: number of blocks.

    Shapes: (batch, dim, height, width) to the same.
    """

    def __init__(self, dim: int, heads: int, depth: int):
        super().__init__()
        self.blocks = nn.Sequential(*(SwinBlock(dim, heads, shifted=bool(k % 2)) for k in range(depth)))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Maps) -> Maps:
        return x + self.conv(self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class SwinIRBody(nn.Module):
    """s = conv3×3(x); s + conv3×3(LN(groups(LN(s)))).

    Args:
        dim, heads, depth: as in `SwinGroup`.
        groups: how many of them.

    Shapes: (batch, 3, height, width) to (batch, dim, height, width).
    """

    def __init__(self, dim: int, heads: int, groups: int, depth: int):
        super().__init__()
        self.first = nn.Conv2d(3, dim, 3, padding=1)
        self.enter, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.groups = nn.Sequential(*(SwinGroup(dim, heads, depth) for _ in range(groups)))
        self.last = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim height width"]:
        shallow = self.first(x)
        deep = self.groups(self.enter(shallow.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return shallow + self.last(self.norm(deep.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def swinir(scale: int, *, dim: int = 60, heads: int = 6, groups: int = 4, depth: int = 6) -> OverBicubic:
    """SwinIR for light super-resolution, over bicubic interpolation; by default of the published light size.

    Args:
        scale: as in `OverBicubic`.
        dim, heads, groups, depth: as in `SwinIRBody`; 60, 6, 4 and 6 are published.
    """
    return OverBicubic(scale, SwinIRBody(dim, heads, groups, depth), dim, multiple=WINDOW)


# RFDN (Liu et al., 2020, arXiv:2009.11551), section 3; the structure is that of njulj/RFDN, block.py and RFDN.py.

LEAK = 0.05
SMALLEST = 15  # pixels a side, below which the pooling of ESA has no window


class ESA(nn.Module):
    """Enhanced spatial attention: a gate for each channel and pixel, seen from a coarse map of a quarter of the width.

        u = conv1×1(x), c = maxpool7, stride 3 (conv3×3, stride 2 (u)), c ← three conv3×3 of c, ReLU between them
        output = x · σ(conv1×1(up(c) + conv1×1(u)))

    Args:
        channels: C.

    Shapes: (batch, channels, height, width) to the same; sides are at least 15.
    """

    def __init__(self, channels: int):
        super().__init__()
        f = channels // 4
        self.enter, self.keep, self.leave = nn.Conv2d(channels, f, 1), nn.Conv2d(f, f, 1), nn.Conv2d(f, channels, 1)
        self.stride = nn.Conv2d(f, f, 3, stride=2)
        first, second, third = (nn.Conv2d(f, f, 3, padding=1) for _ in range(3))
        self.coarse = nn.Sequential(nn.MaxPool2d(7, stride=3), first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Maps) -> Maps:
        if min(x.shape[-2:]) < SMALLEST:
            raise ValueError(f"sides must be at least {SMALLEST} pixels, got {x.shape[-2]}×{x.shape[-1]}")
        narrow = self.enter(x)
        coarse = self.coarse(self.stride(narrow))
        coarse = F.interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=False)
        return x * self.leave(coarse + self.keep(narrow)).sigmoid()


class ResidualFeatureDistillation(nn.Module):
    """RFDN's block: three times half of the features is kept by a 1×1 convolution, and the rest goes on residually.

        d_i = φ(conv1×1(r_i)),  r_{i+1} = φ(conv3×3(r_i) + r_i),  i = 0, 1, 2,  r_0 = x
        output = ESA(conv1×1([d_0, d_1, d_2, φ(conv3×3(r_3))])),  φ a ReLU that leaks 0.05

    Args:
        channels: C, even.

    Shapes: (batch, channels, height, width) to the same.
    """

    def __init__(self, channels: int):
        check_whole(channels=channels)
        super().__init__()
        half = channels // 2
        self.distil = nn.ModuleList(nn.Conv2d(channels, half, 1) for _ in range(3))
        self.refine = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(channels, half, 3, padding=1)
        self.join = nn.Conv2d(4 * half, channels, 1)
        self.gate = ESA(channels)

    def forward(self, x: Maps) -> Maps:
        kept: list[Tensor] = []
        for distil, refine in zip(self.distil, self.refine, strict=True):
            kept.append(F.leaky_relu(distil(x), LEAK))
            x = F.leaky_relu(refine(x) + x, LEAK)
        kept.append(F.leaky_relu(self.last(x), LEAK))
        return self.gate(self.join(torch.cat(kept, dim=1)))


class RFDNBody(nn.Module):
    """s = conv3×3(x); s + conv3×3(φ(conv1×1([b_1, …, b_n]))), b_i the outputs of the blocks, one after the other.

    Args:
        channels: C.
        blocks: n.

    Shapes: (batch, 3, height, width) to (batch, channels, height, width).
    """

    def __init__(self, channels: int, blocks: int):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualFeatureDistillation(channels) for _ in range(blocks))
        self.join = nn.Conv2d(blocks * channels, channels, 1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Maps:
        shallow = y = self.first(x)
        outputs = [y := block(y) for block in self.blocks]
        return shallow + self.last(F.leaky_relu(self.join(torch.cat(outputs, dim=1)), LEAK))


def rfdn(scale: int, *, channels: int = 50, blocks: int = 4) -> OverBicubic:
    """RFDN, which won the AIM 2020 challenge on efficient super-resolution, over bicubic interpolation.

    Args:
        scale: as in `OverBicubic`.
        channels, blocks: as in `RFDNBody`; 50 and 4 are released.
    """
    return OverBicubic(scale, RFDNBody(channels, blocks), channels)

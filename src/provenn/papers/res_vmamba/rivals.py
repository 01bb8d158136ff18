"""What VMamba is set against on textures: ConvNeXt, Swin, and a ResNet with what fine-grained work adds to it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.channel_gates import SqueezeExcitation
from provenn.nn.resnet import BasicBlock, ResNet

PATCH, WINDOW = 2, 4  # of ConvNeXt and Swin here: images have 32 pixels a side
# Widths of equal size, to two percent: of ResNets for each other, the others as `studies.vmamba("none")`.
WIDER, WITH_SE, WITH_BILINEAR, WITH_PARTS = (29, 57, 113), (29, 57, 110), (29, 57, 109), (29, 57, 111)
WITH_BOTH, CONVNEXT, SWIN = (28, 55, 104), (24, 48, 94), (16, 40, 84)
squeeze_excite = partial(SqueezeExcitation, reduction=4)


# What is added to a ResNet


class BilinearHead(nn.Module):
    """A classifier of the products of all pairs of channels (Lin et al., 2015, arXiv:1504.07889).

    z = mean over places of u uᵀ, then sign(z) √|z|, to unit size. Shrunk: u has `rank` channels by a 1×1 convolution,
    where two networks give theirs there.

    Shapes: (batch, channels, height, width) to (batch, num_classes).
    """

    def __init__(self, channels: int, num_classes: int, rank: int = 24):
        super().__init__()
        self.project, self.fc = nn.Conv2d(channels, rank, 1), nn.Linear(rank * rank, num_classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        u = self.project(x).flatten(2)
        z = (u @ u.mT / u.shape[-1]).flatten(1)
        # A root has no slope at zero: the small number keeps it finite.
        return self.fc(F.normalize(z.sign() * (z.abs() + 1e-6).sqrt(), dim=-1))


class PartsHead(nn.Module):
    """A classifier of what attention to parts pools (Hu and Qi, 2019, arXiv:1901.09891): A = ReLU(BN(conv1×1(x))).

    Each of `parts` maps A_k weighs all places: mean over places of A_k ⊙ x. Parts go on by signed roots, to unit size,
    one behind the other. Shrunk: no centres of parts, and no crops or drops of images by them.

    Shapes: (batch, channels, height, width) to (batch, num_classes).
    """

    def __init__(self, channels: int, num_classes: int, parts: int = 4):
        super().__init__()
        self.attend = nn.Sequential(nn.Conv2d(channels, parts, 1, bias=False), nn.BatchNorm2d(parts), nn.ReLU())
        self.fc = nn.Linear(parts * channels, num_classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        z = (self.attend(x).flatten(2) @ x.flatten(2).mT / x[0, 0].numel()).flatten(1)
        return self.fc(F.normalize(z.sign() * (z.abs() + 1e-6).sqrt(), dim=-1))


class ResNetWithHead(ResNet):
    """A ResNet whose last map goes to a head of its own."""

    def __init__(self, head: Callable[[int, int], nn.Module], *, num_classes: int, **options: Any):
        super().__init__(BasicBlock, (1, 1, 1), num_classes=0, **options)
        self.head = head(self.widths[-1], num_classes)

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(x)[-1])


def fine_grained(
    widths: tuple[int, int, int], *, head: Callable[[int, int], nn.Module] | None = None, gate: Any = None
) -> Callable[..., nn.Module]:
    """A ResNet of one block a stage, as `studies.convolutional` is, with a head and a gate of its own."""
    if head is None:
        return partial(ResNet, BasicBlock, (1, 1, 1), widths=widths, gate=gate)
    return partial(ResNetWithHead, head, widths=widths, gate=gate)


# ConvNeXt and Swin


class ConvNeXtBlock(nn.Module):
    """x + γ ⊙ W₂ GELU(W₁ LN(dwconv7×7(x))), γ = 10⁻⁶ at first (Liu et al., 2022, arXiv:2201.03545).

    Shapes: (batch, height, width, dim) to the same.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.scale = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        y = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.scale * self.mlp(self.norm(y))


class SwinBlock(nn.Module):
    """Attention in windows with relative biases, every second block's shifted by half (Liu et al., 2021, 2103.14030).

    x ← x + attention(LN(x)); x ← x + mlp(LN(x)). Where a shift brings together what lies at two borders, it does not
    attend to each other.

    Args:
        dim, heads: of tokens, and of the attention.
        window: side; a map is a multiple of it.
        shift: of the windows; a map of one window has none.

    Shapes: (batch, height, width, dim) to the same.
    """

    index: Tensor

    def __init__(self, dim: int, heads: int, window: int, shift: int):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.biases = nn.Parameter(0.02 * torch.randn(heads, (2 * window - 1) ** 2))
        places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        away = places[:, None] - places + window - 1
        self.register_buffer("index", away[..., 0] * (2 * window - 1) + away[..., 1], persistent=False)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attention(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        """Every token to those of its window."""
        batch, height, width, dim = x.shape
        shift = self.shift if min(height, width) > self.window else 0
        windows = self.windows_of(x.roll((-shift, -shift), (1, 2)))
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        seen = self.biases[:, self.index]
        if shift:
            seen = seen + self.borders(height, width, shift, x)[:, None]
        y = self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(2, 3).flatten(3))
        grid = y.unflatten(1, (height // self.window, width // self.window)).unflatten(3, (self.window, self.window))
        return grid.transpose(2, 3).reshape(batch, height, width, dim).roll((shift, shift), (1, 2))

    def windows_of(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch windows places dim"]:
        """Tokens by window."""
        grid = x.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def borders(self, height: int, width: int, shift: int, x: Tensor) -> Float[Tensor, "windows places places"]:
        """−∞ between tokens of a window that come from two borders, else 0."""
        rows, columns = ((torch.arange(n, device=x.device) >= n - shift).long() for n in (height, width))
        kind = self.windows_of((2 * rows[:, None] + columns)[None, ..., None].to(x))[0, ..., 0]
        return torch.zeros(1, device=x.device, dtype=x.dtype).masked_fill(kind[..., None] != kind[:, None], -torch.inf)


class Staged(nn.Module):
    """Patches of two pixels, three stages of two blocks that halve the map, a norm, the mean, a linear map.

    Args:
        widths: of the stages.
        block: `block(dim, number in its stage)`.
        num_classes, in_channels: of the data.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes).
    """

    def __init__(
        self, widths: tuple[int, ...], block: Callable[[int, int], nn.Module], *, num_classes: int, in_channels: int
    ):
        super().__init__()
        self.merges, self.norms, self.stages = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for given, dim in zip((in_channels, *widths), widths):
            self.norms.append(nn.LayerNorm(given) if self.merges else nn.Identity())
            self.merges.append(nn.Conv2d(given, dim, PATCH, PATCH))
            self.stages.append(nn.Sequential(*(block(dim, i) for i in range(2))))
        self.norm, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], num_classes)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        x = x.permute(0, 2, 3, 1)
        for norm, merge, stage in zip(self.norms, self.merges, self.stages):
            x = stage(merge(norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.head(self.norm(x.mean((1, 2))))


def _convnext_block(dim: int, number: int) -> nn.Module:
    return ConvNeXtBlock(dim)


def _swin_block(dim: int, number: int) -> nn.Module:
    return SwinBlock(dim, heads=4, window=WINDOW, shift=WINDOW // 2 * (number % 2))


# Shrunk: three stages of two blocks, patches of 2 pixels; Swin's merging is a convolution, as ConvNeXt's is.
convnext = partial(Staged, CONVNEXT, _convnext_block)
swin = partial(Staged, SWIN, _swin_block)

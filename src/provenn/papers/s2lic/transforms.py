"""Blocks of S2LIC's transforms (arXiv:2403.14471): Swin V2 groups and the dense enhancement at full resolution."""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.arguments import check_whole
from provenn.nn.padding import PadToMultiple

Map = Float[Tensor, "batch channels height width"]
Out = Float[Tensor, "batch out height width"]


class DropPath(nn.Module):
    """Leaves out an example's branch with probability `rate` in training, and scales the others by 1/(1 − rate)."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class WindowAttention(nn.Module):
    """Scaled cosine attention in shifted windows, as in Swin V2 (Liu et al., 2022, equations 2 to 4).

    softmax(cos(q, k)·exp(min(s, ln 100)) + 16·σ(MLP(offset))), offset = sign(d)·log2(1 + 8|d|/(window − 1))/3

    Args:
        dim: number of channels, a multiple of `heads`.
        heads: number of heads.
        window: side of a window in positions.
        shift: how far the windows are moved, 0 for none.

    Shapes: (batch, height, width, dim) to the same; height and width are multiples of `window`.

    Raises:
        UserError: `dim` is no multiple of `heads`, or a side is no multiple of `window`.
    """

    offsets: Tensor
    index: Tensor

    def __init__(self, dim: int, heads: int, window: int = 8, shift: int = 0):
        super().__init__()
        if dim % heads:
            raise UserError(f"dim must be a multiple of heads, got {dim} and {heads}")
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        self.bias = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        self.out = nn.Linear(dim, dim)
        steps = torch.arange(1 - window, window).float()
        scaled = steps.sign() * torch.log2(1 + 8 * steps.abs() / max(window - 1, 1)) / 3
        self.register_buffer("offsets", torch.cartesian_prod(scaled, scaled), persistent=False)
        sites = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = sites[:, None] - sites[None] + window - 1
        self.register_buffer("index", apart[..., 0] * (2 * window - 1) + apart[..., 1], persistent=False)

    def logit_scale(self) -> Tensor:
        """The factor of each head's cosine, at most 100: (heads, 1, 1)."""
        return self.scale.clamp(max=math.log(100)).exp()

    def _windows(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        w = self.window
        x = x.view(batch, height // w, w, width // w, w, dim).transpose(2, 3)
        return x.reshape(batch, (height // w) * (width // w), w * w, dim)

    def _mask(self, height: int, width: int, device: torch.device) -> Tensor:
        """−100 between positions that only the cyclic shift made neighbours: (windows, 1, sites, sites)."""
        rows, columns = (_regions(size, self.window, self.shift, device) for size in (height, width))
        region = (3 * rows[:, None] + columns[None])[None, ..., None]
        region = self._windows(region)[0, ..., 0]
        return -100.0 * (region[:, None, :, None] != region[:, None, None, :])

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        batch, height, width, dim = x.shape
        w = self.window
        if height % w or width % w:
            raise UserError(f"the sides of a map must be multiples of the window {w}, got {height}×{width}")
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(self._windows(x), self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        # In half precision a small norm would vanish, and its gradient overflow.
        unit_q, unit_k = (F.normalize(m.float() if m.element_size() < 4 else m, dim=-1) for m in (q, k))
        logits = unit_q @ unit_k.transpose(-2, -1) * self.logit_scale()
        logits = logits + 16 * self.bias(self.offsets.to(self.qkv.weight.dtype))[self.index].permute(2, 0, 1).sigmoid()
        if self.shift:
            logits = logits + self._mask(height, width, x.device)
        y = self.out((logits.softmax(-1).to(v.dtype) @ v).transpose(2, 3).flatten(3))
        y = y.view(batch, height // w, width // w, w, w, dim).transpose(2, 3).reshape(batch, height, width, dim)
        return y.roll((self.shift, self.shift), (1, 2)) if self.shift else y


def _regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    at = torch.arange(size, device=device)
    return (at >= size - window).int() + (at >= size - shift).int()


class SwinV2Block(nn.Module):
    """A Swin V2 block with norms after its branches: x ← x + LN(attention(x)); x ← x + LN(MLP(x)).

    The released model imports it from code that was not published; the standard form is inferred.

    Args:
        dim: number of channels.
        heads: number of heads.
        window: side of a window.
        shift: how far the windows are moved.
        ratio: width of the MLP in units of `dim`.
        drop: probability of leaving out a branch.

    Shapes: (batch, height, width, dim) to the same.
    """

    def __init__(self, dim: int, heads: int, window: int = 8, shift: int = 0, ratio: float = 4, drop: float = 0.0):
        super().__init__()
        self.attention = WindowAttention(dim, heads, window, shift)
        hidden = int(dim * ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.norm1, self.norm2, self.drop = nn.LayerNorm(dim), nn.LayerNorm(dim), DropPath(drop)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        x = x + self.drop(self.norm1(self.attention(x)))
        return x + self.drop(self.norm2(self.mlp(x)))


class RS2TB(nn.Module):
    """Residual Swin V2 group: x + blocks(x), where every second block is shifted by half a window.

    Args:
        dim: number of channels.
        heads: number of heads.
        drops: probability of leaving out a branch, one for each block.
        window: side of a window.

    Shapes: (batch, dim, height, width) to the same; the sides are multiples of `window`.
    """

    def __init__(self, dim: int, heads: int, drops: Sequence[float] = (0.0,), window: int = 8):
        super().__init__()
        self.blocks = nn.Sequential(
            *(SwinV2Block(dim, heads, window, window // 2 * (i % 2), drop=drop) for i, drop in enumerate(drops))
        )

    def forward(self, x: Map) -> Map:
        return x + self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def padded_rs2tb(dim: int, heads: int = 4, *, depth: int = 2, window: int = 8) -> PadToMultiple:
    """An RS2TB for maps of any size, continued by their mirror image where a window is not full. Slot: map-mixer."""
    check_whole(dim=dim, heads=heads, depth=depth, window=window)
    if min(dim, heads, depth, window) < 1:
        raise ValueError(f"dim, heads, depth and window are at least 1, got {dim}, {heads}, {depth} and {window}")
    return PadToMultiple(RS2TB(dim, heads, (0.0,) * depth, window), window)


class DenseBlock(nn.Module):
    """Five 3×3 convolutions, each fed with the input and all earlier outputs; LeakyReLU 0.2 after the first four.

    The first four start Xavier-normal × 0.1 and the fifth at zero, as in InvCompress (inferred).

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        growth: channels that each of the first four adds.

    Shapes: (batch, inputs, height, width) to (batch, outputs, height, width).
    """

    def __init__(self, inputs: int, outputs: int, growth: int = 32):
        super().__init__()
        widths = [growth] * 4 + [outputs]
        self.convs = nn.ModuleList(nn.Conv2d(inputs + i * growth, w, 3, padding=1) for i, w in enumerate(widths))
        for conv in cast("list[nn.Conv2d]", list(self.convs)):
            nn.init.xavier_normal_(conv.weight)
            nn.init.zeros_(cast(Tensor, conv.bias))
            with torch.no_grad():
                conv.weight.mul_(0.1 if conv is not self.convs[-1] else 0.0)

    def forward(self, x: Map) -> Out:
        seen: Tensor = x
        for conv in list(self.convs)[:-1]:
            seen = torch.cat([seen, F.leaky_relu(conv(seen), 0.2)], 1)
        return self.convs[-1](seen)


class DenseEnhancement(nn.Module):
    """x + 0.2·body(x) at full resolution, the identity when it is new.

    body: dense block to `width`, conv1×1, conv3×3, conv1×1, dense block back.

    Args:
        channels: colours of a picture.
        width: channels inside.
        growth: growth of the dense blocks.

    Shapes: (batch, channels, height, width) to the same.
    """

    def __init__(self, channels: int = 3, width: int = 64, growth: int = 32):
        super().__init__()
        self.body = nn.Sequential(
            DenseBlock(channels, width, growth),
            nn.Conv2d(width, width, 1),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, width, 1),
            DenseBlock(width, channels, growth),
        )

    def forward(self, x: Map) -> Map:
        return x + 0.2 * self.body(x)

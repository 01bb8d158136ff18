"""What FALCON is compared with: other ways to compress a crop, and other ways for crops to see each other."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.attention import split_heads
from provenn.nn.towers import Attention, VisionConfig
from provenn.ops.softmax_attention import softmax_attention
from provenn.papers.falcon.layers import Counts, attend_jointly
from provenn.papers.falcon.model import Encoded, RegisterViT

Compressor = Callable[[Encoded], Tensor]


class Compressed(nn.Module):
    """A ViT whose crops do not see each other, and what makes a few tokens of each.

    Args:
        vit: with registers or without, and without ReAtten.
        compress: from what it encodes to (crops, few, dim).

    Shapes: as of `RegisterViT`.
    """

    def __init__(self, vit: RegisterViT, compress: nn.Module):
        super().__init__()
        self.vit, self.compress = vit, compress

    @property
    def dim(self) -> int:
        """Width of the tokens."""
        return self.vit.dim

    def forward(self, crops: Tensor, places: Int[Tensor, "crops 2"], counts: Counts) -> Float[Tensor, "crops few dim"]:
        """The tokens of each crop."""
        layers = getattr(self.compress, "reads_layers", False)
        return self.compress(self.vit.encode(crops, places, counts, layers=layers))


class KeepAll(nn.Module):
    """Every patch leaves the encoder."""

    def forward(self, encoded: Encoded) -> Float[Tensor, "crops patches dim"]:
        return encoded.patches


class Pooling(nn.Module):
    """The mean of each block of patches, side × side of them in all."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, encoded: Encoded) -> Float[Tensor, "crops few dim"]:
        return F.adaptive_avg_pool2d(_as_map(encoded.patches), self.side).flatten(2).mT


class PixelShuffle(nn.Module):
    """The patches of a block side by side, and a linear map of them; side × side blocks."""

    def __init__(self, dim: int, patches: int, side: int):
        super().__init__()
        self.block = math.isqrt(patches) // side
        self.linear = nn.Linear(dim * self.block**2, dim)

    def forward(self, encoded: Encoded) -> Float[Tensor, "crops few dim"]:
        return self.linear(F.pixel_unshuffle(_as_map(encoded.patches), self.block).flatten(2).mT)


def _as_map(patches: Float[Tensor, "crops patches dim"]) -> Float[Tensor, "crops dim rows columns"]:
    side = math.isqrt(patches.shape[1])
    return patches.mT.unflatten(2, (side, side))


class Abstractor(nn.Module):
    """Learned queries attend to the finished tokens: y ← y + attention(LN y, LN x); y ← y + MLP(LN y).

    Args:
        dim, heads: of the tokens.
        queries: how many tokens leave it.
    """

    def __init__(self, dim: int, heads: int, queries: int):
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(1, queries, dim))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm, self.norm_of_tokens, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, encoded: Encoded) -> Float[Tensor, "crops few dim"]:
        x = self.norm_of_tokens(torch.cat([encoded.patches, encoded.registers], dim=1))
        y = self.queries.expand(len(x), -1, -1)
        q, k, v = (
            split_heads(m(z), self.heads) for m, z in ((self.query, self.norm(y)), (self.key, x), (self.value, x))
        )
        y = y + self.out(softmax_attention(q, k, v).transpose(1, 2).flatten(2))
        return y + self.mlp(self.norm2(y))


class MostAttended(nn.Module):
    """The patches that the last layer attends to most, over heads and queries, in their order.

    Args:
        vit: whose last layer it is.
        count: patches of each crop that are kept.
    """

    reads_layers = True

    def __init__(self, vit: RegisterViT, count: int):
        super().__init__()
        self.last: tuple[Any, ...] = (vit.blocks[-1],)  # in a tuple, so that it is no child of two
        self.count = count

    def forward(self, encoded: Encoded) -> Float[Tensor, "crops few dim"]:
        (block,) = self.last
        x = block.layer_norm1(encoded.layers[-2])
        q, k = (
            split_heads(linear(x), block.self_attn.heads) for linear in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        share = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean((1, 2))[:, : encoded.patches.shape[1]]
        return _taken(encoded.patches, share.detach(), self.count)


class RandomPatches(nn.Module):
    """Random patches of each crop, others each time in training; in evaluation the same for each place in a batch."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, encoded: Encoded) -> Float[Tensor, "crops few dim"]:
        patches = encoded.patches
        generator = None if self.training else torch.Generator(patches.device).manual_seed(0)
        share = torch.rand(patches.shape[:2], generator=generator, device=patches.device)
        return _taken(patches, share, self.count)


def _taken(patches: Tensor, share: Float[Tensor, "crops patches"], count: int) -> Float[Tensor, "crops few dim"]:
    """The patches of the largest shares, in their order."""
    index = share.topk(count, dim=1).indices.sort(dim=1).values
    return patches.gather(1, index[..., None].expand(-1, -1, patches.shape[2]))


class OwnCrop(RegisterViT):
    """ReAtten's layers, within each crop alone: as many parameters, and no exchange."""

    def exchange(self, number: int, y: Tensor, counts: Counts) -> Tensor:
        return super().exchange(number, y, 1)


class AllTokens(RegisterViT):
    """ReAtten's layers over patches and registers of all crops; each crop's tokens carry a code of their own."""

    def __init__(self, config: VisionConfig, **options: Any):
        super().__init__(config, **options)
        self.code = nn.Embedding(self.registers.limit + 1, config.dim)

    def exchange(self, number: int, y: Tensor, counts: Counts) -> Tensor:
        if self.interact is None:
            return y
        each = [counts] * (len(y) // counts) if isinstance(counts, int) else counts
        order = torch.cat([torch.arange(count, device=y.device) for count in each])
        attention: Any = self.interact[number]
        return y + attend_jointly(attention.attention, y + self.code(order)[:, None], counts)


class ShiftedWindows(RegisterViT):
    """ReAtten's layers over windows of patches that are shifted by half a crop, so that neighbours meet in them.

    As in Swin, what the shift brings together from opposite ends of the image does not attend to each other. Registers
    see the patches of their own crop alone. All images have one grid, without the whole image.

    Args:
        config: of the ViT.
        grid: rows and columns of crops.
        options: of `RegisterViT`.
    """

    def __init__(self, config: VisionConfig, *, grid: tuple[int, int], **options: Any):
        super().__init__(config, **options)
        self.grid = grid

    def exchange(self, number: int, y: Tensor, counts: Counts) -> Tensor:
        if self.interact is None:
            return y
        rows, columns = self.grid
        if ({counts} if isinstance(counts, int) else {*counts}) != {rows * columns}:
            raise ValueError(f"expected {rows * columns} crops of each image, got {counts}")
        side = math.isqrt(self.count_before)
        patches, registers = y[:, : self.count_before], y[:, self.count_before :]
        whole = patches.unflatten(0, (-1, rows, columns)).unflatten(3, (side, side))
        whole = whole.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # images, rows · side, columns · side, dim
        shifted = whole.roll((-(side // 2), -(side // 2)), (1, 2))
        windows = shifted.unflatten(1, (rows, side)).unflatten(3, (columns, side)).transpose(2, 3).flatten(3, 4)
        seen = _meet(rows, columns, side, y.device).repeat(len(y) // (rows * columns), 1, 1)
        attention: Any = self.interact[number]
        told = _attend_where(attention.attention, windows.flatten(0, 2), seen)
        told = (
            told.unflatten(0, (-1, rows, columns))
            .unflatten(3, (side, side))
            .transpose(2, 3)
            .flatten(3, 4)
            .flatten(1, 2)
        )
        told = told.roll((side // 2, side // 2), (1, 2))
        told = told.unflatten(1, (rows, side)).unflatten(3, (columns, side)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        return torch.cat([patches + told, registers], dim=1)


def _meet(rows: int, columns: int, side: int, device: torch.device) -> Tensor:
    """Which patches of each shifted window lie together in the image, (windows, patches, patches)."""
    names = torch.zeros(rows * side, columns * side, dtype=torch.long, device=device)
    half = side // 2
    for axis, length in enumerate((rows * side, columns * side)):
        # After the roll the last half of the last window comes from the other end.
        wrapped = torch.arange(length, device=device) >= length - half
        names = names * 2 + (wrapped[:, None] if axis == 0 else wrapped[None]).long()
    windows = names.unflatten(0, (rows, side)).unflatten(2, (columns, side)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return windows[:, :, None] == windows[:, None, :]


def _attend_where(attention: Attention, x: Tensor, seen: Tensor) -> Tensor:
    """Attention within windows, where pairs of tokens may see each other."""
    q, k, v = (split_heads(m(x), attention.heads) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    return attention.out_proj(softmax_attention(q, k, v, mask=seen[:, None]).transpose(1, 2).flatten(2))

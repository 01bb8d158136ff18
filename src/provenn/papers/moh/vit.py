"""MoH-ViT: TransNeXt (Shi, 2024, arXiv:2311.17132) whose heads are weighed and chosen by the token (section 4.1).

Four stages at strides 4, 8, 16 and 32. In the first three a token attends, in one softmax, to the 3×3 tokens around it
and to a coarse 1/32 map of all; in the last, to all tokens. Queries and keys have length one, and positions enter by
biases that a small network makes of relative coordinates, so any image whose sides are multiples of 32 is taken.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.nn.attention import check_heads, split_heads
from provenn.nn.backbone import crop_features, pad_to_multiple
from provenn.ops.routed_heads import active_rows, cannot_count, put_back, routed_attention, take_rows
from provenn.ops.softmax_attention import softmax_attention
from provenn.papers.moh.layers import BALANCE, EXECUTIONS, HeadRouter, Routing, add_balance

WINDOW = 9  # tokens of the 3×3 neighbourhood
SHARPNESS = math.log(math.exp(1 / 0.24) - 1)  # softplus gives 1 / 0.24, the temperature that training starts at


def relative_coordinates(
    height: int, width: int, ratio: int, trained: int, like: Tensor
) -> tuple[Float[Tensor, "offsets 2"], Int[Tensor, "tokens pooled"]]:
    """All offsets from a token to the centre of a pooled one, on a logarithmic scale, and which pair has which.

    An offset r becomes sign(r) log₂(|r| + 1) / log₂ 8 after scaling to 8 over the side of the map.

    Args:
        height, width: of the map of tokens.
        ratio: side of the square that is pooled to one.
        trained: side of the map at the size of image that the weights were trained at.
        like: a tensor of the dtype and device of the coordinates.
    """
    axes, offsets, counts = [], [], []
    for side in (height, width):
        pooled = side // ratio
        # A token q and a pooled one j are q − (ratio · j + (ratio − 1) / 2) apart; counted from the least, an integer.
        least = ratio * (pooled - 1)
        token, other = torch.arange(side, device=like.device), torch.arange(pooled, device=like.device)
        offsets.append(token[:, None] - ratio * other + least)
        counts.append(side + least)
        offset = torch.arange(side + least, device=like.device) - least - (ratio - 1) / 2
        offset = offset.to(like.dtype) / max(trained - 1, 1) * 8
        axes.append(offset.sign() * (offset.abs() + 1).log2() / 3)
    table = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    index = offsets[0][:, None, :, None] * counts[1] + offsets[1][None, :, None, :]
    return table, index.flatten(2, 3).flatten(0, 1)


class HeadAttention(nn.Module):
    """What both attentions of the network have: maps, temperature, position network and router.

    Args:
        dim, heads, shared, top_k, balance: as in `provenn.papers.moh.layers.MoHAttention`.
        trained: side of the map of tokens at the image size that coordinates are scaled to.
        ratio: side of the squares of tokens whose mean is attended to; 1 attends to the tokens themselves.
        execute: "dense" computes every head, "gather" the chosen (token, head) pairs alone; "auto" is "dense" here.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        shared: int,
        top_k: int,
        *,
        trained: int,
        ratio: int = 1,
        balance: float | int = BALANCE,
        execute: str = "dense",
    ):
        super().__init__()
        check_heads(dim, heads)
        if execute not in EXECUTIONS:
            raise ValueError(f"execute must be one of {', '.join(EXECUTIONS)}, got {execute!r}")
        self.heads, self.ratio, self.trained, self.balance = heads, ratio, trained, balance
        self.gathers = execute == "gather" and top_k > 0
        self.router = HeadRouter(dim, heads, shared, top_k)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), SHARPNESS))
        self.query_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, 1, dim // heads), std=0.02))
        self.position1 = nn.Linear(2, 512)
        self.position2 = nn.Linear(512, heads)

    def _position_bias(self, height: int, width: int) -> Float[Tensor, "heads tokens pooled"]:
        table, index = relative_coordinates(height, width, self.ratio, self.trained, self.position1.weight)
        return self.position2(self.position1(table).relu()).T[:, index]

    def _scaled(self, q: Tensor, length: Tensor | float) -> Tensor:
        """(q + query embedding) · softplus(τ) · log(how many are attended to)."""
        return (q + self.query_embedding) * F.softplus(self.temperature) * length

    def _join(self, y: Tensor, routing: Routing) -> Tensor:
        """The heads' outputs, weighed by what the router makes of the tokens, through W_O."""
        if self.training:
            add_balance(routing, self.balance)
        weighed = y.transpose(1, 2) * routing.gates.unsqueeze(-1).to(y.dtype)
        return self.out(weighed.flatten(2))


class CosineAttention(HeadAttention):
    """Attention to all tokens by the cosine of queries and keys (the last stage).

    Args: as in `HeadAttention`, whose `ratio` stays 1.

    Shapes: (batch, height · width, dim) to the same.
    """

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], height: int, width: int
    ) -> Float[Tensor, "batch tokens dim"]:
        q, k = (F.normalize(split_heads(map(x), self.heads), dim=-1) for map in (self.query, self.key))
        q = self._scaled(q, math.log(height * width))
        bias = self._position_bias(height, width).to(q.dtype)
        v, routing = split_heads(self.value(x), self.heads), self.router(x)
        if self.gathers:
            active, always = routing.active.transpose(1, 2), self.router.shared
            y = routed_attention(q, k, v, active, always=always, bias=bias, scale=1.0)
        else:
            y = softmax_attention(q, k, v, mask=bias, scale=1.0)
        return self._join(y, routing)


class AggregatedAttention(HeadAttention):
    """Attention to the 3×3 neighbourhood and to a pooled map, under one softmax (TransNeXt, section 3.3).

    The weights of the neighbourhood gain a term that depends on the query alone, q̂ · T + b, after the softmax.

    Args:
        dim, heads, shared, top_k, options: as in `HeadAttention`.

    Shapes: (batch, height · width, dim) to the same; `ratio` divides both sides.
    """

    def __init__(self, dim: int, heads: int, shared: int, top_k: int, **options: Any):
        super().__init__(dim, heads, shared, top_k, **options)
        self.reduce = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.local_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, WINDOW), std=4e-4))
        self.local_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, dim // heads, WINDOW), std=0.02))
        self.local_shift = nn.Parameter(torch.zeros(heads, 1, WINDOW))

    def _neighbours(self, x: Tensor, height: int, width: int) -> Float[Tensor, "batch heads tokens dim 9"]:
        """The 3×3 tokens around each, zeros beyond the border; `x` is (batch, heads, tokens, dim)."""
        image = x.transpose(2, 3).flatten(1, 2).unflatten(-1, (height, width))
        return F.unfold(image, 3, padding=1).unflatten(1, (x.shape[1], -1, WINDOW)).permute(0, 1, 4, 2, 3)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], height: int, width: int
    ) -> Float[Tensor, "batch tokens dim"]:
        inside = F.unfold(x.new_ones(1, 1, height, width), 3, padding=1)[0].T  # (tokens, 9): 0 beyond the border
        image = x.transpose(1, 2).unflatten(-1, (height, width))
        pooled = F.avg_pool2d(F.gelu(self.reduce(image)), self.ratio).flatten(2).transpose(1, 2)
        pooled = self.norm(pooled)

        q = F.normalize(split_heads(self.query(x), self.heads), dim=-1)
        length = (inside.sum(-1, keepdim=True) + pooled.shape[1]).log()
        scaled = self._scaled(q, length)
        k, v = (split_heads(m(x), self.heads) for m in (self.key, self.value))
        k = F.normalize(k, dim=-1)
        far_k, far_v = (split_heads(m(pooled), self.heads) for m in (self.key, self.value))
        far_k = F.normalize(far_k, dim=-1)
        bias = self._position_bias(height, width)
        routing, every = self.router(x), slice(None)
        if not self.gathers or cannot_count(x):
            near_k, near_v = self._neighbours(k, height, width), self._neighbours(v, height, width)
            return self._join(self._attend(q, scaled, (near_k, near_v), (far_k, far_v), bias, inside, every), routing)

        # The same for the shared heads, and for the rows of queries that use each of the others.
        first, rest = slice(self.router.shared), slice(self.router.shared, None)
        parts = []
        if self.router.shared:
            near_k, near_v = self._neighbours(k[:, first], height, width), self._neighbours(v[:, first], height, width)
            far = far_k[:, first], far_v[:, first]
            parts.append(self._attend(q[:, first], scaled[:, first], (near_k, near_v), far, bias[first], inside, first))
        order, real = active_rows(routing.active[..., rest].transpose(1, 2))
        # The 9 neighbours of each row's token; beyond the border token 0 stands in, whose weight and value become 0.
        positions = torch.arange(height * width, dtype=torch.float32, device=x.device).view(1, 1, height, width)
        around = F.unfold(positions, 3, padding=1)[0].T.long()[order].flatten(2)
        within = inside[order]
        near_k, near_v = (take_rows(part[:, rest], around).unflatten(2, (-1, WINDOW)).mT for part in (k, v))
        near_v = near_v * within.unsqueeze(-2)
        q, scaled = take_rows(q[:, rest], order), take_rows(scaled[:, rest], order)
        bias = take_rows(bias[rest].expand(len(x), -1, -1, -1), order)
        far = far_k[:, rest], far_v[:, rest]
        y = self._attend(q, scaled, (near_k, near_v), far, bias, within, rest)
        return self._join(torch.cat([*parts, put_back(y, order, real, x.shape[1])], dim=1), routing)

    def _attend(
        self,
        q: Float[Tensor, "batch heads rows dim"],
        scaled: Float[Tensor, "batch heads rows dim"],
        near: tuple[Float[Tensor, "batch heads rows dim 9"], Float[Tensor, "batch heads rows dim 9"]],
        far: tuple[Float[Tensor, "batch heads pooled dim"], Float[Tensor, "batch heads pooled dim"]],
        bias: Float[Tensor, "*batch_heads rows pooled"],
        inside: Float[Tensor, "*batch_heads_too rows 9"],
        heads: slice,
    ) -> Float[Tensor, "batch heads rows dim"]:
        """Of some heads, for some queries: one softmax over 9 neighbours and the pooled map, (k, v) of each."""
        (near_k, near_v), (far_k, far_v) = near, far
        neighbours = (scaled.unsqueeze(-2) @ near_k).squeeze(-2) + self.local_bias[heads].unsqueeze(1)
        neighbours = neighbours.masked_fill(inside == 0, -torch.inf)
        pooled = scaled @ far_k.mT + bias
        weights = torch.cat([neighbours, pooled], dim=-1).softmax(dim=-1)
        neighbours, pooled = weights.split([WINDOW, pooled.shape[-1]], dim=-1)
        neighbours = neighbours + q @ self.local_tokens[heads] + self.local_shift[heads]
        return (neighbours.unsqueeze(-2) @ near_v.mT).squeeze(-2) + pooled @ far_v


class ConvGLU(nn.Module):
    """GELU(dwconv(a)) ⊙ v with a, v the halves of W₁ x, through W₂ (TransNeXt, section 3.4).

    Args:
        dim: width of a token.
        hidden: width of a half; 2/3 of an ordinary feed-forward part's.

    Shapes: (batch, height · width, dim) to the same.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, 2 * hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], height: int, width: int
    ) -> Float[Tensor, "batch tokens dim"]:
        a, v = self.linear1(x).chunk(2, dim=-1)
        a = self.conv(a.transpose(1, 2).unflatten(-1, (height, width))).flatten(2).transpose(1, 2)
        return self.linear2(F.gelu(a) * v)


class Block(nn.Module):
    """x ← x + attention(norm(x)); x ← x + ConvGLU(norm(x)).

    Args:
        attention: of `dim` wide tokens.
        hidden: of the ConvGLU.
        drop_path: probability with which a branch of an example is left out while training.
    """

    def __init__(self, dim: int, attention: HeadAttention, hidden: int, drop_path: float | int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.feedforward = ConvGLU(dim, hidden)
        self.drop = nn.Dropout(drop_path)

    def _keep(self, branch: Tensor) -> Tensor:
        return branch * self.drop(branch.new_ones(branch.shape[0], 1, 1))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], height: int, width: int
    ) -> Float[Tensor, "batch tokens dim"]:
        x = x + self._keep(self.attention(self.norm1(x), height, width))
        return x + self._keep(self.feedforward(self.norm2(x), height, width))


class MoHViT(nn.Module):
    """TransNeXt with routed heads.

    Args:
        dims, heads, depths, ratios: width, heads, blocks and feed-forward ratio of each stage.
        shared, top_k: h_s and K of each stage; K = 0 where all heads are shared, which are weighed all the same.
        num_classes: logits; 0 leaves the classifier out, and `forward` gives the mean of the last map.
        in_channels: of the image.
        size: side of the square images that the weights are trained at; coordinates are scaled to it.
        drop_path: of the last block, rising linearly from 0.
        balance: β of the load-balance loss.
        execute: as in `HeadAttention`, of the stages that route heads.

    Shapes: (batch, in_channels, height, width), sides multiples of 32, to (batch, num_classes). It is a
    `provenn.nn.backbone.Backbone`.
    """

    def __init__(
        self,
        *,
        dims: Sequence[int],
        heads: Sequence[int],
        depths: Sequence[int],
        shared: Sequence[int],
        top_k: Sequence[int],
        ratios: Sequence[int] = (8, 8, 4, 4),
        num_classes: int = 1000,
        in_channels: int = 3,
        size: int = 224,
        drop_path: float | int = 0.0,
        balance: float | int = BALANCE,
        execute: str = "dense",
    ):
        super().__init__()
        if not {len(dims)} == {len(each) for each in (heads, depths, shared, top_k, ratios)}:
            raise ValueError("dims, heads, depths, shared, top_k and ratios must have one entry for each stage")
        if min(*dims, *depths, in_channels) < 1 or num_classes < 0:
            raise ValueError(
                "dims, depths and in_channels must be at least 1 and num_classes at least 0, got "
                f"{dims}, {depths}, {in_channels} and {num_classes}"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        if size < 32 or size % 32:
            raise ValueError(f"size must be a multiple of 32, got {size}")
        rates = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        self.embeds, self.stages, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        last, channels = len(dims) - 1, in_channels
        for i, dim in enumerate(dims):
            stride, kernel = (4, 7) if i == 0 else (2, 3)
            self.embeds.append(nn.Conv2d(channels, dim, kernel, stride, kernel // 2))
            self.embeds.append(nn.LayerNorm(dim))
            side, pool = size // 2 ** (i + 2), 2 ** (last - i)
            blocks = []
            for _ in range(depths[i]):
                options: dict[str, Any] = {"trained": side, "balance": balance, "execute": execute}
                routed = heads[i], shared[i], top_k[i]
                attention = (
                    CosineAttention(dim, *routed, **options)
                    if i == last
                    else AggregatedAttention(dim, *routed, ratio=pool, **options)
                )
                blocks.append(Block(dim, attention, 2 * ratios[i] * dim // 3, rates.pop(0)))
            self.stages.append(nn.ModuleList(blocks))
            self.norms.append(nn.LayerNorm(dim, eps=1e-6))
            channels = dim
        self.strides, self.widths = [4 * 2**i for i in range(len(dims))], list(dims)
        self.head = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
            elif isinstance(part, nn.Conv2d):
                fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
                nn.init.normal_(part.weight, std=math.sqrt(2 / fan_out))
            if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None:
                nn.init.zeros_(part.bias)

    def _run(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """Normalised tokens of each stage, (batch, height, width, dim); sides are multiples of 32."""
        if x.shape[1] != self.embeds[0].in_channels:
            raise ValueError(f"expected images of {self.embeds[0].in_channels} channels, got {x.shape[1]}")
        maps = []
        for i, (blocks, norm) in enumerate(zip(self.stages, self.norms)):
            x = self.embeds[2 * i](x)
            height, width = x.shape[2:]
            x = self.embeds[2 * i + 1](x.flatten(2).transpose(1, 2))
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, height, width)
            maps.append(norm(x).unflatten(1, (height, width)))
            x = maps[-1].permute(0, 3, 1, 2)
        return maps

    def features(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The map of each stage, from fine to coarse; other sides than multiples of 32 are filled up with zeros."""
        maps = [tokens.permute(0, 3, 1, 2) for tokens in self._run(pad_to_multiple(x, 32))]
        return crop_features(maps, self.strides, (x.shape[2], x.shape[3]))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        if min(x.shape[2:]) < 32 or x.shape[2] % 32 or x.shape[3] % 32:
            raise ValueError(f"the sides of an image must be multiples of 32, got {x.shape[2]} x {x.shape[3]}")
        return self.head(self._run(x)[-1].mean(dim=(1, 2)))


SMALL: dict[str, Any] = {"dims": (72, 144, 288, 576), "heads": (3, 6, 12, 24), "depths": (5, 5, 22, 5)}
BASE: dict[str, Any] = {"dims": (96, 192, 384, 768), "heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)}


def moh_vit_small_80(**options: Any) -> MoHViT:
    """MoH-ViT-S with 80 % of the heads in use: 49,910,548 parameters."""
    return MoHViT(**SMALL, shared=(3, 6, 3, 8), top_k=(0, 0, 6, 12), **options)


def moh_vit_small_75(**options: Any) -> MoHViT:
    """MoH-ViT-S with 75 % of the heads in use: 49,910,548 parameters."""
    return MoHViT(**SMALL, shared=(3, 6, 3, 4), top_k=(0, 0, 6, 12), **options)


def moh_vit_base_75(**options: Any) -> MoHViT:
    """MoH-ViT-B with 75 % of the heads in use: 90,020,632 parameters."""
    return MoHViT(**BASE, shared=(4, 8, 4, 5), top_k=(0, 0, 8, 16), **options)


def moh_vit_base_50(**options: Any) -> MoHViT:
    """MoH-ViT-B with 50 % of the heads in use: 90,023,512 parameters."""
    return MoHViT(**BASE, shared=(2, 2, 2, 4), top_k=(2, 4, 6, 8), **options)


PRESETS = {
    "moh_vit_small_80": moh_vit_small_80,
    "moh_vit_small_75": moh_vit_small_75,
    "moh_vit_base_75": moh_vit_base_75,
    "moh_vit_base_50": moh_vit_base_50,
}

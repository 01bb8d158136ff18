"""What Wings is compared with: low-rank additions to a frozen decoder, and learned keys and values before its text."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.attention import KVCache
from provenn.nn.decoder import Context, Decoder, DecoderAttention
from provenn.ops.softmax_attention import softmax_attention

MAPS = ("query", "key", "value", "out")


class LowRank(nn.Module):
    """W x + B A x with W frozen, A drawn and B zero (LoRA; Hu et al., 2021, arXiv:2106.09685, with α = r)."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)


def add_low_rank(decoder: Decoder, rank: int) -> None:
    """LoRA on queries, keys, values and outputs of every layer, in place."""
    for block in decoder.blocks:
        for name in MAPS:
            setattr(block.attention, name, LowRank(getattr(block.attention, name), rank))


class PrefixAttention(nn.Module):
    """Attention with learned keys and values before the text (Li and Liang, 2021, arXiv:2101.00190), without a cache.

    Args:
        attention: whose maps it takes over, frozen.
        count: how many keys and values.
    """

    def __init__(self, attention: DecoderAttention, count: int):
        super().__init__()
        self.attention = attention.requires_grad_(False)
        shape = (attention.kv_heads, count, attention.head_dim)
        self.keys, self.values = (nn.Parameter(0.02 * torch.randn(shape)) for _ in range(2))
        self.query, self.key, self.heads, self.kv_heads = (
            attention.query,
            attention.key,
            attention.heads,
            attention.kv_heads,
        )
        self.head_dim = attention.head_dim

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], context: Context, cache: KVCache | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], None]:
        if cache is not None:
            raise ValueError("prefix tuning is compared on whole texts, and keeps no cache")
        q, k, v = self.attention.project(x, context)
        k, v = (
            torch.cat([learned.expand(len(x), -1, -1, -1), part], dim=2)
            for learned, part in ((self.keys, k), (self.values, v))
        )
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        count = self.keys.shape[1]
        mask = torch.ones(x.shape[1], k.shape[2], dtype=torch.bool, device=x.device).tril(count)
        y = softmax_attention(q, k, v, mask=mask)
        return self.attention.out(y.transpose(1, 2).flatten(2)), None

    def weights(self, x: Tensor, context: Context, rows: Tensor) -> Float[Tensor, "batch heads queries tokens"]:
        """Of the attention without its prefix, for the shift of attention."""
        return self.attention.weights(x, context, rows)


def add_prefix(decoder: Decoder, count: int) -> None:
    """Learned keys and values in every layer, in place."""
    for block in decoder.blocks:
        block.attention = PrefixAttention(block.attention, count)


def added_parameters(decoder: Decoder) -> list[nn.Parameter]:
    """What the two added."""
    parts = [part for part in decoder.modules() if isinstance(part, LowRank | PrefixAttention)]
    return [p for part in parts for name, p in part.named_parameters(recurse=False)]

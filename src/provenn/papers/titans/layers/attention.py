"""Windowed attention beside persistent tokens: what the three hybrids share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.nn.attention import check_heads
from provenn.nn.positions import rotate


class AttentionCache(NamedTuple):
    """Keys and values of the last window − 1 tokens, of each its `kinds` vectors, and which may be attended."""

    keys: Float[Tensor, "batch heads reach kinds width"]
    values: Float[Tensor, "batch heads reach kinds width"]
    seen: Bool[Tensor, "batch reach kinds"]


def _append(cache: AttentionCache, keys: Tensor, values: Tensor, seen: Tensor) -> AttentionCache:
    k, v = torch.cat([cache.keys, keys], dim=2), torch.cat([cache.values, values], dim=2)
    return AttentionCache(k, v, torch.cat([cache.seen, seen], dim=1))


def _last(cache: AttentionCache, count: int) -> AttentionCache:
    """The last `count` tokens; where there are fewer, unseen ones before them."""
    start = cache.seen.shape[1] - count
    room = max(0, -start)
    k, v = (F.pad(part, (0, 0, 0, 0, room, 0))[:, :, max(0, start) :] for part in (cache.keys, cache.values))
    return AttentionCache(k, v, F.pad(cache.seen, (0, 0, room, 0))[:, max(0, start) :])


class PrefixAttention(nn.Module):
    """Softmax attention of a token to persistent tokens and to the last `window` tokens, each of `kinds` vectors.

    A window's keys are turned by their distance (rotary positions); persistent tokens stand nowhere, and are as near to
    every token. No map has a bias.

    Args:
        dim: D, width of a token.
        heads: attention heads; must divide `dim`, into an even width.
        window: tokens that a token sees, the own one included.
        kinds: vectors that a token brings to be attended: 1 for itself, 2 with what the memory recalls of it.
    """

    def __init__(self, dim: int, heads: int, window: int, kinds: int = 1):
        check_whole(dim=dim, heads=heads, window=window, kinds=kinds)
        super().__init__()
        check_heads(dim, heads, rotary=True)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.dim, self.heads, self.window, self.kinds = dim, heads, window, kinds
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def init_state(self, batch: int) -> AttentionCache:
        """A window before its first token."""
        keys = self.out.weight.new_zeros(batch, self.heads, 0, self.kinds, self.dim // self.heads)
        seen = torch.zeros(batch, 0, self.kinds, dtype=torch.bool, device=keys.device)
        return _last(AttentionCache(keys, keys, seen), self.window - 1)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        context: Sequence[Float[Tensor, "batch tokens dim"]],
        prefix: Float[Tensor, "batch persistent dim"],
        cache: AttentionCache | None = None,
        *,
        mask: Bool[Tensor, "batch tokens #kinds"] | None = None,
        ahead: int = 0,
    ) -> tuple[Float[Tensor, "batch tokens dim"], AttentionCache]:
        """Attend from x to `context`, its `kinds` vectors a token; what `cache` holds comes before.

        Args:
            mask: True where a token may be attended, or each of its kinds.
            ahead: how many of the first kinds are visible at later tokens of the call too, which is not causal.
        """
        tokens, window = x.shape[1], self.window
        block = min(tokens, window)
        blocks = -(-tokens // block)
        before = self.init_state(x.shape[0]) if cache is None else cache
        if cache is None and blocks == 1:
            before = _last(before, 0)  # no need to look at room for what never came
        reach = before.seen.shape[1]
        q = self._heads(self.query(x))
        both = torch.stack(list(context), dim=2)
        if mask is not None:
            both = both.masked_fill(~mask[..., None], 0)  # padding may hold anything, and 0 times NaN is NaN
        k, v = (m(both).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4) for m in (self.key, self.value))
        now = torch.ones_like(x[..., :1], dtype=torch.bool) if mask is None else mask
        now = now.expand(-1, -1, self.kinds)
        k, v, seen = known = _append(before, k, v, now)

        # Blocks of queries see their own keys and the window before them: stretches that overlap.
        room = blocks * block - tokens
        wide_q = F.pad(q, (0, 0, 0, room)).unflatten(2, (blocks, block))
        wide_k, wide_v = (
            F.pad(part, (0, 0, 0, 0, 0, room)).unfold(2, reach + block, block).movedim(-1, 3) for part in (k, v)
        )
        positions = torch.arange(reach + block, device=x.device)
        distance = positions[reach:, None] - positions
        near = (distance < window).unsqueeze(-1) & (
            (distance >= 0).unsqueeze(-1) | (torch.arange(self.kinds, device=x.device) < ahead)
        )
        # (batch, 1, blocks, 1, reach + block, kinds), and which of them lie in the window of each query.
        may = F.pad(seen, (0, 0, 0, room)).unfold(1, reach + block, block).mT[:, None, :, None] & near

        turned_q = rotate(wide_q, positions[reach:])
        turned_k = rotate(wide_k.transpose(3, 4), positions).transpose(3, 4).flatten(3, 4)
        scores = turned_q @ turned_k.mT
        scores = scores.masked_fill(~may.flatten(-2), torch.finfo(scores.dtype).min)
        fixed_k, fixed_v = (self._heads(m(prefix)).unsqueeze(2) for m in (self.key, self.value))
        scores = torch.cat([wide_q @ fixed_k.mT, scores], dim=-1) * (self.dim // self.heads) ** -0.5
        exact = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.to(exact).softmax(dim=-1).to(scores.dtype).split([prefix.shape[1], turned_k.shape[3]], dim=-1)
        y = weights[0] @ fixed_v + weights[1] @ wide_v.flatten(3, 4)
        y = y.flatten(2, 3)[:, :, :tokens].transpose(1, 2).flatten(2)
        return self.out(y), _last(known, window - 1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

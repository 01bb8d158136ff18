"""Masks as slices, and softmax attention over some of them, with what its backward pass needs.

A slice is a rectangle of the score matrix or a triangle of one. What a process of a ring computes with the keys of
another, what a query chunk does with all keys, what a head does with all tokens: each is a list of slices.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import at_least_single
from provenn.ops.softmax_merge import merge_

FULL, CAUSAL, INVERSE_CAUSAL, BI_CAUSAL = "full", "causal", "inverse_causal", "bi_causal"
KINDS = (FULL, CAUSAL, INVERSE_CAUSAL, BI_CAUSAL)
MOST_SCORES = 2**22  # held at a time


class Slice(NamedTuple):
    """Scores that a mask keeps: rows [q_start, q_end) by columns [k_start, k_end), all of them or a part.

    There are a rows x and b columns y. The `kind` says which scores are kept:

    - full: all of them.
    - causal: those where y ≤ x + b − a, a triangle in the lower right corner.
    - inverse_causal: those where y ≥ x, a triangle in the upper left corner.
    - bi_causal: those where both hold, a band.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    kind: str = FULL

    @property
    def area(self) -> int:
        """How many scores it keeps."""
        a, b = self.q_end - self.q_start, self.k_end - self.k_start
        if self.kind == FULL:
            return a * b
        if self.kind == BI_CAUSAL:
            return a * max(0, b - a + 1)
        rows = min(a, b)
        return rows * (2 * b - rows + 1) // 2

    def bounds(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """For queries of it, the first key that each sees and the one after its last; equal where it sees none."""
        first, last = torch.full_like(rows, self.k_start), torch.full_like(rows, self.k_end)
        if self.kind in (INVERSE_CAUSAL, BI_CAUSAL):
            first = (first + rows - self.q_start).clamp(max=self.k_end)
        if self.kind in (CAUSAL, BI_CAUSAL):
            last = last - (self.q_end - 1 - rows)
        return first, torch.maximum(last, first)

    def columns(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """For keys of it, the first query that sees each and the one after the last; equal where none does."""
        first, last = torch.full_like(keys, self.q_start), torch.full_like(keys, self.q_end)
        if self.kind in (CAUSAL, BI_CAUSAL):
            first = (keys - self.k_end + self.q_end).clamp(self.q_start, self.q_end)
        if self.kind in (INVERSE_CAUSAL, BI_CAUSAL):
            last = (keys - self.k_start + self.q_start + 1).clamp(max=self.q_end)
        return first, torch.maximum(last, first)

    def rows(self, start: int, end: int) -> "Slice | None":
        """The part in rows [start, end), with no column that none of these sees; None where nothing is left."""
        q_start, q_end, k_start, k_end, kind = self
        start, end = max(start, q_start), min(end, q_end)
        if kind in (CAUSAL, BI_CAUSAL):
            k_end -= q_end - end
        if kind in (INVERSE_CAUSAL, BI_CAUSAL):
            k_start += start - q_start
        width = k_end - k_start
        # Rows that see nothing: the first ones of a tall causal triangle, the last ones of an inverse one.
        if kind == CAUSAL:
            start = max(start, end - width)
        elif kind == INVERSE_CAUSAL:
            end = min(end, start + width)
        if end <= start or width < (end - start if kind == BI_CAUSAL else 1):
            return None
        return Slice(start, end, k_start, k_end, kind)

    def moved(self, rows: int = 0, columns: int = 0) -> "Slice":
        """The same part of a score matrix with so many rows and columns more before it."""
        return Slice(self.q_start + rows, self.q_end + rows, self.k_start + columns, self.k_end + columns, self.kind)


class Tile(NamedTuple):
    """Slices of one shape and kind whose rows do not overlap: they are computed as a batch."""

    q_starts: tuple[int, ...]
    k_starts: tuple[int, ...]
    rows: int
    columns: int
    kind: str


@lru_cache(maxsize=512)
def tiles(slices: tuple[Slice, ...], most: int) -> tuple[Tile, ...]:
    """The slices cut into rows of at most `most` scores, those of a shape together."""
    shapes: dict[tuple[int, int, str], list[Slice]] = defaultdict(list)
    for whole in slices:
        step = max(1, most // max(1, whole.k_end - whole.k_start))
        for start in range(whole.q_start, whole.q_end, step):
            part = whole.rows(start, start + step)
            if part is not None:
                shapes[part.q_end - part.q_start, part.k_end - part.k_start, part.kind].append(part)
    found = []
    for (rows, columns, kind), parts in shapes.items():
        room = max(1, most // (rows * columns))
        batches: list[list[Slice]] = []
        for part in sorted(parts):
            for batch in batches:
                if batch[-1].q_end <= part.q_start and len(batch) < room:
                    batch.append(part)
                    break
            else:
                batches.append([part])
        found += [
            Tile(tuple(part.q_start for part in batch), tuple(part.k_start for part in batch), rows, columns, kind)
            for batch in batches
        ]
    return tuple(found)


def _hidden(tile: Tile, device: torch.device) -> Tensor | None:
    """(rows, columns), True where the tile's slices keep no score."""
    if tile.kind == FULL:
        return None
    x, y = (torch.arange(size, device=device) for size in (tile.rows, tile.columns))
    late = y > x[:, None] + (tile.columns - tile.rows)
    early = y < x[:, None]
    return {CAUSAL: late, INVERSE_CAUSAL: early, BI_CAUSAL: late | early}[tile.kind]


def _row_index(starts: tuple[int, ...], size: int, device: torch.device) -> slice | Tensor:
    """Rows from each start on: a slice where there is one, which gives views, else indices (starts · size)."""
    if len(starts) == 1:
        return slice(starts[0], starts[0] + size)
    return (torch.tensor(starts, device=device)[:, None] + torch.arange(size, device=device)).flatten()


class Inputs(NamedTuple):
    """What attention is computed of; heads of queries may be a multiple of those of keys: neighbours share one."""

    q: Float[Tensor, "queries heads dim"]
    k: Float[Tensor, "keys kv_heads dim"]
    v: Float[Tensor, "keys kv_heads width"]
    scale: float  # of the scores


class Rows(NamedTuple):
    """What the gradient of each row of scores needs, of the softmax over all that the row sees.

    Args:
        grad: dO, of the output.
        lse: ℓ, the log of the sum of exponentials.
        delta: D = Σ_d dO ∘ O.
    """

    grad: Float[Tensor, "queries heads width"]
    lse: Float[Tensor, "queries heads"]
    delta: Float[Tensor, "queries heads"]


class Partial:
    """Softmax attention to the keys that were seen so far, to be joined with more: in float32 at least.

    Args:
        q: the queries, (tokens, heads, dim).
    """

    def __init__(self, q: Float[Tensor, "tokens heads dim"], width: int):
        accurate = torch.promote_types(q.dtype, torch.float32)
        self.output = q.new_zeros(*q.shape[:2], width, dtype=accurate)
        self.lse = q.new_full(q.shape[:2], -torch.inf, dtype=accurate)

    def join(self, index: "slice | Tensor", output: Tensor, lse: Tensor) -> None:
        """ℓ ← ℓ − log σ(ℓ − ℓ'), o ← o − σ(ℓ' − ℓ) (o − o'), in some rows; −∞ on both sides stays −∞."""
        before = self.output[index]  # a view of a slice, a copy of indexed rows
        after = merge_(before, self.lse[index], output, lse)
        if isinstance(index, Tensor):
            self.output[index] = before
        self.lse[index] = after


def attend(inputs: Inputs, slices: Sequence[Slice], into: Partial | None = None) -> Partial:
    """softmax over the kept scores of q·k · scale, times v, with the log of the sum of exponentials of each row.

    Args:
        slices: what is kept; no two overlap.
        into: attention to other keys, which this is joined with in place.
    """
    q, k, v, scale = inputs
    partial = Partial(q, v.shape[-1]) if into is None else into
    heads, kv_heads = q.shape[1], k.shape[1]
    for tile in tiles(tuple(slices), MOST_SCORES // heads):
        count = len(tile.q_starts)
        here, columns = (
            _row_index(tile.q_starts, tile.rows, q.device),
            _row_index(tile.k_starts, tile.columns, k.device),
        )
        queries = at_least_single(q[here]).unflatten(1, (kv_heads, -1)).unflatten(0, (count, -1))
        keys, values = (at_least_single(x[columns]).unflatten(0, (count, -1)) for x in (k, v))
        scores = torch.einsum("nahgd,nbhd->nhgab", queries * scale, keys)
        hidden = _hidden(tile, q.device)
        if hidden is not None:
            scores = scores.masked_fill_(hidden, -torch.inf)
        lse = scores.logsumexp(-1)  # every row of a tile sees a key
        output = torch.einsum("nhgab,nbhd->nahgd", scores.sub_(lse.unsqueeze(-1)).exp_(), values)
        partial.join(here, output.flatten(0, 1).flatten(1, 2), lse.permute(0, 3, 1, 2).flatten(0, 1).flatten(1))
    return partial


def attend_backward(
    inputs: Inputs, rows: Rows, slices: Sequence[Slice], grad_q: Float[Tensor, "queries heads dim"]
) -> tuple[Float[Tensor, "keys kv_heads dim"], Float[Tensor, "keys kv_heads width"]]:
    """What these slices add to the gradients: of the queries in place, of keys and values as a result.

    P = exp(q·k · scale − ℓ), dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − D) · scale, dQ += dS K, dK = dSᵀ Q.

    Args:
        rows: over all slices, of which these may be some.
        grad_q: dQ, in float32 at least.
    """
    q, k, v, scale = inputs
    grad, lse, delta = rows
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=grad_q.dtype) for x in (k, v))
    heads, kv_heads = q.shape[1], k.shape[1]
    for tile in tiles(tuple(slices), MOST_SCORES // heads):
        count = len(tile.q_starts)
        here, columns = (
            _row_index(tile.q_starts, tile.rows, q.device),
            _row_index(tile.k_starts, tile.columns, k.device),
        )
        queries, grads = (
            at_least_single(x[here]).unflatten(1, (kv_heads, -1)).unflatten(0, (count, -1)) for x in (q, grad)
        )
        keys, values = (at_least_single(x[columns]).unflatten(0, (count, -1)) for x in (k, v))
        # (count, kv_heads, group, rows, 1)
        row_lse, row_delta = (
            x[here].unflatten(1, (kv_heads, -1)).unflatten(0, (count, -1)).permute(0, 2, 3, 1).unsqueeze(-1)
            for x in (lse, delta)
        )
        weights = torch.einsum("nahgd,nbhd->nhgab", queries * scale, keys).sub_(row_lse).exp_()
        hidden = _hidden(tile, q.device)
        if hidden is not None:
            weights = weights.masked_fill_(hidden, 0)
        part_v = torch.einsum("nhgab,nahgd->nbhd", weights, grads)
        slope = torch.einsum("nahgd,nbhd->nhgab", grads, values).sub_(row_delta).mul_(weights).mul_(scale)
        part_q = torch.einsum("nhgab,nbhd->nahgd", slope, keys).flatten(0, 1).flatten(1, 2)
        part_k = torch.einsum("nhgab,nahgd->nbhd", slope, queries)
        _add(grad_q, here, part_q)
        _add(grad_k, columns, part_k.flatten(0, 1))
        _add(grad_v, columns, part_v.flatten(0, 1))
    return grad_k, grad_v


def _add(total: Tensor, index: "slice | Tensor", part: Tensor) -> None:
    if isinstance(index, Tensor):
        total.index_add_(0, index, part)
    else:
        total[index] += part


def area(slices: Iterable[Slice]) -> int:
    """How many scores are kept in all."""
    return sum(part.area for part in slices)

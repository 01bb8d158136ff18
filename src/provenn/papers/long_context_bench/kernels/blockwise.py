"""Blockwise attention in plain torch, driven by slices: blocks that the mask leaves out are never computed.

Memory is linear in the tokens: the output, a log-sum-exp a query, and one block of scores. Sums are kept in float32 at
least. Forward over the blocks of a query, with the running maximum m:

    m' = max(m, max_j s_j),  l ← e^(m − m') l + Σ_j e^(s_j − m'),  o ← e^(m − m') o + Σ_j e^(s_j − m') v_j

Backward with P = e^(s − lse) and D = Σ_d dO · O:  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ − D),  dQ = dS K,  dK = dSᵀ Q.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from provenn.core.narrowing import of_kind
from provenn.distributed.slices import Slice
from provenn.ops.autograd import (
    at_least_single,
    backward_without_autocast,
    is_differentiated,
    is_transformed,
    plain_gradients,
    without_autocast,
)
from provenn.ops.softmax_merge import merge_
from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel, reference
from provenn.papers.long_context_bench.masks import Mask

ROWS, KEYS = 256, 1024  # of one block of scores


class Piece(NamedTuple):
    """Keys k[0] … k[1] − 1 for a block of queries; `visible` says which of the pairs are kept, None is all."""

    k: tuple[int, int]
    visible: Tensor | None


class Block(NamedTuple):
    """Queries q[0] … q[1] − 1 and the keys of one slice that they see; `again`: another slice came before."""

    q: tuple[int, int]
    pieces: tuple[Piece, ...]
    again: bool


def plan(slices: Sequence[Slice], length: int, rows: int = ROWS, keys: int = KEYS) -> list[Block]:
    """Which blocks of scores are computed, slice by slice: no pair outside the mask but in blocks that its edge cuts.

    Args:
        slices: what is kept.
        length: S.
        rows, keys: the largest block.
    """
    seen = torch.zeros(length, dtype=torch.bool)
    blocks = []
    for each in slices:
        for start in range(each.q_start, each.q_end, rows):
            query = torch.arange(start, min(start + rows, each.q_end))
            first, last = each.bounds(query)
            query, first, last = (x[last > first] for x in (query, first, last))
            if len(query):
                span = (int(query[0]), int(query[-1]) + 1)
                pieces = tuple(_pieces(first, last, keys))
                blocks.append(Block(span, pieces, bool(seen[span[0] : span[1]].any())))
                seen[span[0] : span[1]] = True
    return blocks


def _pieces(first: Tensor, last: Tensor, keys: int) -> Iterator[Piece]:
    """The keys of a block of queries, in pieces: between the last `first` and the first `last` nothing is masked."""
    start, stop = int(first[0]), int(last[-1])
    inner, outer = int(first[-1]), int(last[0])
    # A middle that is narrow against the edges is not worth a product of its own.
    edges = (start, inner, outer, stop) if outer - inner >= max(len(first) // 2, 1) else (start, stop)
    for begin, end in pairwise(edges):
        for at in range(begin, end, keys):
            to = min(at + keys, end)
            whole = inner <= at and to <= outer
            j = torch.arange(at, to)
            yield Piece((at, to), None if whole else (j >= first[:, None]) & (j < last[:, None]))


def _rows(x: Tensor, block: Block, kv_heads: int) -> Tensor:
    """(batch, heads, tokens, …) to (batch, kv_heads, group · rows, …) of the block's queries, in float32 at least."""
    part = at_least_single(x[:, :, block.q[0] : block.q[1]])
    return part.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _scores(queries: Tensor, keys: Tensor, piece: Piece) -> Tensor:
    """(batch, kv_heads, group · rows, keys) of one piece, −∞ where masked."""
    scores = queries @ at_least_single(keys).mT
    if piece.visible is None:
        return scores
    rows = len(piece.visible)
    hidden = ~piece.visible.to(scores.device)
    return scores.unflatten(2, (-1, rows)).masked_fill_(hidden, -torch.inf).flatten(2, 3)


def attend_forward(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps, (batch, heads, tokens, dim) and without dim, in float32 at least.

    A query that sees nothing has output 0 and lse −∞.
    """
    kv_heads, scale = k.shape[1], q.shape[-1] ** -0.5
    output = at_least_single(q.new_zeros(*q.shape[:-1], v.shape[-1]))
    lse = output.new_full(q.shape[:-1], -torch.inf)
    for block in blocks:
        queries = _rows(q, block, kv_heads) * scale
        peak = queries.new_full(queries.shape[:-1], -torch.inf)
        total = torch.zeros_like(peak)
        sums = queries.new_zeros(*queries.shape[:-1], v.shape[-1])
        for piece in block.pieces:
            part = slice(*piece.k)
            scores = _scores(queries, k[:, :, part], piece)
            higher = torch.maximum(peak, scores.amax(dim=-1))
            finite = higher.masked_fill(higher == -torch.inf, 0)  # of a query whose first keys are all masked
            weights = scores.sub_(finite.unsqueeze(-1)).exp_()
            shrink = (peak - finite).exp_()
            total = total * shrink + weights.sum(dim=-1)
            sums = sums.mul_(shrink.unsqueeze(-1)).add_(weights @ at_least_single(v[:, :, part]))
            peak = higher
        rows = slice(*block.q)
        shape = (q.shape[1] // kv_heads, rows.stop - rows.start)
        ours = (sums / total.unsqueeze(-1)).unflatten(2, shape).flatten(1, 2)
        our_lse = (peak + total.log()).unflatten(2, shape).flatten(1, 2)
        if block.again:
            before = output[:, :, rows]
            lse[:, :, rows] = merge_(before, lse[:, :, rows], ours, our_lse)
        else:
            output[:, :, rows], lse[:, :, rows] = ours, our_lse
    return output, lse


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, grad: Tensor, blocks: Sequence[Block]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in float32 at least, from what `attend_forward` gave over all keys.

    `output` and `lse` are final ones: the blocks may be those of a shard of the keys.
    """
    kv_heads, scale = k.shape[1], q.shape[-1] ** -0.5
    share = (at_least_single(grad) * output).sum(dim=-1, keepdim=True)
    dq, dk, dv = (at_least_single(torch.zeros_like(x)) for x in (q, k, v))
    for block in blocks:
        queries, grads = _rows(q, block, kv_heads) * scale, _rows(grad, block, kv_heads)
        shares, sums = _rows(share, block, kv_heads), _rows(lse.unsqueeze(-1), block, kv_heads)
        total = torch.zeros_like(queries)
        for piece in block.pieces:
            part = slice(*piece.k)
            keys, values = at_least_single(k[:, :, part]), at_least_single(v[:, :, part])
            weights = _scores(queries, keys, piece).sub_(sums).exp_()
            dv[:, :, part] += weights.mT @ grads
            slopes = (grads @ values.mT).sub_(shares).mul_(weights)
            total += slopes @ keys
            dk[:, :, part] += slopes.mT @ queries
        shape = (q.shape[1] // kv_heads, block.q[1] - block.q[0])
        dq[:, :, block.q[0] : block.q[1]] += total.mul_(scale).unflatten(2, shape).flatten(1, 2)
    return dq, dk, dv


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, blocks: Sequence[Block]) -> Tensor:
        with without_autocast(q):
            output, lse = attend_forward(q, k, v, blocks)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.mask, ctx.blocks = mask, blocks
        return output.to(q.dtype)

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, output, lse = ctx.saved_tensors
        if is_differentiated():
            plain = partial(reference, visible=ctx.mask.dense(q.device))
            return *plain_gradients(plain, (q, k, v), grad), None, None
        grads = attend_backward(q, k, v, output, lse, grad, ctx.blocks)
        return *(each.to(x.dtype) for each, x in zip(grads, (q, k, v), strict=True)), None, None


class Blockwise(Kernel):
    """Block-skipping attention for any slices, on any device, in any precision.

    Args:
        rows, keys: the largest block of scores.
    """

    name, about = "blockwise", "block-skipping, plain torch, driven by slices"

    def __init__(self, rows: int = ROWS, keys: int = KEYS):
        self.rows, self.keys = rows, keys

    def build(self, case: Case) -> Attend:
        mask = of_kind(case.mask, Mask, "mask")
        blocks = plan(mask.slices, mask.length, self.rows, self.keys)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if is_transformed():
                return reference(q, k, v, mask.dense(q.device))
            return _Blockwise.apply(q, k, v, mask, blocks)

        return attend


KERNEL = Blockwise()

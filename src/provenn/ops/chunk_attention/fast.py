"""Chunk attention by fused attention kernels and a merge, in memory linear in the tokens.

Take the l-th token of every chunk: these C tokens attend to the states of the C chunks with j < c, which is ordinary
causal attention, moved by one. So all finished chunks are one fused causal attention over (chunk length) × heads with
C − 1 tokens each, no mask is built, and half of the square is never computed. A token's own state is merged in after.

The backward pass is that of one joint softmax. Given the merged output and log-sum-exp, the fused kernel's backward
computes the weights that the joint softmax gave to its share of the keys, so each part is differentiated by itself.
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import backward_without_autocast, is_differentiated, plain_gradients, without_autocast
from provenn.ops.softmax_merge import merge_

from .reference import Earlier, joint_softmax

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _by_position(x: Tensor, chunk: int) -> Tensor:
    """(rows, chunks · chunk, ...) to (rows, chunk, chunks − 1, ...): the l-th tokens of all chunks but the first."""
    return x.unflatten(1, (-1, chunk)).transpose(1, 2)[:, :, 1:].contiguous()


def _in_order(x: Tensor) -> Tensor:
    """Back again: (rows, chunk, chunks − 1, ...) to the tokens after the first chunk."""
    return x.transpose(1, 2).flatten(1, 2)


def _ends(x: Tensor, chunk: int) -> Tensor:
    """The states of all chunks but the last, seen from each position in a chunk: (rows, chunk, chunks − 1, dim)."""
    return x[:, chunk - 1 : -chunk : chunk].unsqueeze(1).expand(-1, chunk, -1, -1)


def plain_rows(q: Tensor, k: Tensor, v: Tensor, *slots: Tensor, filled: Tensor | None = None, chunk: int) -> Tensor:
    """`joint_softmax` of rows, (rows, tokens, dim), after the keys and values of `slots` where there are any."""
    earlier = None if filled is None else Earlier(slots[0], slots[1], filled)
    return joint_softmax(*(x.unsqueeze(1) for x in (q, k, v)), chunk=chunk, earlier=earlier).squeeze(1)


class _ChunkAttention(torch.autograd.Function):
    """(q, k, v) of (rows, chunks · chunk, dim) → o; a row is a head of an example.

    `slots` and `slot_values` (rows, 1, slots, dim) are earlier states, where `bias` (rows, 1, 1, slots) is not −∞.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, slots, slot_values, bias, chunk: int):
        scale = q.shape[-1] ** -0.5
        dtype = torch.promote_types(q.dtype, torch.float32)
        output = v.to(dtype, copy=True)
        # A token's own state by itself: the softmax over one score is v, with the score for its log-sum-exp.
        own_scores = (q * k).sum(dim=-1, dtype=dtype).mul_(scale)
        lse = own_scores.clone()
        if q.shape[1] > chunk:
            # (rows, chunk, chunks − 1, ·): `is_causal` of tokens 1 … C − 1 over states 0 … C − 2 is j < c.
            attended = _attend(_by_position(q, chunk), _ends(k, chunk), _ends(v, chunk), 0.0, True, scale=scale)
            before, before_lse = (_in_order(tensor) for tensor in attended)
            lse[:, chunk:] = merge_(output[:, chunk:], lse[:, chunk:], before.to(dtype), before_lse)
        if slots is not None:
            before, before_lse = _attend(q.unsqueeze(1), slots, slot_values, 0.0, False, attn_mask=bias, scale=scale)
            lse = merge_(output, lse, before.squeeze(1).to(dtype), before_lse.squeeze(1))
        output = output.to(q.dtype)
        ctx.save_for_backward(q, k, v, slots, slot_values, bias, own_scores, output, lse)
        ctx.chunk = chunk
        return output

    @staticmethod
    @backward_without_autocast
    def backward(ctx, grad: Tensor):
        q, k, v, slots, slot_values, bias, own_scores, output, lse = ctx.saved_tensors
        chunk, scale = ctx.chunk, q.shape[-1] ** -0.5
        if is_differentiated():
            differentiable, filled = [x for x in (q, k, v, slots, slot_values) if x is not None], None
            if bias is not None:
                # How many slots each row sees, back from the bias that hides the others.
                filled = (bias == 0).sum(dim=-1).flatten()
            grads = plain_gradients(partial(plain_rows, filled=filled, chunk=chunk), differentiable, grad)
            return *grads, *[None] * (7 - len(grads))
        # The weight that the joint softmax gave to the own state; ∂L/∂score = weight · g·(v − o).
        share = (own_scores - lse).exp_().unsqueeze(-1).to(q.dtype)
        grad_v = share * grad
        grad_own = (grad_v * (v - output)).sum(dim=-1, keepdim=True).mul_(scale)
        grad_q, grad_k = grad_own * k, grad_own * q
        grad_slots = grad_slot_values = None
        if q.shape[1] > chunk:
            inputs = (_by_position(grad, chunk), _by_position(q, chunk), _ends(k, chunk), _ends(v, chunk))
            results = (_by_position(output, chunk), _by_position(lse, chunk))
            grads = _attend_backward(*inputs, *results, 0.0, True, scale=scale)
            grad_q[:, chunk:] += _in_order(grads[0])
            # Summed over the chunk's positions, which all saw the same states.
            grad_k[:, chunk - 1 : -chunk : chunk] += grads[1].sum(dim=1)
            grad_v[:, chunk - 1 : -chunk : chunk] += grads[2].sum(dim=1)
        if slots is not None:
            inputs = (grad.unsqueeze(1), q.unsqueeze(1), slots, slot_values)
            results = (output.unsqueeze(1), lse.unsqueeze(1))
            grads = _attend_backward(*inputs, *results, 0.0, False, attn_mask=bias, scale=scale)
            grad_q += grads[0].squeeze(1)
            grad_slots, grad_slot_values = grads[1:]
        return grad_q, grad_k, grad_v, grad_slots, grad_slot_values, None, None


def merged_attention(
    queries: Float[Tensor, "batch heads tokens dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    values: Float[Tensor, "batch heads tokens dim"],
    *,
    chunk: int,
    earlier: Earlier | None = None,
) -> Float[Tensor, "batch heads tokens dim"]:
    """`chunk_attention` in memory linear in the tokens, from PyTorch's fused attention for the CPU."""
    n = queries.shape[2]
    padding = -n % chunk if n > chunk else 0
    rows = [F.pad(tensor.flatten(0, 1), (0, 0, 0, padding)) for tensor in (queries, keys, values)]
    before: list[Tensor | None] = [None] * 3
    if earlier is not None and earlier.keys.shape[2]:
        # The lowest finite number stands for −∞: a stream that has no earlier chunk yet would otherwise get 0 / 0.
        bias = queries.new_zeros(()).masked_fill(~earlier.mask, torch.finfo(queries.dtype).min)
        bias = bias.expand(-1, queries.shape[1], -1, -1)
        # (rows, 1, slots, ·): one head a row, as the other chunks are laid out.
        before = [tensor.flatten(0, 1).unsqueeze(1) for tensor in (earlier.keys, earlier.values, bias)]
    with without_autocast(queries):
        return _ChunkAttention.apply(*rows, *before, chunk)[:, :n].unflatten(0, queries.shape[:2])

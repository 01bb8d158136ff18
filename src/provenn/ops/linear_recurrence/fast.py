"""The gated linear recurrence in PyTorch, for any device: chunks side by side, in linear work.

A sequence is cut into chunks. All chunks are stepped through together, from their first token to their last, each step
one multiply-add over every chunk and channel at once. What a chunk lacks is the state before it: those states obey the
same recurrence, from chunk to chunk, with the product of a chunk's gates as the gate, and are found the same way. Their
share is then added. No gate is ever divided by, so gates may be 0, and their products may vanish.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import is_differentiated, is_transformed

from .reference import recurrent

CHUNK = 32  # tokens that are stepped through; a sequence of up to two chunks is not cut


def _walk(a: Tensor, h: Tensor, order: Sequence[int]) -> Tensor:
    """In place, in the order of the tokens or against it; the gate between two tokens is the later one's."""
    for i in range(1, len(order)):
        before, t = order[i - 1], order[i]
        h.select(1, t).addcmul_(a.select(1, max(before, t)), h.select(1, before))
    return h


def _scan(a: Tensor, x: Tensor) -> Tensor:
    """h_t = a_t h_{t−1} + x_t over the second dimension of (rows, tokens, dim)."""
    rows, n, dim = x.shape
    if n <= 2 * CHUNK:
        return _walk(a, x.clone(), range(n))
    chunks = -(-n // CHUNK)
    if n % CHUNK:
        padding = (0, 0, 0, chunks * CHUNK - n)
        a, x = F.pad(a, padding), F.pad(x, padding)
    a = a.reshape(rows * chunks, CHUNK, dim)
    h = _scan(a, x.reshape(rows * chunks, CHUNK, dim)).view(rows, chunks, CHUNK, dim)
    # Products of gates are multiplied in and never divided by, so that they may vanish.
    decay = a.cumprod(dim=1).view(rows, chunks, CHUNK, dim)
    before = _scan(decay[:, :, -1], h[:, :, -1])[:, :-1]
    h[:, 1:].addcmul_(decay[:, 1:], before.unsqueeze(2))
    return h.view(rows, chunks * CHUNK, dim)[:, :n]


def _scan_back(a: Tensor, x: Tensor) -> Tensor:
    """h_t = a_{t+1} h_{t+1} + x_t, from the last token to the first."""
    if x.shape[1] <= 2 * CHUNK:
        return _walk(a, x.clone(), range(x.shape[1] - 1, -1, -1))
    return _scan(F.pad(a.flip(1), (0, 0, 1, -1)), x.flip(1)).flip(1)


class _LinearRecurrence(torch.autograd.Function):
    """With r_t = ∂L/∂h_t + a_{t+1} ⊙ r_{t+1}:  ∂L/∂x_t = r_t  and  ∂L/∂a_t = r_t ⊙ h_{t−1}."""

    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor):
        h = _scan(a, x)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, h = ctx.saved_tensors
        if is_differentiated():  # r obeys the same recurrence from the other end, which can be differentiated again
            r = _LinearRecurrence.apply(F.pad(a.flip(1), (0, 0, 1, -1)), grad.flip(1)).flip(1)
        else:
            r = _scan_back(a, grad)
        return F.pad(r[:, 1:] * h[:, :-1], (0, 0, 1, 0)), r


def chunked(
    gates: Float[Tensor, "*batch tokens dim"],
    inputs: Float[Tensor, "*batch tokens dim"],
    *,
    state: Float[Tensor, "*batch dim"] | None = None,
) -> tuple[Float[Tensor, "*batch tokens dim"], Float[Tensor, "*batch dim"]]:
    """`linear_recurrence` by chunks: linear work, depth that grows with the logarithm of the tokens."""
    *_, n, dim = inputs.shape
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    a, x = gates.to(dtype), inputs.to(dtype)
    if state is not None:
        # h_0 joins the first input, so that the scan itself starts from zero and has two arguments to differentiate.
        first = x[..., :1, :] + a[..., :1, :] * state.to(dtype).unsqueeze(-2)
        x = torch.cat([first, x[..., 1:, :]], dim=-2)
    rows = math.prod(inputs.shape[:-2])  # not −1, which an empty batch leaves open
    a, x = a.reshape(rows, n, dim), x.reshape(rows, n, dim)
    h = (recurrent(a, x)[0] if is_transformed() else _LinearRecurrence.apply(a, x)).reshape(inputs.shape)
    return h.to(inputs.dtype), h[..., -1, :]

"""The selective scan in PyTorch, for any device: chunks side by side, in linear work, forward and backward.

A decay differs by channel and state, so no matrix product over tokens stands for the recurrence. All chunks of a
sequence are therefore stepped through together, each step one multiply-add over every chunk, channel and state at once.
What a chunk lacks is the state before it. Those obey the same recurrence from chunk to chunk, with the decay of a whole
chunk, exp(A Σ Δ); as they are known, what each has become at every token is added. Nothing is divided by a decay, which
may vanish.

Numbers of size tokens × channels × states live for some rows at a time only. The forward pass keeps the states between
chunks, from which the backward pass finds the others again.

Inside, tensors are (step, row, chunk, state, channel): a row is one example's one group, and channels stand last
because they are many, states are few.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import backward_without_autocast, is_differentiated, is_transformed, plain_gradients

CHUNK = 32  # tokens that are stepped through, at least; a sequence of up to two chunks is not cut
ROOM = 2**20  # states of all tokens that are held at once


def chunk_length(tokens: int) -> int:
    """Tokens a chunk: the steps within chunks and those between them are to be few."""
    return tokens if tokens <= 2 * CHUNK else max(CHUNK, math.isqrt(tokens))


def _pieces(rows: int, each: int) -> list[slice]:
    """So many rows at a time that their `each` states fit into `ROOM`; all of them where a compiler traces."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    step = max(1, ROOM // each)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _cut(x: Tensor, chunk: int) -> Tensor:
    """(rows, width, tokens) to (step, rows, chunks, width). Added tokens are 0: with Δ = 0 they leave a state alone."""
    x = F.pad(x, (0, -x.shape[-1] % chunk))
    return x.unflatten(-1, (-1, chunk)).permute(3, 0, 2, 1).contiguous()


def _joined(x: Tensor, tokens: int) -> Tensor:
    """`_cut` undone."""
    return x.permute(1, 3, 2, 0).flatten(2)[..., :tokens]


def _decays_and_inputs(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """exp(Δ_t A) and Δ_t u_t B_t, (step, rows, chunks, states, channels)."""
    decays = (delta.unsqueeze(-2) * A.unsqueeze(1)).exp_()
    return decays, (delta * u).unsqueeze(-2) * B.unsqueeze(-1)


def _states(decays: Tensor, h: Tensor, before: Tensor) -> None:
    """In place from inputs to states, given the states before each chunk."""
    for t in range(len(h)):
        h[t].addcmul_(decays[t], before if t == 0 else h[t - 1])


def carry_states(decays: Tensor, x: Tensor, first: Tensor) -> Tensor:
    """s_0 = first, s_j = d_{j−1} s_{j−1} + x_{j−1} over the chunks (dimension 1), one more than there are."""
    states = [first]
    for j in range(x.shape[1]):
        states.append(torch.addcmul(x[:, j], decays[:, j], states[-1]))
    return torch.stack(states, dim=1)


class _SelectiveScan(torch.autograd.Function):
    """Of rows (rows, width, tokens), A and states (rows, states, channels): y and the last states.

    With g_t = ∂L/∂y_t and r_t = C_t g_t + exp(Δ_{t+1} A) ⊙ r_{t+1}, the gradient of h_t, and k_t = r_t ⊙ exp(Δ_t A) ⊙
    h_{t−1}:  ∂C_t = Σ_d g_t h_t,  ∂B_t = Σ_d Δ_t u_t r_t,  ∂u_t = Δ_t ⟨r_t, B_t⟩,  ∂Δ_t = u_t ⟨r_t, B_t⟩ + ⟨A, k_t⟩,
    ∂A = Σ_t Δ_t k_t.
    """

    @staticmethod
    def forward(ctx, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor):
        rows, dim, tokens = u.shape
        chunk = chunk_length(tokens)
        chunks = -(-tokens // chunk)
        y, starts = torch.empty_like(u), u.new_empty(rows, chunks, *A.shape[1:])
        last = torch.empty_like(state)
        for piece in _pieces(rows, tokens * dim * A.shape[1]):
            v, step, b, c = (_cut(x[piece], chunk) for x in (u, delta, B, C))
            decays, h = _decays_and_inputs(v, step, A[piece], b)
            if chunks == 1:
                before = state[piece].unsqueeze(1)
                _states(decays, h, before)
                starts[piece], last[piece] = before, h[-1, :, 0]
            else:
                for t in range(1, chunk):
                    h[t].addcmul_(decays[t], h[t - 1])
                through = (step.sum(0).unsqueeze(-2) * A[piece].unsqueeze(1)).exp_()
                states = carry_states(through, h[-1], state[piece])
                starts[piece], last[piece] = states[:, :-1], states[:, -1]
                what_is_left = states[:, :-1].clone()
                for t in range(chunk):
                    h[t].add_(what_is_left.mul_(decays[t]))
            y[piece] = _joined((c.unsqueeze(-2) @ h).squeeze(-2), tokens)
        ctx.save_for_backward(u, delta, A, B, C, state, starts)
        return y, last

    @staticmethod
    @backward_without_autocast
    def backward(ctx, grad: Tensor, grad_last: Tensor):
        *inputs, starts = ctx.saved_tensors
        if is_differentiated():
            return plain_gradients(plain_rows, inputs, (grad, grad_last))
        u, delta, A, B, C, _ = inputs
        rows, dim, tokens = u.shape
        chunk = chunk_length(tokens)
        grads = [torch.empty_like(x) for x in inputs]
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_state = grads
        for piece in _pieces(rows, tokens * dim * A.shape[1]):
            v, step, b, c, g = (_cut(x[piece], chunk) for x in (u, delta, B, C, grad))
            a, before = A[piece].unsqueeze(1), starts[piece]
            decays, h = _decays_and_inputs(v, step, A[piece], b)
            _states(decays, h, before)
            grad_C[piece] = _joined((h @ g.unsqueeze(-1)).squeeze(-1), tokens)
            r = c.unsqueeze(-1) * g.unsqueeze(-2)
            for t in range(chunk - 2, -1, -1):
                r[t].addcmul_(decays[t + 1], r[t + 1])
            through = (step.sum(0).unsqueeze(-2) * a).exp_()
            # From the last chunk to the first: what later chunks send to the end of each.
            sent = carry_states(through.flip(1), (decays[0] * r[0]).flip(1), grad_last[piece]).flip(1)
            grad_state[piece] = sent[:, 0]
            to_come = sent[:, 1:].clone()
            for t in range(chunk - 1, -1, -1):
                r[t].add_(to_come)
                to_come.mul_(decays[t])
            grad_B[piece] = _joined((r @ (step * v).unsqueeze(-1)).squeeze(-1), tokens)
            along = (b.unsqueeze(-2) @ r).squeeze(-2)
            grad_u[piece] = _joined(step * along, tokens)
            k = r.mul_(decays)
            k[1:].mul_(h[:-1])
            k[0].mul_(before)
            grad_delta[piece] = _joined((k * a).sum(-2).addcmul_(v, along), tokens)
            grad_A[piece] = k.mul_(step.unsqueeze(-2)).sum((0, 2))
        return tuple(grads)


def plain_rows(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the definition, for second derivatives and `torch.func`."""
    h, outputs = state, []
    for t in range(u.shape[-1]):
        step = delta[:, None, :, t]
        h = (step * A).exp() * h + step * u[:, None, :, t] * B[..., t, None]
        outputs.append((h * C[..., t, None]).sum(1))
    return torch.stack(outputs, dim=-1), h


def as_rows(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One row an example and group, with A and the states as (states, channels)."""
    (batch, _, tokens), (groups, states) = u.shape, B.shape[1:3]
    dim, rows = A.shape[0] // groups, batch * groups
    decay = A.view(groups, dim, states).mT.expand(batch, -1, -1, -1).reshape(rows, states, dim)
    if state is None:
        start = u.new_zeros(rows, states, dim)
    else:
        start = state.view(batch, groups, dim, states).mT.reshape(rows, states, dim)
    u, delta = u.reshape(rows, dim, tokens), delta.reshape(rows, dim, tokens)
    return u, delta, decay, B.reshape(rows, states, tokens), C.reshape(rows, states, tokens), start


def from_rows(states: Tensor, groups: int) -> Tensor:
    """States (rows, states, channels) as (batch, dim, states)."""
    return states.unflatten(0, (states.shape[0] // groups, groups)).mT.flatten(1, 2)


def chunked(
    u: Float[Tensor, "batch dim tokens"],
    delta: Float[Tensor, "batch dim tokens"],
    A: Float[Tensor, "dim states"],
    B: Float[Tensor, "batch groups states tokens"],
    C: Float[Tensor, "batch groups states tokens"],
    *,
    state: Float[Tensor, "batch dim states"] | None = None,
) -> tuple[Float[Tensor, "batch dim tokens"], Float[Tensor, "batch dim states"]]:
    """`recurrent` by chunks: linear work, √tokens steps."""
    rows = as_rows(u, delta, A, B, C, state)
    y, last = plain_rows(*rows) if is_transformed() else _SelectiveScan.apply(*rows)
    return y.reshape(u.shape), from_rows(last, B.shape[1])

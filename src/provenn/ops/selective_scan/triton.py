"""The selective scan as GPU kernels: a program walks over a span of tokens of some channels, their states in registers.

Spans are walked side by side, as the chunks of the PyTorch form. One kernel finds what each leaves behind, the states
between spans follow, and a second kernel walks every span from the state before it. The forward pass stores no other
state. The backward pass finds them again, for as many rows at a time as have room, and walks against the tokens.
Importable where Triton or CUDA is missing: `available` then says no. Before a device's first use, `available` runs the
kernels on a small draw and holds them against the definition, gradients included; if they disagree it warns and PyTorch
is used there.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import backward_without_autocast, is_differentiated, plain_gradients

from .fast import as_rows, carry_states, chunk_length, from_rows, plain_rows
from .reference import recurrent

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LARGEST_STATE = 256
TILE = 1024  # states of one program
SIZES = ((40, 16, 49), (96, 16, 200), (12, 1, 300))  # channels of a group, states, tokens of the self-check
ROOM = 2**28  # states that the backward pass holds at once, in float32 a GiB

if triton is not None:

    @triton.jit
    def _ends(
        u_ptr, delta_ptr, a_ptr, b_ptr, end_ptr, span, spans, dim, states, blocks,
        STATES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """What a span leaves behind, started from nothing."""
        program = tl.program_id(0).to(tl.int64)
        index, column = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
        n = tl.arange(0, STATES)
        in_dim, in_state = column < dim, n < states
        inside = in_state[:, None] & in_dim[None, :]
        tile = n[:, None] * dim + column[None, :]
        a = tl.load(a_ptr + (index // spans * states * dim + tile), mask=inside, other=0.0)
        h = a * 0.0
        for step in range(0, span):
            t = index * span + step
            delta = tl.load(delta_ptr + (t * dim + column), mask=in_dim, other=0.0)
            u = tl.load(u_ptr + (t * dim + column), mask=in_dim, other=0.0)
            b = tl.load(b_ptr + (t * states + n), mask=in_state, other=0.0)
            h = tl.exp(delta[None, :] * a) * h + (delta * u)[None, :] * b[:, None]
        tl.store(end_ptr + (index * states * dim + tile), h, mask=inside)

    @triton.jit
    def _walk(
        u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, start_ptr, y_ptr, h_ptr, span, spans, dim, states, blocks,
        KEEP: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The outputs of a span, or (KEEP) its states."""
        program = tl.program_id(0).to(tl.int64)
        index, column = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
        n = tl.arange(0, STATES)
        in_dim, in_state = column < dim, n < states
        inside = in_state[:, None] & in_dim[None, :]
        tile = n[:, None] * dim + column[None, :]
        a = tl.load(a_ptr + (index // spans * states * dim + tile), mask=inside, other=0.0)
        h = tl.load(start_ptr + (index * states * dim + tile), mask=inside, other=0.0)
        for step in range(0, span):
            t = index * span + step
            delta = tl.load(delta_ptr + (t * dim + column), mask=in_dim, other=0.0)
            u = tl.load(u_ptr + (t * dim + column), mask=in_dim, other=0.0)
            b = tl.load(b_ptr + (t * states + n), mask=in_state, other=0.0)
            h = tl.exp(delta[None, :] * a) * h + (delta * u)[None, :] * b[:, None]
            if KEEP:
                tl.store(h_ptr + (t * states * dim + tile), h, mask=inside)
            else:
                c = tl.load(c_ptr + (t * states + n), mask=in_state, other=0.0)
                tl.store(y_ptr + (t * dim + column), tl.sum(h * c[:, None], axis=0), mask=in_dim)

    @triton.jit
    def _ends_back(
        delta_ptr, a_ptr, c_ptr, g_ptr, end_ptr, span, spans, dim, states, blocks,
        STATES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """What a span's outputs send to the state before it."""
        program = tl.program_id(0).to(tl.int64)
        index, column = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
        n = tl.arange(0, STATES)
        in_dim, in_state = column < dim, n < states
        inside = in_state[:, None] & in_dim[None, :]
        tile = n[:, None] * dim + column[None, :]
        a = tl.load(a_ptr + (index // spans * states * dim + tile), mask=inside, other=0.0)
        r = a * 0.0
        for step in range(0, span):
            t = index * span + (span - 1 - step)
            delta = tl.load(delta_ptr + (t * dim + column), mask=in_dim, other=0.0)
            g = tl.load(g_ptr + (t * dim + column), mask=in_dim, other=0.0)
            c = tl.load(c_ptr + (t * states + n), mask=in_state, other=0.0)
            r = tl.exp(delta[None, :] * a) * (r + g[None, :] * c[:, None])
        tl.store(end_ptr + (index * states * dim + tile), r, mask=inside)

    @triton.jit
    def _walk_back(
        u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, g_ptr, start_ptr, h_ptr, sent_ptr,
        gu_ptr, gdelta_ptr, ga_ptr, gb_ptr, gc_ptr, span, spans, dim, states, blocks,
        STATES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """All gradients of a span; those of A for each span, those of B and C for each block of channels."""
        program = tl.program_id(0).to(tl.int64)
        index, block = program // blocks, program % blocks
        column, n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
        in_dim, in_state = column < dim, n < states
        inside = in_state[:, None] & in_dim[None, :]
        tile = n[:, None] * dim + column[None, :]
        a = tl.load(a_ptr + (index // spans * states * dim + tile), mask=inside, other=0.0)
        first = tl.load(start_ptr + (index * states * dim + tile), mask=inside, other=0.0)
        r = tl.load(sent_ptr + (index * states * dim + tile), mask=inside, other=0.0)
        grad_a = a * 0.0
        for step in range(0, span):
            t = index * span + (span - 1 - step)
            delta = tl.load(delta_ptr + (t * dim + column), mask=in_dim, other=0.0)
            u = tl.load(u_ptr + (t * dim + column), mask=in_dim, other=0.0)
            g = tl.load(g_ptr + (t * dim + column), mask=in_dim, other=0.0)
            b = tl.load(b_ptr + (t * states + n), mask=in_state, other=0.0)
            c = tl.load(c_ptr + (t * states + n), mask=in_state, other=0.0)
            h = tl.load(h_ptr + (t * states * dim + tile), mask=inside, other=0.0)
            # The state before the span's first token is no other token's, and is not read as one.
            within = inside & (step < span - 1)
            before = tl.load(h_ptr + ((t - 1) * states * dim + tile), mask=within, other=0.0)
            before = tl.where(step < span - 1, before, first)
            r = r + g[None, :] * c[:, None]
            partial = (t * blocks + block) * states + n
            tl.store(gc_ptr + partial, tl.sum(h * g[None, :], axis=1), mask=in_state)
            tl.store(gb_ptr + partial, tl.sum(r * (delta * u)[None, :], axis=1), mask=in_state)
            along = tl.sum(r * b[:, None], axis=0)
            # r becomes what the token sends to the state before it.
            r = r * tl.exp(delta[None, :] * a)
            k = r * before
            tl.store(gu_ptr + (t * dim + column), delta * along, mask=in_dim)
            tl.store(gdelta_ptr + (t * dim + column), u * along + tl.sum(k * a, axis=0), mask=in_dim)
            grad_a += k * delta[None, :]
        tl.store(ga_ptr + (index * states * dim + tile), grad_a, mask=inside)


def _sizes(dim: int, states: int) -> tuple[int, dict[str, int]]:
    """Blocks of channels, and the constants of a launch."""
    wide = triton.next_power_of_2(states)
    block = max(1, min(TILE // wide, triton.next_power_of_2(dim)))
    return triton.cdiv(dim, block), {"STATES": wide, "BLOCK": block, "num_warps": 4}


class _TritonScan(torch.autograd.Function):
    """`fast._SelectiveScan` with tokens before channels: (rows, tokens, dim), A and states (rows, states, dim)."""

    @staticmethod
    def forward(ctx, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, span: int):
        rows, tokens, dim = u.shape
        states, spans = A.shape[1], tokens // span
        blocks, constants = _sizes(dim, states)
        shape, grid = (span, spans, dim, states, blocks), (rows * spans * blocks,)
        y, ends = torch.empty_like(u), u.new_empty(rows, spans, states, dim)
        if rows:
            with torch.cuda.device(u.device):
                _ends[grid](u, delta, A, B, ends, *shape, **constants)
                between = carry_states(_through(delta, A, span), ends, state)
                starts = between[:, :-1].contiguous()
                _walk[grid](u, delta, A, B, C, starts, y, y, *shape, KEEP=False, **constants)
        else:
            between = u.new_empty(0, spans + 1, states, dim)
            starts = between[:, :-1]
        ctx.save_for_backward(u, delta, A, B, C, state, starts)
        ctx.span = span
        return y, between[:, -1].clone()

    @staticmethod
    @backward_without_autocast
    def backward(ctx, grad: Tensor, grad_last: Tensor):
        *inputs, starts = ctx.saved_tensors
        if is_differentiated():
            return *plain_gradients(_plain, inputs, (grad, grad_last)), None
        u, delta, A, B, C, _ = inputs
        rows, tokens, dim = u.shape
        span, states, spans = ctx.span, A.shape[1], tokens // ctx.span
        blocks, constants = _sizes(dim, states)
        grads = [torch.empty_like(x) for x in inputs]
        step = max(1, ROOM // (tokens * states * dim))
        for first in range(0, rows, step):
            piece = slice(first, first + step)
            v, d, a, b, c, g, start = (x[piece].contiguous() for x in (u, delta, A, B, C, grad, starts))
            count = len(v)
            shape, grid = (span, spans, dim, states, blocks), (count * spans * blocks,)
            h, ends = u.new_empty(count, tokens, states, dim), torch.empty_like(start)
            of_a, (of_b, of_c) = torch.empty_like(start), u.new_empty(2, count, tokens, blocks, states)
            of_u, of_delta = torch.empty_like(v), torch.empty_like(d)
            with torch.cuda.device(u.device):
                _walk[grid](v, d, a, b, c, start, v, h, *shape, KEEP=True, **constants)
                _ends_back[grid](d, a, c, g, ends, *shape, **constants)
                sent = carry_states(_through(d, a, span).flip(1), ends.flip(1), grad_last[piece]).flip(1)
                _walk_back[grid](
                    v, d, a, b, c, g, start, h, sent[:, 1:].contiguous(), of_u, of_delta, of_a, of_b, of_c,
                    *shape, **constants,
                )  # fmt: skip
            parts = (of_u, of_delta, of_a.sum(1), of_b.sum(2), of_c.sum(2), sent[:, 0])
            for whole, part in zip(grads, parts, strict=True):
                whole[piece] = part
        return *grads, None


def _through(delta: Tensor, A: Tensor, span: int) -> Tensor:
    """The decay of a whole span, (rows, spans, states, dim)."""
    return (delta.unflatten(1, (-1, span)).sum(2).unsqueeze(-2) * A.unsqueeze(1)).exp_()


def _plain(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    y, last = plain_rows(u.mT, delta.mT, A, B.mT, C.mT, state)
    return y.mT, last


def triton_scan(
    u: Float[Tensor, "batch dim tokens"],
    delta: Float[Tensor, "batch dim tokens"],
    A: Float[Tensor, "dim states"],
    B: Float[Tensor, "batch groups states tokens"],
    C: Float[Tensor, "batch groups states tokens"],
    *,
    state: Float[Tensor, "batch dim states"] | None = None,
) -> tuple[Float[Tensor, "batch dim tokens"], Float[Tensor, "batch dim states"]]:
    """`recurrent` as GPU kernels, in float32. Call it where `available(device)` and states ≤ 256."""
    tokens = u.shape[2]
    span = chunk_length(tokens)
    v, d, a, b, c, start = as_rows(u, delta, A, B, C, state)
    # With Δ = 0 the tokens that fill the last span leave the state alone.
    v, d, b, c = (F.pad(x, (0, -tokens % span)).mT.contiguous() for x in (v, d, b, c))
    y, last = _TritonScan.apply(v, d, a.contiguous(), b, c, start.contiguous(), span)
    return y[:, :tokens].mT.reshape(u.shape), from_rows(last, B.shape[1])


def _agree(device: torch.device) -> bool:
    """Whether kernels and definition give the same, in the sizes that they are mostly used with."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for dim, states, tokens in SIZES:
        inputs = [draw(2, 4 * dim, tokens), draw(2, 4 * dim, tokens).exp() / 10, -draw(4 * dim, states).exp()]
        inputs += [draw(2, 4, states, tokens), draw(2, 4, states, tokens), draw(2, 4 * dim, states)]
        inputs = [x.requires_grad_() for x in inputs]
        weight, last_weight = draw(2, 4 * dim, tokens), draw(2, 4 * dim, states)
        forms = []
        for form in (triton_scan, recurrent):
            y, last = form(*inputs[:5], state=inputs[5])
            forms.append((y, last, *torch.autograd.grad((y * weight).sum() + (last * last_weight).sum(), inputs)))
        if not all((p - q).abs().max() <= 1e-4 * q.abs().max() for p, q in zip(*forms)):
            return False
    return True


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on this device and give there what the definition gives."""
    if triton is None or device.type != "cuda":
        return False
    try:
        with torch.enable_grad():
            agree = _agree(device)
        reason = "its values differ from the definition"
    except Exception as error:
        agree, reason = False, f"{type(error).__name__}: {error}"
    if not agree:
        warnings.warn(f"the Triton kernel of the selective scan is not used on {device}: {reason}", stacklevel=2)
    return agree

"""Chunk attention as GPU kernels: the softmax starts from a token's own state, then reads the states of earlier chunks.

Nothing of size tokens × chunks is stored. The backward pass has one kernel over the queries (their gradient, and that
of their own states) and one over the chunks (what all later queries send to a chunk's state). Importable where Triton
or CUDA is missing: `available` then says no. Before a device's first use, `available` runs the kernels on a small draw
and holds them against the definition, gradients included; if they disagree it warns and PyTorch is used there.
"""

import functools
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import is_differentiated, plain_gradients

from .fast import plain_rows
from .reference import joint_softmax

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LARGEST_DIM = 256
TILE = 2**14  # bytes of a block of queries or states: with two stages of loads a program needs five, 80 of the 99 KiB
# of shared memory that the smaller GPUs have

if triton is not None:

    @triton.jit
    def _forward(
        q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, n, dim, blocks, scale,
        CHUNK: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row, start = program // blocks, program % blocks * QUERIES
        t, column, state = start + tl.arange(0, QUERIES), tl.arange(0, DIM), tl.arange(0, STATES)
        in_dim = column < dim
        inside = (t < n)[:, None] & in_dim[None, :]
        at = (row * n + t)[:, None] * dim + column[None, :]
        q = tl.load(q_ptr + at, mask=inside, other=0.0)
        k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
        # The own state comes first, so the running maximum is finite from the start.
        acc = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.sum(q.to(tl.float32) * k, axis=1) * scale
        # Ones of m's type and shape.
        total = tl.exp(m - m)
        chunk_of = t // CHUNK
        last_chunk = tl.minimum(start + QUERIES - 1, n - 1) // CHUNK
        for first in range(0, last_chunk, STATES):
            j = first + state
            end_at = (row * n + j * CHUNK + CHUNK - 1)[:, None] * dim + column[None, :]
            inside_states = (j < last_chunk)[:, None] & in_dim[None, :]
            keys = tl.load(k_ptr + end_at, mask=inside_states, other=0.0)
            values = tl.load(v_ptr + end_at, mask=inside_states, other=0.0)
            scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * scale
            scores = tl.where(j[None, :] < chunk_of[:, None], scores, float("-inf"))
            higher = tl.maximum(m, tl.max(scores, axis=1))
            weights = tl.exp(scores - higher[:, None])
            keep = tl.exp(m - higher)
            total = total * keep + tl.sum(weights, axis=1)
            acc = acc * keep[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="tf32x3")
            m = higher
        tl.store(o_ptr + at, (acc / total[:, None]).to(q.dtype), mask=inside)
        tl.store(lse_ptr + (row * n + t), m + tl.log(total), mask=t < n)

    @triton.jit
    def _backward_queries(
        q_ptr, k_ptr, v_ptr, lse_ptr, along_ptr, g_ptr, gq_ptr, gk_ptr, gv_ptr, n, dim, blocks, scale,
        CHUNK: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row, start = program // blocks, program % blocks * QUERIES
        t, column, state = start + tl.arange(0, QUERIES), tl.arange(0, DIM), tl.arange(0, STATES)
        in_dim = column < dim
        inside = (t < n)[:, None] & in_dim[None, :]
        at = (row * n + t)[:, None] * dim + column[None, :]
        q = tl.load(q_ptr + at, mask=inside, other=0.0)
        g = tl.load(g_ptr + at, mask=inside, other=0.0)
        k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
        lse = tl.load(lse_ptr + (row * n + t), mask=t < n, other=0.0)
        along = tl.load(along_ptr + (row * n + t), mask=t < n, other=0.0)
        wide_q, wide_g = q.to(tl.float32), g.to(tl.float32)
        share = tl.exp(tl.sum(wide_q * k, axis=1) * scale - lse)
        grad_own = share * (tl.sum(wide_g * v, axis=1) - along) * scale
        tl.store(gk_ptr + at, grad_own[:, None] * wide_q, mask=inside)
        tl.store(gv_ptr + at, share[:, None] * wide_g, mask=inside)
        grad_q = grad_own[:, None] * k
        chunk_of = t // CHUNK
        last_chunk = tl.minimum(start + QUERIES - 1, n - 1) // CHUNK
        for first in range(0, last_chunk, STATES):
            j = first + state
            end_at = (row * n + j * CHUNK + CHUNK - 1)[:, None] * dim + column[None, :]
            inside_states = (j < last_chunk)[:, None] & in_dim[None, :]
            keys = tl.load(k_ptr + end_at, mask=inside_states, other=0.0)
            values = tl.load(v_ptr + end_at, mask=inside_states, other=0.0)
            scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * scale
            # Recomputed from the log-sum-exp: the forward pass stored no weights.
            weights = tl.where(j[None, :] < chunk_of[:, None], tl.exp(scores - lse[:, None]), 0.0)
            grads = weights * (tl.dot(g, tl.trans(values), input_precision="tf32x3") - along[:, None]) * scale
            grad_q += tl.dot(grads.to(keys.dtype), keys, input_precision="tf32x3")
        tl.store(gq_ptr + at, grad_q, mask=inside)

    @triton.jit
    def _backward_states(
        q_ptr, k_ptr, v_ptr, lse_ptr, along_ptr, g_ptr, gk_ptr, gv_ptr, n, dim, blocks, scale,
        CHUNK: tl.constexpr, QUERIES: tl.constexpr, STATES: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row, first = program // blocks, program % blocks * STATES
        j, column, query = first + tl.arange(0, STATES), tl.arange(0, DIM), tl.arange(0, QUERIES)
        in_dim = column < dim
        # The state of the last chunk is seen by none of the queries.
        inside_states = (j < (n - 1) // CHUNK)[:, None] & in_dim[None, :]
        end_at = (row * n + j * CHUNK + CHUNK - 1)[:, None] * dim + column[None, :]
        keys = tl.load(k_ptr + end_at, mask=inside_states, other=0.0)
        values = tl.load(v_ptr + end_at, mask=inside_states, other=0.0)
        grad_k = tl.load(gk_ptr + end_at, mask=inside_states, other=0.0)
        grad_v = tl.load(gv_ptr + end_at, mask=inside_states, other=0.0)
        for start in range((first + 1) * CHUNK, n, QUERIES):
            t = start + query
            inside = (t < n)[:, None] & in_dim[None, :]
            at = (row * n + t)[:, None] * dim + column[None, :]
            q = tl.load(q_ptr + at, mask=inside, other=0.0)
            g = tl.load(g_ptr + at, mask=inside, other=0.0)
            lse = tl.load(lse_ptr + (row * n + t), mask=t < n, other=0.0)
            along = tl.load(along_ptr + (row * n + t), mask=t < n, other=0.0)
            # Transposed, (states, queries): gradients of a state gather over queries without atomics.
            scores = tl.dot(keys, tl.trans(q), input_precision="tf32x3") * scale
            seen = (j[:, None] < (t // CHUNK)[None, :]) & (t < n)[None, :]
            weights = tl.where(seen, tl.exp(scores - lse[None, :]), 0.0)
            grad_v += tl.dot(weights.to(g.dtype), g, input_precision="tf32x3")
            grads = weights * (tl.dot(values, tl.trans(g), input_precision="tf32x3") - along[None, :]) * scale
            grad_k += tl.dot(grads.to(q.dtype), q, input_precision="tf32x3")
        tl.store(gk_ptr + end_at, grad_k, mask=inside_states)
        tl.store(gv_ptr + end_at, grad_v, mask=inside_states)


def _sizes(queries: Tensor, chunk: int) -> dict[str, int]:
    width = max(16, triton.next_power_of_2(queries.shape[-1]))
    size = queries.element_size()
    # In float32 a product is three of tensor cores', as exact as one without: larger blocks no longer fit on chip.
    block = min(128 // size, TILE // (width * size))
    return {"CHUNK": chunk, "QUERIES": block, "STATES": block, "DIM": width, "num_stages": 2}


class _TritonChunkAttention(torch.autograd.Function):
    """(q, k, v) of (rows, tokens, dim) → o, contiguous, float32 or bfloat16; sums and gradients are float32."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, chunk: int):
        rows, n, dim = q.shape
        sizes = _sizes(q, chunk)
        output, lse = torch.empty_like(q), torch.empty(rows, n, dtype=torch.float32, device=q.device)
        blocks = triton.cdiv(n, sizes["QUERIES"])
        with torch.cuda.device(q.device):
            _forward[(rows * blocks,)](q, k, v, output, lse, n, dim, blocks, dim**-0.5, **sizes)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.chunk = chunk
        return output

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, output, lse = ctx.saved_tensors
        if is_differentiated():
            return *plain_gradients(functools.partial(plain_rows, chunk=ctx.chunk), (q, k, v), grad), None
        rows, n, dim = q.shape
        sizes = _sizes(q, ctx.chunk)
        grad = grad.contiguous()
        along = (grad.float() * output.float()).sum(dim=-1)
        grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=torch.float32, device=q.device) for _ in range(3))
        blocks, ends = triton.cdiv(n, sizes["QUERIES"]), (n - 1) // ctx.chunk
        with torch.cuda.device(q.device):
            _backward_queries[(rows * blocks,)](
                q, k, v, lse, along, grad, grad_q, grad_k, grad_v, n, dim, blocks, dim**-0.5, **sizes
            )
            if ends:
                blocks = triton.cdiv(ends, sizes["STATES"])
                _backward_states[(rows * blocks,)](
                    q, k, v, lse, along, grad, grad_k, grad_v, n, dim, blocks, dim**-0.5, **sizes
                )
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None


def triton_attention(
    queries: Float[Tensor, "batch heads tokens dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    values: Float[Tensor, "batch heads tokens dim"],
    *,
    chunk: int,
) -> Float[Tensor, "batch heads tokens dim"]:
    """`joint_softmax` as GPU kernels, sums in float32. Call it where `available(device)` and dim ≤ 256."""
    rows = [tensor.flatten(0, 1).contiguous() for tensor in (queries, keys, values)]
    return _TritonChunkAttention.apply(*rows, chunk).unflatten(0, queries.shape[:2])


def _agree(device: torch.device) -> bool:
    """Whether kernels and definition give the same, in the widths and types that they are mostly used with."""
    generator = torch.Generator().manual_seed(0)
    for dtype, dim, tolerance in ((torch.float32, 24, 1e-4), (torch.float32, 128, 1e-4), (torch.bfloat16, 128, 3e-2)):
        draws = [torch.randn(1, 2, 150, dim, generator=generator).to(device, dtype) for _ in range(4)]
        inputs, weight = [draw.requires_grad_() for draw in draws[:3]], draws[3]
        forms = []
        for form in (triton_attention, joint_softmax):
            outputs = form(*inputs, chunk=4)
            forms.append((outputs, *torch.autograd.grad((outputs * weight).sum(), inputs)))
        if not all((p - q).abs().max() <= tolerance * q.abs().max() for p, q in zip(*forms)):
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
        warnings.warn(f"the Triton kernel of chunk attention is not used on {device}: {reason}", stacklevel=2)
    return agree

"""The causal product as a GPU kernel: a program walks over the chunks of a span, its part of the state in registers.

y_i = q_i·start + Σ_{j≤i} (q_i·k_j) v_j. A program owns some columns of v in one span of a row's tokens, so rows,
blocks of columns and spans run side by side. What comes before a span is Σ_j k_j v_jᵀ of the spans before it, summed
first. The triangle inside a chunk exists only on chip. Float32 is kept: products of a chunk are three of the tensor
cores'. The backward pass is the same kernel with the roles exchanged. Importable where Triton or CUDA is missing:
`available` then says no. Before a device's first use, `available` runs the kernel on a small draw and holds it
against the PyTorch form, gradients included; if they disagree it warns and the PyTorch form is used there.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .fast import causal_attention, chunked_product

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LARGEST = 256  # features or columns of one row that fit on chip
PROGRAMS = 4096  # some for each multiprocessor of a large GPU
SPAN = 128  # tokens of a span, at least
# Up to where it is the quicker one, forward and in training; an NVIDIA H100 was timed, at 512 to 32,768 tokens a row.
QUICK_WIDTH, QUICK_TOKENS = 64, 2**18

if triton is not None:

    @triton.jit
    def _product(
        q_ptr, k_ptr, v_ptr, start_ptr, y_ptr, end_ptr, n, features, dim, blocks,
        REVERSE: tl.constexpr, CHUNK: tl.constexpr, FEATURES: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row, block = program // blocks, program % blocks
        token, feature = tl.arange(0, CHUNK), tl.arange(0, FEATURES)
        column = block * DIM + tl.arange(0, DIM)
        in_features, in_dim = feature < features, column < dim
        state_at = (row * features + feature)[:, None] * dim + column[None, :]
        in_state = in_features[:, None] & in_dim[None, :]
        state = tl.load(start_ptr + state_at, mask=in_state, other=0.0)
        chunks = tl.cdiv(n, CHUNK)
        for step in range(0, chunks):
            first = (chunks - 1 - step) * CHUNK if REVERSE else step * CHUNK
            i = first + token
            inside = i < n
            q_at = (row * n + i)[:, None] * features + feature[None, :]
            q = tl.load(q_ptr + q_at, mask=inside[:, None] & in_features[None, :], other=0.0)
            # Keys are loaded as columns: both products with them want kᵀ.
            k_at = (row * n + i)[None, :] * features + feature[:, None]
            k = tl.load(k_ptr + k_at, mask=inside[None, :] & in_features[:, None], other=0.0)
            v_at = (row * n + i)[:, None] * dim + column[None, :]
            whole = inside[:, None] & in_dim[None, :]
            v = tl.load(v_ptr + v_at, mask=whole, other=0.0)
            seen = token[None, :] >= token[:, None] if REVERSE else token[None, :] <= token[:, None]
            weights = tl.where(seen, tl.dot(q, k, input_precision="tf32x3"), 0.0)
            y = tl.dot(weights, v, input_precision="tf32x3") + tl.dot(q, state, input_precision="ieee")
            tl.store(y_ptr + v_at, y, mask=whole)
            state += tl.dot(k, v, input_precision="tf32x3")
        tl.store(end_ptr + state_at, state, mask=in_state)


def kernel_product(q: Tensor, k: Tensor, v: Tensor, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """`chunked_product` as a kernel, in float32. Call it where `available(device)` and no width is above `LARGEST`."""
    rows, n, _ = q.shape
    programs = rows * -(-v.shape[-1] // _width(q))
    spans = max(1, min(PROGRAMS // programs, n // SPAN))
    q, k, v, start = (x.float().contiguous() for x in (q, k, v, start))
    if spans == 1:
        return _launch(q, k, v, start, reverse)
    length = -(-n // spans)
    padding = -n % length
    q, k, v = ((F.pad(x, (0, 0, 0, padding)) if padding else x).unflatten(1, (-1, length)) for x in (q, k, v))
    totals = k.mT @ v
    states = torch.cat([start.unsqueeze(1), totals.flip(1) if reverse else totals], dim=1).cumsum(dim=1)
    before, end = states[:, :-1], states[:, -1]
    before = (before.flip(1) if reverse else before).flatten(0, 1).contiguous()
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    y, _ = _launch(q, k, v, before, reverse)
    return y.view(rows, -1, y.shape[-1])[:, :n].contiguous(), end


def _width(q: Tensor) -> int:
    """Columns of v that a program owns."""
    return 32 if q.shape[-1] > 64 else 64


def _launch(q: Tensor, k: Tensor, v: Tensor, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    rows, n, features = q.shape
    dim, width = v.shape[-1], _width(q)
    y, end = torch.empty_like(v), torch.empty_like(start)
    blocks = -(-dim // width)
    sizes = {
        "CHUNK": 32 if features > 128 else 64,
        "FEATURES": max(16, triton.next_power_of_2(features)),
        "DIM": width,
        "num_stages": 1,  # with loads in flight it would not fit the 99 KiB of the smaller GPUs
    }
    with torch.cuda.device(v.device):
        _product[(rows * blocks,)](q, k, v, start, y, end, n, features, dim, blocks, REVERSE=reverse, **sizes)
    return y, end


def is_quicker(tokens: int, features: int, dim: int) -> bool:
    """Whether the kernel is quicker than the PyTorch form on so many tokens in all, of all rows."""
    return tokens <= QUICK_TOKENS and max(features, dim) <= QUICK_WIDTH


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernel runs on this device and gives there what the PyTorch form gives."""
    if triton is None or device.type != "cuda":
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.rand(2, 150, 40, generator=generator).to(device).requires_grad_() for _ in range(2))
    v, weight = (torch.randn(2, 150, 70, generator=generator).to(device).requires_grad_() for _ in range(2))
    try:
        with torch.enable_grad():
            forms = []
            for product in (kernel_product, chunked_product):
                first, state = causal_attention(q[:, :70], k[:, :70], v[:, :70], product=product)
                second, _ = causal_attention(q[:, 70:], k[:, 70:], v[:, 70:], state=state, product=product)
                outputs = torch.cat([first, second], dim=1)
                forms.append((outputs, *torch.autograd.grad((outputs * weight).sum(), (q, k, v))))
        agree = all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*forms))
        reason = "its values differ from the PyTorch form"
    except Exception as error:
        agree, reason = False, f"{type(error).__name__}: {error}"
    if not agree:
        warnings.warn(f"the Triton kernel of linear attention is not used on {device}: {reason}", stacklevel=2)
    return agree

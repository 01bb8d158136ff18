"""The gated linear recurrence as a GPU kernel: a program walks over the tokens of some channels, state in registers.

Long sequences are cut into spans that are walked side by side. One kernel reduces each span to its product of gates and
its own last state. The states between spans follow by the same recurrence, and a second kernel walks every span from
the state before it. Gates and inputs are read at most twice, states written once. Importable where Triton or CUDA is
missing: `available` then says no. Before a device's first use, `available` runs the kernels on a small draw and holds
them against the PyTorch form, gradients included; if they disagree it warns and the PyTorch form is used there.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import is_differentiated

from .fast import chunked

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SPAN = 256  # tokens that one program walks over
BLOCK = 64  # channels of one program

if triton is not None:

    @triton.jit
    def _walk(
        a_ptr, x_ptr, start_ptr, h_ptr, n, dim, blocks, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row, column = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = column < dim
        h = tl.load(start_ptr + (row * dim + column), mask=inside, other=0.0)
        for step in range(0, n):
            # In reverse, the gate of a token carries the state of the next one to it.
            t = n - 1 - step if REVERSE else step
            at = (row * n + t) * dim + column
            a = tl.load(a_ptr + at, mask=inside, other=0.0)
            h = a * h + tl.load(x_ptr + at, mask=inside, other=0.0)
            tl.store(h_ptr + at, h, mask=inside)

    @triton.jit
    def _reduce(
        a_ptr, x_ptr, decay_ptr, end_ptr, n, dim, blocks, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row, column = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = column < dim
        h = tl.load(end_ptr + (row * dim + column), mask=inside, other=0.0)
        # `end_ptr` holds zeros, of which ones are made in h's type.
        decay = h + 1.0
        for step in range(0, n):
            t = n - 1 - step if REVERSE else step
            at = (row * n + t) * dim + column
            a = tl.load(a_ptr + at, mask=inside, other=0.0)
            h = a * h + tl.load(x_ptr + at, mask=inside, other=0.0)
            decay = decay * a
        tl.store(decay_ptr + (row * dim + column), decay, mask=inside)
        tl.store(end_ptr + (row * dim + column), h, mask=inside)


def _scan(a: Tensor, x: Tensor, reverse: bool = False) -> Tensor:
    """h_t = a_t h_{t−1} + x_t over (rows, tokens, dim), or h_t = a_t h_{t+1} + x_t in reverse; both contiguous."""
    rows, n, dim = x.shape
    spans = -(-n // SPAN)
    if spans > 1 and n % SPAN:
        padding = (0, 0, 0, spans * SPAN - n)
        return _scan(F.pad(a, padding), F.pad(x, padding), reverse)[:, :n]
    blocks = triton.cdiv(dim, BLOCK)
    grid, constants = (rows * spans * blocks,), {"REVERSE": reverse, "BLOCK": BLOCK, "num_warps": BLOCK // 32}
    start = x.new_zeros(rows, spans, dim)
    h = torch.empty_like(x)
    with torch.cuda.device(x.device):
        if spans > 1:
            decay, ends = torch.empty_like(start), torch.zeros_like(start)
            _reduce[grid](a, x, decay, ends, SPAN, dim, blocks, **constants)
            if reverse:
                # The state before a span is the last one of the span before it; in reverse, of the span after it.
                start[:, :-1] = _scan(decay, ends, reverse)[:, 1:]
            else:
                start[:, 1:] = _scan(decay, ends)[:, :-1]
        _walk[grid](a, x, start, h, n // spans, dim, blocks, **constants)
    return h


class _TritonRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor):
        h = _scan(a, x)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, h = ctx.saved_tensors
        if is_differentiated():  # r obeys the same recurrence from the other end, which can be differentiated again
            r = _TritonRecurrence.apply(F.pad(a.flip(1), (0, 0, 1, -1)), grad.flip(1)).flip(1)
        else:
            # Gates one position to the left: a_{t+1} carries r_{t+1} to r_t.
            r = _scan(F.pad(a, (0, 0, -1, 1)), grad.contiguous(), reverse=True)
        return F.pad(r[:, 1:] * h[:, :-1], (0, 0, 1, 0)), r


def triton_recurrence(
    gates: Float[Tensor, "*batch tokens dim"],
    inputs: Float[Tensor, "*batch tokens dim"],
    *,
    state: Float[Tensor, "*batch dim"] | None = None,
) -> tuple[Float[Tensor, "*batch tokens dim"], Float[Tensor, "*batch dim"]]:
    """`chunked` as GPU kernels; float32 inside. Call it where `available(device)`."""
    *_, n, dim = inputs.shape
    a, x = gates.float(), inputs.float()
    if state is not None:
        first = x[..., :1, :] + a[..., :1, :] * state.float().unsqueeze(-2)
        x = torch.cat([first, x[..., 1:, :]], dim=-2)
    h = _TritonRecurrence.apply(a.reshape(-1, n, dim).contiguous(), x.reshape(-1, n, dim).contiguous())
    h = h.reshape(inputs.shape)
    return h.to(inputs.dtype), h[..., -1, :]


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on this device and give there what the PyTorch form gives."""
    if triton is None or device.type != "cuda":
        return False
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 2 * SPAN + 9, 70, generator=generator).to(device).requires_grad_()
    x, weight = (torch.randn(a.shape, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    try:
        with torch.enable_grad():
            forms = []
            for form in (triton_recurrence, chunked):
                states, _ = form(a, x)
                forms.append((states, *torch.autograd.grad((states * weight).sum(), (a, x))))
        agree = all(torch.allclose(p, q, rtol=1e-3, atol=1e-4) for p, q in zip(*forms))
        reason = "its values differ from the PyTorch form"
    except Exception as error:
        agree, reason = False, f"{type(error).__name__}: {error}"
    if not agree:
        warnings.warn(f"the Triton kernel of the linear recurrence is not used on {device}: {reason}", stacklevel=2)
    return agree

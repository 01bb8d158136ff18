"""The merge of two partial softmaxes as one GPU kernel each way: outputs are read once and written once.

Importable where Triton or CUDA is missing: `available` then says no. Before a device's first use, `available` runs the
kernels on a small draw and holds them against the PyTorch form, gradients included; if they disagree it warns and the
PyTorch form is used there.
"""

import functools
import warnings

import torch
from torch import Tensor

from provenn.ops.autograd import is_differentiated, plain_gradients

from . import fast
from .reference import Partial

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS = 16
LARGEST_DIM = 512

if triton is not None:

    @triton.jit
    def _forward(
        a_ptr, a_lse_ptr, b_ptr, b_lse_ptr, o_ptr, lse_ptr, rows, dim, ROWS: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, DIM)
        in_rows = row < rows
        inside = in_rows[:, None] & (column < dim)[None, :]
        at = row[:, None] * dim + column[None, :]
        a_lse = tl.load(a_lse_ptr + row, mask=in_rows, other=0.0)
        b_lse = tl.load(b_lse_ptr + row, mask=in_rows, other=0.0)
        m = tl.maximum(a_lse, b_lse)
        m = tl.where(m == float("-inf"), 0.0, m)
        a_share, b_share = tl.exp(a_lse - m), tl.exp(b_lse - m)
        total = a_share + b_share
        # A query that sees nothing at all has total 0 and gets output 0.
        per_total = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
        a = tl.load(a_ptr + at, mask=inside, other=0.0)
        b = tl.load(b_ptr + at, mask=inside, other=0.0)
        o = (a_share * per_total)[:, None] * a + (b_share * per_total)[:, None] * b
        tl.store(o_ptr + at, o, mask=inside)
        tl.store(lse_ptr + row, tl.where(total > 0, tl.log(total) + m, float("-inf")), mask=in_rows)

    @triton.jit
    def _backward(
        a_ptr, a_lse_ptr, b_ptr, b_lse_ptr, o_ptr, lse_ptr, g_ptr, g_lse_ptr, ga_ptr, ga_lse_ptr, gb_ptr, gb_lse_ptr,
        rows, dim, ROWS: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, DIM)
        in_rows = row < rows
        inside = in_rows[:, None] & (column < dim)[None, :]
        at = row[:, None] * dim + column[None, :]
        lse = tl.load(lse_ptr + row, mask=in_rows, other=0.0)
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        a_share = tl.exp(tl.load(a_lse_ptr + row, mask=in_rows, other=0.0) - lse)
        b_share = tl.exp(tl.load(b_lse_ptr + row, mask=in_rows, other=0.0) - lse)
        a = tl.load(a_ptr + at, mask=inside, other=0.0)
        b = tl.load(b_ptr + at, mask=inside, other=0.0)
        o = tl.load(o_ptr + at, mask=inside, other=0.0)
        g = tl.load(g_ptr + at, mask=inside, other=0.0)
        g_lse = tl.load(g_lse_ptr + row, mask=in_rows, other=0.0)
        tl.store(ga_ptr + at, a_share[:, None] * g, mask=inside)
        tl.store(gb_ptr + at, b_share[:, None] * g, mask=inside)
        tl.store(ga_lse_ptr + row, a_share * (tl.sum(g * (a - o), axis=1) + g_lse), mask=in_rows)
        tl.store(gb_lse_ptr + row, b_share * (tl.sum(g * (b - o), axis=1) + g_lse), mask=in_rows)


def _launch(kernel, tensors: list[Tensor]) -> None:
    rows, dim = tensors[0].shape
    with torch.cuda.device(tensors[0].device):
        grid = (triton.cdiv(rows, ROWS),)
        kernel[grid](*tensors, rows, dim, ROWS=ROWS, DIM=triton.next_power_of_2(dim))


class _TritonMerge(torch.autograd.Function):
    """(o_a, ℓ_a, o_b, ℓ_b) → (o, ℓ) in float32, all contiguous."""

    @staticmethod
    def forward(ctx, a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor):
        output, lse = torch.empty_like(a), torch.empty_like(a_lse)
        _launch(_forward, [a, a_lse, b, b_lse, output, lse])
        ctx.save_for_backward(a, a_lse, b, b_lse, output, lse)
        return output, lse

    @staticmethod
    def backward(ctx, grad: Tensor, grad_lse: Tensor):
        saved = ctx.saved_tensors
        if is_differentiated():
            return plain_gradients(fast.plain_merge, saved[:4], (grad, grad_lse))
        results = [torch.empty_like(tensor) for tensor in saved[:4]]
        _launch(_backward, [*saved, grad.contiguous(), grad_lse.contiguous(), *results])
        return tuple(results)


def triton_merge(a: Partial, b: Partial) -> Partial:
    """`fast.merge` as a GPU kernel; float32 inside. Call it where `available(device)` and dim ≤ 512."""
    *batch, dim = a.output.shape
    tensors = []
    for partial in (a, b):
        lse = partial.lse.float().reshape(-1)
        output = partial.output.float().reshape(-1, dim)
        tensors += [output.masked_fill((lse == -torch.inf).unsqueeze(-1), 0).contiguous(), lse.contiguous()]
    output, lse = _TritonMerge.apply(*tensors)
    return Partial(output.view(*batch, dim).to(a.output.dtype), lse.view(batch))


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on this device and give there what the PyTorch form gives."""
    if triton is None or device.type != "cuda":
        return False
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(37, 24, generator=generator).to(device).requires_grad_() for _ in range(2)]
    lses = [(4 * torch.randn(37, generator=generator)).to(device).requires_grad_() for _ in range(2)]
    try:
        with torch.enable_grad():
            forms = []
            for form in (triton_merge, fast.merge):
                merged = form(Partial(outputs[0], lses[0]), Partial(outputs[1], lses[1]))
                loss = merged.output.square().sum() + merged.lse.sum()
                forms.append((*merged, *torch.autograd.grad(loss, (*outputs, *lses))))
        agree = all(torch.allclose(p, q, rtol=1e-3, atol=1e-4) for p, q in zip(*forms))
        reason = "its values differ from the PyTorch form"
    except Exception as error:
        agree, reason = False, f"{type(error).__name__}: {error}"
    if not agree:
        warnings.warn(f"the Triton kernel of the softmax merge is not used on {device}: {reason}", stacklevel=2)
    return agree

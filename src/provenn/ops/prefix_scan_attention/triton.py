"""The chunked scan as one GPU kernel each way: a program walks over the chunks of a span with the state in registers.

Long rows are cut into spans that run side by side: each begins with what the spans before it amount to, which is summed
first. The small matrices exist only on chip. Float32 is kept: a product is three of the tensor cores'. Importable where
Triton or CUDA is missing: `available` then says no. Before a device's first use, `available` runs the kernels on a
small draw and holds them against the PyTorch form, gradients included; if they disagree it warns and the PyTorch form
is used there.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import is_differentiated

from .fast import chunked_attention, scan_gradients
from .reference import PrefixState

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LARGEST_DIM = 256
PROGRAMS = 4096  # some for each multiprocessor of a large GPU
SPAN = 256  # tokens of a span, at least
QUICK = 2**25  # numbers up to which it is the quicker one, forward and in training; an NVIDIA H100 was timed
LOWEST = torch.finfo(torch.float32).min

if triton is not None:

    @triton.jit
    def _forward(
        s_ptr, v_ptr, m0_ptr, u0_ptr, w0_ptr, o_ptr, m_ptr, r_ptr, u_end_ptr, w_end_ptr, n, dim, lowest,
        CHUNK: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        token, column = tl.arange(0, CHUNK), tl.arange(0, DIM)
        in_dim = column < dim
        # Finite from the start, so that no difference of maxima is −∞ − (−∞).
        m_end = tl.maximum(tl.load(m0_ptr + row), lowest)
        u_end = tl.load(u0_ptr + row)
        w_end = tl.load(w0_ptr + row * dim + column, mask=in_dim, other=0.0)
        for start in range(0, n, CHUNK):
            i = start + token
            inside = i < n
            s = tl.load(s_ptr + row * n + i, mask=inside, other=float("-inf"))
            v_at = (row * n + i)[:, None] * dim + column[None, :]
            v = tl.load(v_ptr + v_at, mask=inside[:, None] & in_dim[None, :], other=0.0)
            causal = token[None, :] <= token[:, None]
            seen = tl.where(causal, s[None, :], float("-inf"))
            m = tl.maximum(tl.max(seen, axis=1), m_end)
            weights = tl.exp(seen - m[:, None])
            before = tl.exp(m_end - m)
            u = tl.sum(weights, axis=1) + before * u_end
            w = tl.dot(weights, v, input_precision="tf32x3") + before[:, None] * w_end[None, :]
            per_u = tl.where(u > 0, 1.0 / tl.where(u > 0, u, 1.0), 0.0)
            tl.store(o_ptr + v_at, w * per_u[:, None], mask=inside[:, None] & in_dim[None, :])
            tl.store(m_ptr + row * n + i, m, mask=inside)
            tl.store(r_ptr + row * n + i, per_u, mask=inside)
            # Tokens past the end weigh nothing, so the last row is the state after the chunk.
            last = token == CHUNK - 1
            u_end = tl.sum(tl.where(last, u, 0.0), axis=0)
            w_end = tl.sum(tl.where(last[:, None], w, 0.0), axis=0)
            m_end = tl.max(m, axis=0)
        tl.store(u_end_ptr + row, u_end)
        tl.store(w_end_ptr + row * dim + column, w_end, mask=in_dim)

    @triton.jit
    def _backward(
        s_ptr, v_ptr, m0_ptr, m_ptr, r_ptr, g_ptr, a_ptr, gu_ptr, gw_ptr, gs_ptr, gv_ptr, gu0_ptr, gw0_ptr,
        n, dim, lowest, CHUNK: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        token, column = tl.arange(0, CHUNK), tl.arange(0, DIM)
        in_dim = column < dim
        # What later tokens send back, at the scale of the maximum at the end of the chunk at hand.
        later = tl.load(gw_ptr + row * dim + column, mask=in_dim, other=0.0)
        later_along = -tl.load(gu_ptr + row)
        m_end = tl.load(m_ptr + (row * n + n - 1))
        chunks = tl.cdiv(n, CHUNK)
        for step in range(0, chunks):
            start = (chunks - 1 - step) * CHUNK
            i = start + token
            inside = i < n
            s = tl.load(s_ptr + row * n + i, mask=inside, other=float("-inf"))
            m = tl.load(m_ptr + row * n + i, mask=inside, other=0.0)
            per_u = tl.load(r_ptr + row * n + i, mask=inside, other=0.0)
            along = tl.load(a_ptr + row * n + i, mask=inside, other=0.0)
            v_at = (row * n + i)[:, None] * dim + column[None, :]
            whole = inside[:, None] & in_dim[None, :]
            v = tl.load(v_ptr + v_at, mask=whole, other=0.0)
            g = tl.load(g_ptr + v_at, mask=whole, other=0.0)
            # Row i takes from every k ≥ i of its chunk.
            causal = (token[:, None] <= token[None, :]) & inside[None, :]
            weights = tl.exp(tl.where(causal, s[:, None] - m[None, :], float("-inf"))) * per_u[None, :]
            share = tl.exp(s - m_end)
            grad_v = tl.dot(weights, g, input_precision="tf32x3") + share[:, None] * later[None, :]
            taken = tl.sum(weights * along[None, :], axis=1) + share * later_along
            tl.store(gv_ptr + v_at, grad_v, mask=whole)
            tl.store(gs_ptr + row * n + i, tl.sum(v * grad_v, axis=1) - taken, mask=inside)
            m0 = tl.maximum(tl.load(m0_ptr + row), lowest)
            m_start = tl.where(start > 0, tl.load(m_ptr + (row * n + start - 1), mask=start > 0, other=0.0), m0)
            back = tl.where(inside, tl.exp(m_start - m), 0.0) * per_u
            decay = tl.exp(m_start - m_end)
            later = tl.sum(back[:, None] * g, axis=0) + decay * later
            later_along = tl.sum(back * along, axis=0) + decay * later_along
            m_end = m_start
        tl.store(gw0_ptr + row * dim + column, later, mask=in_dim)
        tl.store(gu0_ptr + row, -later_along)


class _TritonScan(torch.autograd.Function):
    """(s, v, state) → (o, state) in float32, all contiguous, one row a program."""

    @staticmethod
    def forward(ctx, s: Tensor, v: Tensor, m0: Tensor, u0: Tensor, w0: Tensor):
        rows, n, dim = v.shape
        outputs, m, per_u = torch.empty_like(v), torch.empty_like(s), torch.empty_like(s)
        u, w = torch.empty_like(u0), torch.empty_like(w0)
        sizes = {"CHUNK": 32 if dim > 128 else 64, "DIM": max(16, triton.next_power_of_2(dim))}
        with torch.cuda.device(v.device):
            _forward[(rows,)](s, v, m0, u0, w0, outputs, m, per_u, u, w, n, dim, LOWEST, **sizes)
        ctx.save_for_backward(s, v, m0, u0, w0, m, per_u, outputs)
        ctx.sizes = sizes
        m_end = m[:, -1].masked_fill(m[:, -1] == LOWEST, -torch.inf)
        ctx.mark_non_differentiable(m_end)
        return outputs, m_end, u, w

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor, grad_u: Tensor, grad_w: Tensor):
        s, v, m0, u0, w0, m, per_u, outputs = ctx.saved_tensors
        if is_differentiated():
            return scan_gradients((s, v, m0, u0, w0), grad, grad_u, grad_w)
        rows, n, dim = v.shape
        grad, grad_u, grad_w = grad.contiguous(), grad_u.contiguous(), grad_w.contiguous()
        along = (grad * outputs).sum(dim=-1)
        grad_s, grad_v = torch.empty_like(s), torch.empty_like(v)
        grad_u0, grad_w0 = torch.empty_like(grad_u), torch.empty_like(grad_w)
        with torch.cuda.device(v.device):
            _backward[(rows,)](
                s, v, m0, m, per_u, grad, along, grad_u, grad_w, grad_s, grad_v, grad_u0, grad_w0, n, dim, LOWEST,
                **ctx.sizes,
            )  # fmt: skip
        return grad_s, grad_v, None, grad_u0, grad_w0


def triton_attention(
    scores: Float[Tensor, "*batch tokens"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    state: PrefixState | None = None,
) -> tuple[Float[Tensor, "*batch tokens dim"], PrefixState]:
    """`chunked_attention` as a GPU kernel; float32 inside. Call it where `available(device)` and dim ≤ 256."""
    *batch, n, dim = values.shape
    if state is None:
        state = PrefixState.empty(*batch, dim=dim, dtype=torch.float32, device=values.device)
    s, v = scores.float(), values.float()
    if mask is not None:
        s, v = s.masked_fill(~mask, -torch.inf), v.masked_fill(~mask.unsqueeze(-1), 0)
    s, v = s.reshape(-1, n).contiguous(), v.reshape(-1, n, dim).contiguous()
    before = [t.float().contiguous() for t in (state.m.detach(), state.u, state.w)]
    before = [before[0].view(-1), before[1].view(-1), before[2].view(-1, dim)]
    rows = len(s)
    spans = max(1, min(PROGRAMS // max(rows, 1), n // SPAN))
    if spans > 1:
        length = -(-n // spans)
        if padding := -n % length:
            s, v = F.pad(s, (0, padding), value=-torch.inf), F.pad(v, (0, 0, 0, padding))
        s, v = s.unflatten(1, (-1, length)), v.unflatten(1, (-1, length))
        before = _before_spans(s, v, *before)
        s, v = s.flatten(0, 1), v.flatten(0, 1)
    outputs, m, u, w = _TritonScan.apply(s, v, *before)
    if spans > 1:
        outputs = outputs.view(rows, -1, dim)[:, :n]
        m, u, w = m.view(rows, -1)[:, -1], u.view(rows, -1)[:, -1], w.view(rows, -1, dim)[:, -1]
    return outputs.reshape(values.shape).to(values.dtype), PrefixState(
        m.view(batch), u.view(batch), w.view(*batch, dim)
    )


def _before_spans(s: Tensor, v: Tensor, m0: Tensor, u0: Tensor, w0: Tensor) -> list[Tensor]:
    """The state before each span of (rows, spans, tokens) scores, as rows: m, u = Σ e^(s−m) and w = Σ e^(s−m) v.

    Gradients go through u and w: of what a sum is divided by and multiplied with again, m, nothing depends.
    """
    m = s.detach().amax(dim=-1).clamp(min=LOWEST)
    weights = (s - m.unsqueeze(-1)).exp()
    m = torch.cat([m0.clamp(min=LOWEST).unsqueeze(1), m[:, :-1]], dim=1)
    u = torch.cat([u0.unsqueeze(1), weights.sum(dim=-1)[:, :-1]], dim=1)
    w = torch.cat([w0.unsqueeze(1), (weights.unsqueeze(-2) @ v).squeeze(-2)[:, :-1]], dim=1)
    largest = m.cummax(dim=1).values
    share = (m.unsqueeze(-2) - largest.unsqueeze(-1)).tril().exp().tril()  # of span j in what stands before span i
    return [largest.flatten(), (share @ u.unsqueeze(-1)).flatten(), (share @ w).flatten(0, 1)]


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on this device and give there what the PyTorch form gives."""
    if triton is None or device.type != "cuda":
        return False
    generator = torch.Generator().manual_seed(0)
    s = (4 * torch.randn(2, 150, generator=generator)).to(device).requires_grad_()
    v = torch.randn(2, 150, 24, generator=generator).to(device).requires_grad_()
    weight = torch.randn(2, 150, 24, generator=generator).to(device)
    try:
        with torch.enable_grad():
            forms = []
            for form in (triton_attention, chunked_attention):
                first, state = form(s[:, :70], v[:, :70])
                second, _ = form(s[:, 70:], v[:, 70:], state=state)
                outputs = torch.cat([first, second], dim=1)
                forms.append((outputs, *torch.autograd.grad((outputs * weight).sum(), (s, v))))
        agree = all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*forms))
        reason = "its values differ from the PyTorch form"
    except Exception as error:
        agree, reason = False, f"{type(error).__name__}: {error}"
    if not agree:
        warnings.warn(f"the Triton kernel of prefix-scan attention is not used on {device}: {reason}", stacklevel=2)
    return agree

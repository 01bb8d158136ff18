"""Prefix-scan attention in PyTorch, for any device: a chunked scan with linear work, and the paper's log-depth scan.

The chunked scan rests on the running maximum m_k = max_{i≤k} s_i, which costs one scalar a token. With it,
w_k = Σ_{i≤k} exp(s_i − m_k) v_i needs no rescaling. Inside a chunk it is a small lower-triangular matrix product whose
exponents are all ≤ 0, and what came before enters as exp(m_end − m_k) times the state at the end of the last chunk.
Those states are themselves such a sum over chunks, so the same step is applied to them, and so on. The work is
linear in the number of tokens, the depth logarithmic, and every product is batched.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import (
    backward_without_autocast,
    is_differentiated,
    is_transformed,
    plain_gradients,
    without_autocast,
)

from .reference import PrefixState, leaves, merge

CHUNK = 16


def _triangle(a: Tensor, b: Tensor) -> Tensor:
    """exp(a_i − b_k) for i ≤ k, else 0, with k the row; b_k ≥ a_i there, so no entry exceeds 1."""
    return (a.unsqueeze(-2) - b.unsqueeze(-1)).exp_().tril_()


def _decayed_sums(level: Tensor, x: Tensor) -> Tensor:
    """y_k = Σ_{i≤k} exp(level_i − level_k) x_i over the second last dimension, for `level` that never falls."""
    b, n, q = x.shape
    if n <= 2 * CHUNK:
        return _triangle(level, level) @ x
    chunks = -(-n // CHUNK)
    padding = chunks * CHUNK - n
    if padding:
        level = torch.cat([level, level[:, -1:].expand(b, padding)], dim=1)
        x = F.pad(x, (0, 0, 0, padding))
    # The last level goes on through the padding, so that no exponent is positive there; the inputs are 0.
    level, x = level.view(b, chunks, CHUNK), x.view(b, chunks, CHUNK, q)
    y = _triangle(level, level) @ x
    ends = level[..., -1]
    # The same sums over the ends of chunks: n / CHUNK of them, and so on to a single product.
    before = _decayed_sums(ends, y[:, :, -1])[:, :-1]
    decay = (ends[:, :-1, None] - level[:, 1:]).exp_()
    y[:, 1:].addcmul_(decay.unsqueeze(-1), before.unsqueeze(-2))
    return y.view(b, chunks * CHUNK, q)[:, :n]


def plain_scan(s: Tensor, v: Tensor, m0: Tensor, u0: Tensor, w0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(s, v, state) → (o, state) by a tokens × tokens matrix; the maxima are constants, as in `PrefixState`.

    In plain operations, for second derivatives and `torch.func`.
    """
    n, lowest = s.shape[1], torch.finfo(s.dtype).min
    m = torch.maximum(s.detach().cummax(dim=1).values, m0.detach().unsqueeze(1)).clamp(min=lowest)
    later = torch.ones(n, n, dtype=torch.bool, device=s.device).triu(1)
    weights = (s.unsqueeze(1) - m.unsqueeze(2)).masked_fill(later, -torch.inf).exp()
    decay = (m0.detach().clamp(min=lowest).unsqueeze(1) - m).exp()
    u = weights.sum(dim=-1) + decay * u0.unsqueeze(1)
    w = weights @ v + decay.unsqueeze(-1) * w0.unsqueeze(1)
    m_end = m[:, -1].masked_fill(m[:, -1] == lowest, -torch.inf)
    return w / u.masked_fill(u == 0, 1).unsqueeze(-1), m_end, u[:, -1], w[:, -1]


def scan_gradients(
    inputs: tuple[Tensor, ...], grad: Tensor, grad_u: Tensor, grad_w: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of (s, v, m0, u0, w0) by `plain_scan`; the maxima have none."""
    s, v, m0, u0, w0 = inputs

    def without_maxima(s: Tensor, v: Tensor, u0: Tensor, w0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs, _, u, w = plain_scan(s, v, m0, u0, w0)
        return outputs, u, w

    grad_s, grad_v, grad_u0, grad_w0 = plain_gradients(without_maxima, (s, v, u0, w0), (grad, grad_u, grad_w))
    return grad_s, grad_v, None, grad_u0, grad_w0


class _ChunkedScan(torch.autograd.Function):
    """(s, v, state) → (o, state) for a whole number of chunks, with the suffix scans as its backward.

    With π_{k,i} = exp(s_i − m_k) / u_k:  ∂L/∂v_i = Σ_{k≥i} π_{k,i} g_k  and  ∂L/∂s_i = Σ_{k≥i} π_{k,i} g_k·(v_i − o_k).
    """

    @staticmethod
    def forward(ctx, s: Tensor, v: Tensor, m0: Tensor, u0: Tensor, w0: Tensor, chunk: int):
        b, n, dim = v.shape
        # The lowest finite number stands for −∞, so that differences of maxima are never −∞ − (−∞).
        lowest = torch.finfo(s.dtype).min
        # The paper carries m through its scan; as a running maximum it costs one pass, and sums need no rescaling.
        m = torch.maximum(s.cummax(dim=1).values, m0.unsqueeze(1)).clamp_(min=lowest)
        ends = torch.cat([m0.clamp(min=lowest).unsqueeze(1), m[:, chunk - 1 :: chunk]], dim=1)
        s_, m_, v_ = (x.unflatten(1, (-1, chunk)) for x in (s, m, v))

        weights = _triangle(s_, m_)
        u, w = weights.sum(dim=-1), weights @ v_
        initial = torch.cat([w0, u0.unsqueeze(1)], dim=1).unsqueeze(1)
        # w and u ride through one scan, side by side.
        totals = torch.cat([w[:, :, -1], u[:, :, -1:]], dim=2)
        states = _decayed_sums(ends, torch.cat([initial, totals], dim=1))
        decay = (ends[:, :-1, None] - m_).exp_()
        u += decay * states[:, :-1, -1:]
        w.addcmul_(decay.unsqueeze(-1), states[:, :-1, None, :-1])
        # 1 / u, which is ∞ where nothing was attended: 0 makes the output 0 there.
        per_u = u.reciprocal_().masked_fill_(u == torch.inf, 0)
        outputs = w.mul_(per_u.unsqueeze(-1)).view(b, n, dim)

        ctx.save_for_backward(s, v, m0, u0, w0, m, per_u, ends, outputs)
        ctx.chunk = chunk
        m_end = ends[:, -1].masked_fill(ends[:, -1] == lowest, -torch.inf)
        ctx.mark_non_differentiable(m_end)
        return outputs, m_end, states[:, -1, -1].clone(), states[:, -1, :-1].clone()

    @staticmethod
    @backward_without_autocast
    def backward(ctx, grad: Tensor, _: Tensor, grad_u: Tensor, grad_w: Tensor):
        *inputs, m, per_u, ends, outputs = ctx.saved_tensors
        if is_differentiated():
            return *scan_gradients(tuple(inputs), grad, grad_u, grad_w), None
        s, v = inputs[:2]
        b, n, dim = v.shape
        s_, m_, g_ = (t.unflatten(1, (-1, ctx.chunk)) for t in (s, m, grad))
        dots = (grad * outputs).sum(dim=-1).view_as(s_)  # g_k·o_k

        weights = _triangle(s_, m_).mul_(per_u.unsqueeze(-1)).mT
        grad_v = weights @ g_
        dot_sums = (weights @ dots.unsqueeze(-1)).squeeze(-1)
        # What a chunk sends to all before it, scaled to the maximum where they end; ≤ 1, since maxima never fall.
        decay_back = (ends[:, :-1, None] - m_).exp_().mul_(per_u)
        chunk_sums = torch.cat(
            [(decay_back.unsqueeze(-2) @ g_).squeeze(-2), (decay_back * dots).sum(dim=-1, keepdim=True)], dim=2
        )
        final_grads = torch.cat([grad_w, -grad_u.unsqueeze(1)], dim=1).unsqueeze(1)
        chunk_sums = torch.cat([chunk_sums, final_grads], dim=1)
        # The suffix scan is the prefix scan of the reversed sequence, whose levels −m never fall.
        suffix_sums = _decayed_sums(-ends.flip(1), chunk_sums.flip(1)).flip(1)
        share = (s_ - ends[:, 1:, None]).exp_()
        grad_v.addcmul_(share.unsqueeze(-1), suffix_sums[:, 1:, None, :-1])
        dot_sums.addcmul_(share, suffix_sums[:, 1:, -1:])
        grad_v = grad_v.view(b, n, dim)
        # Σ π g·v − Σ π g·o: the first is v · ∂L/∂v, at hand already.
        grad_s = (v * grad_v).sum(dim=-1).sub_(dot_sums.view(b, n))
        # m0 has none: it cancels between w and u.
        return grad_s, grad_v, None, -suffix_sums[:, 0, -1], suffix_sums[:, 0, :-1], None


def chunked_attention(
    scores: Float[Tensor, "*batch tokens"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    state: PrefixState | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "*batch tokens dim"], PrefixState]:
    """Attention of a fixed query over every prefix by a chunked scan: linear work, no loop over tokens.

    o_k = w_k / u_k with (m_k, u_k, w_k) merged over tokens 1..k (section 3.2). Sums are held in float32 at least.

    Args:
        scores: s_i, the query against every key, already scaled.
        values: v_i.
        mask: True where a token may be attended; broadcasts to `scores`.
        state: what came before; by default nothing.
        chunk: tokens handled by one small matrix product.

    Returns the output at every token and the state after the last.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    *batch, n, dim = values.shape
    dtype = torch.promote_types(torch.promote_types(scores.dtype, values.dtype), torch.float32)
    if state is None:
        state = PrefixState.empty(*batch, dim=dim, dtype=dtype, device=values.device)
    s, v = scores.to(dtype), values.to(dtype)
    if mask is not None:
        s, v = s.masked_fill(~mask, -torch.inf), v.masked_fill(~mask.unsqueeze(-1), 0)
    rows = math.prod(batch)  # not −1, which an empty batch leaves open
    s, v = s.reshape(rows, n), v.reshape(rows, n, dim)
    chunk = min(n, chunk)
    padding = -n % chunk
    if padding:
        s, v = F.pad(s, (0, padding), value=-torch.inf), F.pad(v, (0, 0, 0, padding))
    m0, u0, w0 = (x.to(dtype).reshape(rows, *x.shape[len(batch) :]) for x in state)
    with without_autocast(v):
        if is_transformed():
            outputs, m, u, w = plain_scan(s, v, m0, u0, w0)
        else:
            outputs, m, u, w = _ChunkedScan.apply(s, v, m0.detach(), u0, w0, chunk)
    final = PrefixState(m.view(batch), u.view(batch), w.view(*batch, dim))
    return outputs[:, :n].reshape(values.shape).to(values.dtype), final


def log_depth_attention(
    scores: Float[Tensor, "*batch tokens"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    state: PrefixState | None = None,
) -> tuple[Float[Tensor, "*batch tokens dim"], PrefixState]:
    """The scan as the paper prints it (Algorithm 1): in round r, token i merges with token i − 2^r.

    ⌈log₂ tokens⌉ rounds, each of which moves every state; the chunked form does linear work instead.
    """
    tokens = leaves(scores, values, mask)
    m, u, w = tokens
    step, n = 1, scores.shape[-1]
    while step < n:
        earlier = PrefixState(m[..., :-step], u[..., :-step], w[..., :-step, :])
        later = PrefixState(m[..., step:], u[..., step:], w[..., step:, :])
        merged = merge(earlier, later)
        # The first 2^r tokens have no partner in this round: they are whole prefixes already.
        m = torch.cat([m[..., :step], merged.m], dim=-1)
        u = torch.cat([u[..., :step], merged.u], dim=-1)
        w = torch.cat([w[..., :step, :], merged.w], dim=-2)
        step *= 2
    prefixes = PrefixState(m, u, w)
    if state is not None:
        prefixes = merge(PrefixState(state.m.unsqueeze(-1), state.u.unsqueeze(-1), state.w.unsqueeze(-2)), prefixes)
    final = PrefixState(prefixes.m[..., -1], prefixes.u[..., -1], prefixes.w[..., -1, :])
    return prefixes.output.to(values.dtype), final

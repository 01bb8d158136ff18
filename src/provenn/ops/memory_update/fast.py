"""The same in PyTorch, for any device: chunks in closed form, with no weights of a token ever written out.

Within a chunk of b tokens, with W_0 and S_0 at its start, E_tj = ∏_{j<i≤t} η_i and A_tj = ∏_{j<i≤t} (1 − α_i),

    S_t = e_t S_0 − Σ_{j≤t} E_tj θ_j u_j,      W_t = a_t W_0 + f_t S_0 − Σ_{j≤t} K_tj θ_j u_j,
    e_t = ∏_{i≤t} η_i,   a_t = ∏_{i≤t} (1 − α_i),   f_t = Σ_{i≤t} A_ti e_i,   K = A E.

A layer's gradient is rank one, u_j = h_jᵀ δ_j, with h_j the layer's input and δ_j the error sent back to its output. So
a read needs no W_t: z_t W_t = a_t z_t W_0 + f_t z_t S_0 − Σ_j K_tj θ_j (z_t·h_j) δ_j, which has the form of attention.
What follows from the gates alone is found for all chunks at once; the loop goes over chunks, since the gradients of one
are taken at the weights that the one before has left.
"""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .reference import ACTIVATIONS, MemoryState, Surprise, clamped


def _slope(activation: str, x: Tensor) -> Tensor:
    """φ′(x)."""
    if activation == "silu":
        gate = x.sigmoid()
        return gate * (1 + x * (1 - gate))
    return 0.5 * (1 + (x * 0.5**0.5).erf()) + x * (-0.5 * x * x).exp() * (0.5 / torch.pi) ** 0.5


class _Gates(NamedTuple):
    """What the gates of a chunk make of the state and of its tokens; `kinds` is 2 with momentum, else 1."""

    keep: Tensor  # (chunks, groups, b, kinds): a_t, f_t
    reach: Tensor  # (chunks, groups, b, b): K_tj θ_j
    carry: Tensor  # (chunks, groups, kinds, kinds): (W, S) at the chunk's end from those at its start
    write: Tensor  # (chunks, groups, kinds, b): K_bj θ_j and E_bj θ_j


def _products(factors: Tensor) -> tuple[Tensor, Tensor]:
    """∏_{j<i≤t} x_i as a lower triangle, and ∏_{i≤t} x_i, over the last dimension."""
    # The root of the smallest number stands for 0: beside it every product vanishes, yet logarithms can be added.
    logs = factors.clamp_min(torch.finfo(factors.dtype).tiny ** 0.5).log().cumsum(dim=-1)
    b = factors.shape[-1]
    later = torch.ones(b, b, dtype=torch.bool, device=factors.device).triu(1)
    return (logs.unsqueeze(-1) - logs.unsqueeze(-2)).masked_fill(later, -torch.inf).exp(), logs.exp()


def _gates(step: Tensor, forget: Tensor, momentum: Tensor | None, seen: Tensor | None, read: str) -> _Gates:
    """All of (chunks, groups, b); a token that is not `seen` leaves W and S as they are."""
    if seen is not None:
        step, forget = step.masked_fill(~seen, 0), forget.masked_fill(~seen, 0)
    decay, a = _products(1 - forget)
    if momentum is None:
        reach, keep, carry = decay, a.unsqueeze(-1), a[..., -1:, None]
        write = decay[..., -1:, :]
    else:
        moving, e = _products(momentum if seen is None else momentum.masked_fill(~seen, 1))
        steps = torch.cat([moving, e.unsqueeze(-1)], dim=-1)
        reached = decay @ (steps if seen is None else steps * seen.unsqueeze(-1))
        reach, f = reached[..., :-1], reached[..., -1]
        keep = torch.stack([a, f], dim=-1)
        last = torch.stack([torch.zeros_like(e[..., -1]), e[..., -1]], dim=-1)
        carry = torch.stack([keep[..., -1, :], last], dim=-2)
        write = torch.stack([reach[..., -1, :], moving[..., -1, :]], dim=-2)
    if read == "pre":
        start = torch.zeros_like(keep[..., :1, :])
        start[..., 0] = 1
        keep = torch.cat([start, keep[..., :-1, :]], dim=-2)
        reach = torch.cat([torch.zeros_like(reach[..., :1, :]), reach[..., :-1, :]], dim=-2)
    return _Gates(keep, reach * step.unsqueeze(-2), carry, write * step.unsqueeze(-2))


def _chunk(
    layers: list[Tensor], anchor: list[Tensor], q: Tensor, k: Tensor, v: Tensor, qk: Tensor, gates: _Gates,
    activation: str, limit: float | int | None, surprised: bool,
) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """One chunk: layers (groups, kinds · rows, columns), q, k, v (groups, b, features), qk (groups, b, b) = q·k."""
    φ = ACTIVATIONS[activation]
    inputs, before = [k], []
    for weight in anchor[:-1]:
        before.append(inputs[-1] @ weight)
        inputs.append(φ(before[-1]))
    error = inputs[-1] @ anchor[-1] - v
    errors = [2 * error]
    for weight, x in zip(anchor[:0:-1], before[::-1]):
        errors.insert(0, (errors[0] @ weight.mT) * _slope(activation, x))

    seen = None
    if surprised or limit is not None:
        square = sum((h.square().sum(-1) * δ.square().sum(-1) for h, δ in zip(inputs, errors)), k.new_zeros(()))
        if limit is not None:
            factor = clamped(square, limit).unsqueeze(-1)
            errors = [δ * factor for δ in errors]
        seen = error.detach().square().sum(-1), square.detach().sqrt()

    after, z = [], q
    for i, (held, h, δ) in enumerate(zip(layers, inputs, errors)):
        z = φ(z) if i else z
        kept = (z.unsqueeze(-2) * gates.keep.unsqueeze(-1)).flatten(-2)
        score = (z @ h.mT if i else qk) * gates.reach
        y = torch.baddbmm(kept @ held, score, δ, alpha=-1)
        carried = (gates.carry @ held.unflatten(1, (gates.carry.shape[-1], -1)).flatten(2)).view_as(held)
        written = (h.mT.unsqueeze(-3) * gates.write.unsqueeze(-2)).flatten(1, 2)
        after.append(torch.baddbmm(carried, written, δ, alpha=-1))
        z = y
    return after, z, seen


def _cut(x: Tensor, *, start: int, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """(chunks, groups, size, ...) of (batch, heads, tokens, ...)."""
    part = x[:, :, start : start + count * size]
    part = part.reshape(part.shape[0] * part.shape[1], count, size, *part.shape[3:])
    return part.transpose(0, 1).to(dtype).contiguous()


def chunked_memory(
    queries: Float[Tensor, "batch heads tokens dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    values: Float[Tensor, "batch heads tokens width"],
    *,
    step: Float[Tensor, "batch heads tokens"],
    forget: Float[Tensor, "batch heads tokens"],
    momentum: Float[Tensor, "batch heads tokens"] | None = None,
    state: MemoryState,
    chunk: int = 1,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    read: str = "post",
    activation: str = "silu",
    limit: float | int | None = None,
    surprised: bool = False,
) -> tuple[Float[Tensor, "batch heads tokens width"], MemoryState, Surprise | None]:
    """The dual form: batched matrix products and a loop over chunks.

    Arguments and results are those of `memory_update`.
    """
    batch, heads, tokens, width = values.shape
    dtype = state.layers[0].dtype
    layers = [x.flatten(2, 3).flatten(0, 1) for x in state.layers]
    anchor = [x.flatten(0, 1) for x in state.anchor]
    position, kinds = state.position, state.layers[0].shape[2]
    if mask is not None:
        hidden = ~mask[:, None, :, None]
        keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)

    # What is left of the chunk that the state is in, whole chunks, and the rest.
    first = min((chunk - position) % chunk, tokens)
    whole = (tokens - first) // chunk
    pieces = [(0, 1, first), (first, whole, chunk), (first + whole * chunk, 1, (tokens - first) % chunk)]
    outputs, surprises = [], []
    for start, count, size in pieces:
        if not count * size:
            continue

        cut = partial(_cut, start=start, count=count, size=size, dtype=dtype)
        q, k, v = cut(queries), cut(keys), cut(values)
        seen = None if mask is None else cut(mask[:, None].expand(batch, heads, tokens)).bool()
        gates = _gates(cut(step), cut(forget), None if momentum is None else cut(momentum), seen, read)
        each = zip(q.unbind(), k.unbind(), v.unbind(), (q @ k.mT).unbind(), zip(*(gate.unbind() for gate in gates)))
        for q_c, k_c, v_c, qk, own in each:
            if position == 0:
                anchor = [x[:, : x.shape[1] // kinds] for x in layers]
            layers, y, surprise = _chunk(layers, anchor, q_c, k_c, v_c, qk, _Gates(*own), activation, limit, surprised)
            outputs.append(y)
            surprises.append(surprise)
            position = (position + size) % chunk
    y = torch.cat(outputs, dim=1).view(batch, heads, tokens, width).to(values.dtype)
    held = tuple(x.unflatten(1, (kinds, -1)).unflatten(0, (batch, heads)) for x in layers)
    at = tuple(x.view(batch, heads, *x.shape[1:]) for x in anchor) if position else tuple(x[:, :, 0] for x in held)
    state = MemoryState(held, at, position)
    if not surprised:
        return y, state, None
    loss, norm = (torch.cat(part, dim=1).view(batch, heads, tokens) for part in zip(*surprises))
    return y, state, Surprise(loss, norm)

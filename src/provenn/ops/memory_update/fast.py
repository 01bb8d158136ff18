"""The same in PyTorch, for any device: chunks in closed form, with no weights of a token ever written out.

Within a chunk of b tokens, with W_0 and S_0 at its start, E_tj = ∏_{j<i≤t} η_i and A_tj = ∏_{j<i≤t} (1 − α_i),

    S_t = e_t S_0 − Σ_{j≤t} E_tj θ_j u_j,      W_t = a_t W_0 + f_t S_0 − Σ_{j≤t} K_tj θ_j u_j,
    e_t = ∏_{i≤t} η_i,   a_t = ∏_{i≤t} (1 − α_i),   f_t = Σ_{i≤t} A_ti e_i,   K = A E.

A layer's gradient is rank one, u_j = h_jᵀ δ_j, with h_j the layer's input and δ_j the error sent back to its output. So
a read needs no W_t: z_t W_t = a_t z_t W_0 + f_t z_t S_0 − Σ_j K_tj θ_j (z_t·h_j) δ_j, which has the form of attention.
Where α differs by channel, a, f and K have the channels too: of the input in the first layer, where they go with z and
h, of the output in the others, where they go with the result and δ.
What follows from the gates alone is computed for many chunks at once; the loop goes over chunks, since the gradients of
one are taken at the weights that the one before has left.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .reference import EPS, MemoryState, Surprise, clamped

ROOM = 2**24  # numbers of the gates' products that are held at once, where nobody asks for gradients
SMALL = 2**16  # numbers of a chunk's K up to which it is written out in one piece: more kernels would take longer


class _Push(NamedTuple):
    """What momentum makes of S in a chunk."""

    into: Tensor  # (chunks, groups, b, C): f_t, the share of S_0 in W_t
    last: Tensor  # (chunks, groups, 1, C): f_b
    fade: Tensor  # (chunks, groups, 1, 1): e_b
    write: Tensor  # (chunks, groups, b, 1): −E_bj θ_j


class _Past(NamedTuple):
    """What earlier blocks of the chunk do to all but the first, which begin at m; 0 for the tokens after m."""

    keep: Tensor  # (chunks, groups, n − 1, s, C): A_tm
    reach: Tensor  # (chunks, groups, n − 1, b − s, C): −K_mj θ_j
    into: Tensor | None  # (chunks, groups, n − 1, s, C): F_tm, the share of S_m in W_t
    echo: Tensor | None  # (chunks, groups, n − 1, 1, b − s): −E_mj θ_j


class _Gates(NamedTuple):
    """What a layer's gates make of its state and of the tokens of a chunk; C is 1 where all channels forget alike."""

    keep: Tensor  # (chunks, groups, b, C): a_t, the share of W_0 in W_t
    reach: Tensor  # (chunks, groups, n, s, C, s): −K_tj θ_j within each of n blocks
    left: Tensor  # (chunks, groups, 1, C): a_b
    write: Tensor  # (chunks, groups, b, C): −K_bj θ_j
    push: _Push | None
    past: _Past | None


def _by_chunk(gates: _Gates) -> list[_Gates]:
    """The gates of each chunk; a function, since compilers do not trace methods of tuples."""
    count = len(gates.keep)
    pushes: list[_Push | None] = [None] * count
    pasts: list[_Past | None] = [None] * count
    if gates.push is not None:
        pushes = [_Push(*chunk) for chunk in zip(*(part.unbind() for part in gates.push))]
    if gates.past is not None:
        pasts = [_Past(*c) for c in zip(*([None] * count if part is None else part.unbind() for part in gates.past))]
    parts = zip(gates.keep.unbind(), gates.reach.unbind(), gates.left.unbind(), gates.write.unbind(), pushes, pasts)
    return [_Gates(*chunk) for chunk in parts]


def _products(factors: Tensor) -> tuple[Tensor, Tensor]:
    """∏_{j<i≤t} x_i, (..., t, C, j) and 0 for j > t, and ∏_{i≤t} x_i, of x (..., b, C)."""
    # The root of the smallest number stands for 0: beside it every product vanishes, yet logarithms can be added.
    # Smaller products are 0: matrix products of subnormal numbers take twenty times as long.
    root = torch.finfo(factors.dtype).tiny ** 0.5
    logs = factors.clamp_min(root).log().cumsum(dim=-2)
    b = factors.shape[-2]
    later = torch.ones(b, b, dtype=torch.bool, device=factors.device).triu(1)
    # Masked before the exponential: later tokens would overflow it, and a quotient of products would be 0 / 0.
    # In place, since these are the largest numbers of all, and their derivatives need nothing of what is overwritten.
    between = logs.unsqueeze(-1) - logs.mT.unsqueeze(-3)
    between = between.masked_fill_((between < math.log(root)) | later.unsqueeze(-2), -torch.inf).exp_()
    return between, logs.masked_fill(logs < math.log(root), -torch.inf).exp()


def _gates(step: Tensor, forget: Tensor, momentum: Tensor | None, seen: Tensor | None, read: str) -> _Gates:
    """Of (chunks, groups, b) and, to forget, (chunks, groups, b, C); a token not `seen` leaves W and S as they are."""
    if seen is not None:
        step, forget = step.masked_fill(~seen, 0), forget.masked_fill(~seen.unsqueeze(-1), 0)
    decay, keep = _products(1 - forget)
    rate = -step.unsqueeze(-2)
    push = None
    if momentum is None:
        reach = decay * rate.unsqueeze(-2)
    else:
        still, e = _products((momentum if seen is None else momentum.masked_fill(~seen, 1)).unsqueeze(-1))
        still, fade = still.squeeze(-2) * rate, e[..., -1:, :]
        write = still[..., -1, :].unsqueeze(-1)
        if seen is not None:
            still, e = still * seen.unsqueeze(-1), e * seen.unsqueeze(-1)
        # Σ_i A_ti E_ij θ_j for every channel: one matrix product, the channels among the rows.
        rows = decay.flatten(-3, -2)
        reach, into = (rows @ still).view_as(decay), (rows @ e).view_as(keep)
        push = _Push(into, into[..., -1:, :], fade, write)
    left, last = keep[..., -1:, :], reach[..., -1, :, :].mT
    if read == "pre":
        keep = torch.cat([torch.ones_like(keep[..., :1, :]), keep[..., :-1, :]], dim=-2)
        push = None if push is None else push._replace(into=F.pad(push.into[..., :-1, :], (0, 0, 1, 0)))
        reach = F.pad(reach[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
    return _Gates(keep, reach.unsqueeze(-4), left, last, push, None)


def _block(groups: int, size: int, channels: int) -> int:
    """How many tokens to a block: K has b² C numbers, and in blocks of s about (s + b/s) b C."""
    if channels == 1 or groups * size * size * channels <= SMALL:
        return size
    best, cost = size, size
    for s in range(1, size):  # written out, since compilers do not trace `min` by a key
        if not size % s and s + size // s < cost:
            best, cost = s, s + size // s
    return best


def _blocked(step: Tensor, forget: Tensor, momentum: Tensor | None, seen: Tensor | None, read: str) -> _Gates:
    """`_gates` of a chunk that is cut in blocks, so that no more than a block's K is written out.

    Where j ≤ m < t, K_tj = A_tm K_mj + F_tm E_mj: what came before a block reaches it by way of W and S at its start m.
    """
    size, groups = step.shape[-1], step.shape[1]
    s = _block(groups, size, forget.shape[-1])
    if s == size:
        return _gates(step, forget, momentum, seen, read)
    n = size // s
    step, forget = (x.unflatten(2, (n, s)).flatten(1, 2) for x in (step, forget))
    momentum, seen = (None if x is None else x.unflatten(2, (n, s)).flatten(1, 2) for x in (momentum, seen))
    block = _gates(step, forget, momentum, seen, read)
    keep, write, left = (x.unflatten(1, (groups, n)) for x in (block.keep, block.write, block.left))
    # From boundary J to boundary I of the n + 1: (chunks, groups, I, J, C).
    kept = _products(F.pad(left.squeeze(-2), (0, 0, 1, 0), value=1))[0].mT
    whole = keep * kept[..., :-1, :1, :]
    past = kept[..., 1:-1, 1:-1, None, :] * write[..., None, :-1, :, :]
    last = kept[..., -1, 1:, None, :] * write
    push, into, echo = None, None, None
    if block.push is not None:
        into, end, fade, wrote = (x.unflatten(1, (groups, n)) for x in block.push)
        fades = _products(F.pad(fade.squeeze(-2), (0, 0, 1, 0), value=1))[0].squeeze(-2)
        # Σ_l A_Il f_l E_(l−1)J: what S at boundary J has become in W at boundary I.
        rows = (kept * F.pad(end.squeeze(-2), (0, 0, 1, 0)).unsqueeze(-3)).mT.flatten(-3, -2)
        come = (rows @ F.pad(fades[..., :-1, :], (0, 0, 1, 0))).unflatten(-2, (n + 1, -1)).mT
        echo = (fades[..., 1:-1, 1:-1, None] * wrote[..., None, :-1, :, 0]).flatten(-2).unsqueeze(-2)
        past = torch.addcmul(past, come[..., 1:-1, 1:-1, None, :], wrote[..., None, :-1, :, :])
        last = torch.addcmul(last, come[..., -1, 1:, None, :], wrote)
        moved = torch.addcmul(keep * come[..., :-1, :1, :], into, fades[..., :-1, :1, None])
        push = _Push(
            moved.flatten(-3, -2),
            come[..., -1, :1, :],
            fades[..., -1:, :1],
            (fades[..., -1, 1:, None, None] * wrote).flatten(-3, -2),
        )
        into = into[..., 1:, :, :]
    return _Gates(
        whole.flatten(-3, -2),
        block.reach.squeeze(2).unflatten(1, (groups, n)),
        kept[..., -1, :1, :],
        last.flatten(-3, -2),
        push,
        _Past(keep[..., 1:, :, :], past.flatten(-3, -2), into, echo),
    )


def _first_scores(q: Tensor, k: Tensor, gates: _Gates) -> Tensor:
    """−Σ_c q_tc K_tcj θ_j k_jc, (chunks, groups, b, b): what the first layer needs of its tokens, known beforehand."""
    reach, past = gates.reach, gates.past
    if reach.shape[-2] == 1:
        return (q @ k.mT) * reach.squeeze(-2).squeeze(-3)
    n, s = reach.shape[-4:-2]
    rows, columns = q.unflatten(-2, (n, s)), k.unflatten(-2, (n, s)).mT
    near = (rows.unsqueeze(-2) @ (reach * columns.unsqueeze(-3))).squeeze(-2)
    if past is None:
        return near.squeeze(-3)
    late, early = rows[..., 1:, :, :], k[..., None, :-s, :]
    far = (late * past.keep) @ (past.reach * early).mT
    if past.into is not None and past.echo is not None:
        far = torch.addcmul(far, (late * past.into) @ early.mT, past.echo)
    scores = torch.diag_embed(near.movedim(-3, -1), dim1=-4, dim2=-2).flatten(-2).flatten(-3, -2)
    return scores + F.pad(far.flatten(-3, -2), (0, s, s, 0))


def _normed_back(error: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """An error behind a layer norm without weights, sent back before it."""
    error = error - error.mean(-1, keepdim=True) - normed * (error * normed).mean(-1, keepdim=True)
    return error * scale


def _errors(
    anchor: Sequence[Tensor], k: Tensor, v: Tensor, residual: bool
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Each layer's inputs h and errors δ at the weights of the chunk's start, and M(k) − v."""
    inputs, before = [k], []
    for weight in anchor[:-1]:
        before.append(inputs[-1] @ weight)
        inputs.append(F.gelu(before[-1]))
    y = inputs[-1] @ anchor[-1]
    if residual:
        centred = y - y.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
        normed = centred * scale
        difference = k + normed - v
        errors = [_normed_back(2 * difference, normed, scale)]
    else:
        difference = y - v
        errors = [2 * difference]
    for weight, x in zip(anchor[:0:-1], before[::-1]):
        # One kernel for δ · GELU′(x), differentiable itself; written out it is a dozen.
        errors.insert(0, torch.ops.aten.gelu_backward(errors[0] @ weight.mT, x))
    return inputs, errors, difference


def _read(z: Tensor, i: int, weight: Tensor, moving: Tensor | None, gates: _Gates) -> Tensor:
    """a_t z_t W_0 + f_t z_t S_0."""
    y = (z * gates.keep) @ weight if not i else gates.keep * (z @ weight)
    if moving is None or gates.push is None:
        return y
    into = gates.push.into
    return torch.addcmul(y, into, z @ moving) if i else torch.baddbmm(y, z * into, moving)


def _written(y: Tensor, z: Tensor, i: int, h: Tensor, δ: Tensor, first: Tensor, gates: _Gates) -> Tensor:
    """y_t − Σ_j K_tj θ_j (z_t·h_j) δ_j."""
    if not i:
        return torch.baddbmm(y, first, δ)
    reach, past = gates.reach, gates.past
    score = z @ h.mT
    if reach.shape[-2] == 1:
        return torch.baddbmm(y, score * reach.squeeze(-2).squeeze(-3), δ)
    n, s = reach.shape[-4:-2]
    blocks = score.unflatten(-1, (n, s)).unflatten(-3, (n, s))
    near = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).unsqueeze(-1)
    y = y + ((reach * δ.unflatten(-2, (n, s)).mT.unsqueeze(-3)) @ near).squeeze(-1).flatten(-3, -2)
    if past is None:
        return y
    late, early = score.unflatten(-2, (n, s))[..., 1:, :, :-s], δ[..., None, :-s, :]
    far = past.keep * (late @ (past.reach * early))
    if past.into is not None and past.echo is not None:
        far = torch.addcmul(far, past.into, (late * past.echo) @ early)
    return y + F.pad(far.flatten(-3, -2), (0, 0, s, 0))


def _after(
    i: int, weight: Tensor, moving: Tensor | None, h: Tensor, δ: Tensor, gates: _Gates
) -> tuple[Tensor, Tensor | None]:
    """W and S at the chunk's end."""
    left = gates.left if i else gates.left.mT
    kept = left * weight
    if moving is not None and gates.push is not None:
        kept = torch.addcmul(kept, gates.push.last if i else gates.push.last.mT, moving)
        moving = torch.baddbmm(gates.push.fade * moving, (h * gates.push.write).mT, δ)
    inputs, errors = (h.mT, δ * gates.write) if i else ((h * gates.write).mT, δ)
    return torch.baddbmm(kept, inputs, errors), moving


def _cut(x: Tensor, *, start: int, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """(chunks, groups, size, ...) of (batch, heads, tokens, ...)."""
    part = x[:, :, start : start + count * size]
    part = part.reshape(part.shape[0] * part.shape[1], count, size, *part.shape[3:])
    return part.transpose(0, 1).to(dtype).contiguous()


def _pieces(tokens: int, position: int, chunk: int, most: int) -> list[tuple[int, int, int]]:
    """Start, chunks and tokens a chunk: what is left of the chunk that the state is in, whole chunks, and the rest."""
    first = min((chunk - position) % chunk, tokens)
    whole = (tokens - first) // chunk
    pieces = [(0, 1, first)]
    pieces += [(first + i * chunk, min(most, whole - i), chunk) for i in range(0, whole, most)]
    pieces.append((first + whole * chunk, 1, (tokens - first) % chunk))
    return [piece for piece in pieces if piece[1] * piece[2]]


def chunked_memory(
    queries: Float[Tensor, "batch heads tokens dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    values: Float[Tensor, "batch heads tokens width"],
    *,
    step: Float[Tensor, "gates batch heads tokens"],
    forget: Sequence[Float[Tensor, "batch heads tokens _"]],
    momentum: Float[Tensor, "gates batch heads tokens"] | None = None,
    state: MemoryState,
    chunk: int = 1,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    read: str = "post",
    residual: bool = True,
    limit: float | int | None = None,
    surprised: bool = False,
) -> tuple[Float[Tensor, "batch heads tokens width"], MemoryState, Surprise | None]:
    """The dual form: batched matrix products and a loop over chunks.

    Arguments and results are those of `memory_update`.
    """
    batch, heads, tokens, width = values.shape
    dtype, groups, depth = state.weights[0].dtype, batch * heads, len(state.weights)
    weights, moving, anchor = ([x.flatten(0, 1) for x in part] for part in state[:3])
    position = state.position
    if mask is not None:
        hidden = ~mask[:, None, :, None]
        keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    products = max(1, groups * chunk * chunk * max(gate.shape[-1] for gate in forget))
    most = max(1, tokens if torch.is_grad_enabled() else ROOM // products)
    outputs, surprises = [], []
    for start, count, size in _pieces(tokens, position, chunk, most):
        cut = partial(_cut, start=start, count=count, size=size, dtype=dtype)
        q, k, v = cut(queries), cut(keys), cut(values)
        seen = None if mask is None else cut(mask[:, None].expand(batch, heads, tokens)).bool()
        gates = [
            _blocked(cut(step[i]), cut(forget[i]), None if momentum is None else cut(momentum[i]), seen, read)
            for i in range(len(step))
        ] * (depth if len(step) == 1 else 1)
        scores = _first_scores(q, k, gates[0])
        for c, layers in enumerate(zip(*(_by_chunk(gate) for gate in gates))):
            if position == 0:
                anchor = weights
            inputs, errors, difference = _errors(anchor, k[c], v[c], residual)
            if surprised or limit is not None:
                square = sum((h.square().sum(-1) * δ.square().sum(-1) for h, δ in zip(inputs, errors)), k.new_zeros(()))
                surprises.append((difference.detach().square().sum(-1), square.detach().sqrt()))
                if limit is not None:
                    errors = [δ * clamped(square, limit).unsqueeze(-1) for δ in errors]
            z, after = q[c], []
            pushed: list[Tensor | None] = [*moving] if moving else [None] * depth
            for i, (weight, s, h, δ, gate) in enumerate(zip(weights, pushed, inputs, errors, layers)):
                z = F.gelu(z) if i else z
                z = _written(_read(z, i, weight, s, gate), z, i, h, δ, scores[c], gate)
                after.append(_after(i, weight, s, h, δ, gate))
            weights, moving = [w for w, _ in after], [s for _, s in after if s is not None]
            outputs.append(q[c] + F.layer_norm(z, z.shape[-1:], eps=EPS) if residual else z)
            position = (position + size) % chunk
    y = torch.cat(outputs, dim=1).view(batch, heads, tokens, width).to(values.dtype)
    parts = (weights, moving, anchor if position else weights)
    held, pushes, at = (tuple(x.view(batch, heads, *x.shape[1:]) for x in part) for part in parts)
    state = MemoryState(held, pushes, at, position)
    if not surprised:
        return y, state, None
    loss, norm = (torch.cat(part, dim=1).view(batch, heads, tokens) for part in zip(*surprises))
    return y, state, Surprise(loss, norm)

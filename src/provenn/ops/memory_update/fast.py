"""The same in PyTorch, for any device: chunks in closed form, with no weights of a token ever written out.

Within a chunk of b tokens, with W_0 and S_0 at its start, E_tj = ∏_{j<i≤t} η_i and A_tj = ∏_{j<i≤t} (1 − α_i),

    S_t = e_t S_0 − Σ_{j≤t} E_tj θ_j u_j,      W_t = a_t W_0 + f_t S_0 − Σ_{j≤t} K_tj θ_j u_j,
    e_t = ∏_{i≤t} η_i,   a_t = ∏_{i≤t} (1 − α_i),   f_t = Σ_{i≤t} A_ti e_i,   K = A E.

A layer's gradient is rank one, u_j = h_jᵀ δ_j, with h_j the layer's input and δ_j the error sent back to its output. So
a read needs no W_t: z_t W_t = a_t z_t W_0 + f_t z_t S_0 − Σ_j K_tj θ_j (z_t·h_j) δ_j, which has the form of attention.
Where α differs by channel, a, f and K have the channels too. They are of the input in the first layer, where they go
with z and h, and of the output in the others, where they go with the result and δ. There K is never written out: see
`_Blocks`. What follows from the gates alone is computed for many chunks at once; the loop goes over chunks, since the
gradients of one are taken at the weights that the one before has left.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import backward_without_autocast, is_differentiated, is_transformed, plain_gradients

from .reference import EPS, MemoryState, Surprise, clamped, read_memory

ROOM = 2**19  # numbers that the products of a stretch's gates may have
SMALL = 2**16  # numbers of a layer's gates up to which kernels, not numbers, take the time
BLOCK = 8  # tokens, at most, within which products are quotients of others


class _Blocks(NamedTuple):
    """How the tokens of a chunk reach each other, in n blocks of s tokens where channels forget by themselves.

    Within a block K_tj = x_t Σ_i E_ij / x_i, of i from j to t. Where j ≤ m < t, K_tj = A_tm K_mj + F_tm E_mj: what came
    before a block reaches it by way of W and S at its start m. So K itself is nowhere written out.
    """

    x: Tensor  # (chunks, groups, n, s, C): ∏ (1 − α) from the middle of the block to t
    inverse: Tensor  # (chunks, groups, n, s, C)
    still: Tensor | None  # (chunks, groups, n, s, s): E_ij
    keep: Tensor  # (chunks, groups, n − 1, s, C): A_tm
    into: Tensor | None  # (chunks, groups, n − 1, s, C): F_tm, the share of S_m in W_t
    reach: Tensor  # (chunks, groups, n − 1, s, C): K_ej, e the end of the block of j
    kept: Tensor  # (chunks, groups, n − 1, n − 1, C): A_me; 0 for the blocks after m
    come: Tensor | None  # (chunks, groups, n − 1, n − 1, C): F_me
    echo: Tensor | None  # (chunks, groups, n − 1, s, 1): E_ej
    echoes: Tensor | None  # (chunks, groups, n − 1, 1, b − s): E_mj


class _Gates(NamedTuple):
    """What a layer's gates make of its state and of the tokens of a chunk; C is 1 where all channels forget alike."""

    keep: Tensor  # (chunks, groups, b, C): a_t, the share of W_0 in W_t
    into: Tensor | None  # (chunks, groups, b, C): f_t, the share of S_0 in W_t
    left: Tensor  # (chunks, groups, 1, C): a_b
    moved: Tensor | None  # (chunks, groups, 1, C): f_b
    fade: Tensor | None  # (chunks, groups, 1, 1): e_b
    write: Tensor  # (chunks, groups, b, C): K_bj
    echo: Tensor | None  # (chunks, groups, b, 1): E_bj
    rate: Tensor  # (chunks, groups, b, 1): −θ_j
    within: Tensor | _Blocks  # (chunks, groups, b, b): K_tj, where C is 1


def _parts(tensors: Any, count: int, take: Callable[[Tensor], Sequence[Tensor]]) -> list[Any]:
    return [*zip(*([None] * count if x is None else take(x) for x in tensors))]


def _each(gates: _Gates, count: int, take: Callable[[Tensor], Sequence[Tensor]]) -> list[_Gates]:
    """Gates in `count` parts, which `take` makes of each tensor; a function: compilers trace no methods of tuples."""
    across: Any = gates.within
    blocked = isinstance(across, _Blocks)
    within: Any = [_Blocks(*part) for part in _parts(across, count, take)] if blocked else take(across)
    rest = _parts(gates[:-1], count, take)
    return [_Gates(*part, last) for part, last in zip(rest, within)]  # type: ignore[call-arg]  # parts of any length


def _flushed(products: Tensor) -> Tensor:
    """The root of the smallest number and less is 0: matrix products of subnormal numbers take twenty times as long."""
    return F.threshold(products, torch.finfo(products.dtype).tiny ** 0.5, 0.0)


def _products(factors: Tensor) -> tuple[Tensor, Tensor]:
    """∏_{j<i≤t} x_i, (..., t, j, C) and 0 for j > t, and ∏_{i≤t} x_i, of x (..., b, C)."""
    # The root of the smallest number stands for 0: beside it every product vanishes, yet logarithms can be added.
    root = torch.finfo(factors.dtype).tiny ** 0.5
    logs = factors.clamp_min(root).log().cumsum(dim=-2)
    later = _later(factors.shape[-2], factors)
    # Masked before the exponential: later tokens would overflow it, and a quotient of products would be 0 / 0.
    between = logs.unsqueeze(-2) - logs.unsqueeze(-3)
    between = between.masked_fill((between < math.log(root)) | later.unsqueeze(-1), -torch.inf).exp()
    return between, logs.masked_fill(logs < math.log(root), -torch.inf).exp()


def _gates(step: Tensor, forget: Tensor, momentum: Tensor | None, seen: Tensor | None) -> _Gates:
    """Of (chunks, groups, b) and, to forget, (chunks, groups, b, C); a token not `seen` leaves W and S as they are."""
    if seen is not None:
        step, forget = step.masked_fill(~seen, 0), forget.masked_fill(~seen.unsqueeze(-1), 0)
        momentum = None if momentum is None else momentum.masked_fill(~seen, 1)
    rate = -step.unsqueeze(-1)
    if forget.shape[-1] > 1:
        return _blocked(rate, forget, momentum, seen)
    within, keep = _products(1 - forget)
    within = within.squeeze(-1)
    if momentum is None:
        return _Gates(keep, None, keep[..., -1:, :], None, None, within[..., -1, :, None], None, rate, within)
    still, e = _products(momentum.unsqueeze(-1))
    still = still.squeeze(-1)
    fade, echo = e[..., -1:, :], still[..., -1, :, None]
    if seen is not None:
        still, e = still * seen.unsqueeze(-1), e * seen.unsqueeze(-1)
    within, into = within @ still, within @ e
    last, moved = within[..., -1, :, None], into[..., -1:, :]
    return _Gates(keep, into, keep[..., -1:, :], moved, fade, last, echo, rate, within)


def _blocked(rate: Tensor, forget: Tensor, momentum: Tensor | None, seen: Tensor | None) -> _Gates:
    """`_gates` of channels that forget by themselves."""
    s = min(BLOCK, forget.shape[2])
    n = forget.shape[2] // s
    # What stands for 0 is no larger than a rounding, and no product of half a block of them overflows when turned over.
    floor = torch.finfo(forget.dtype).tiny ** (1.5 / BLOCK)
    logs = (1 - forget).unflatten(2, (n, s)).clamp_min(floor).log2().cumsum(dim=-2)
    keep = _flushed(logs.exp2())
    # By a power of two, which rounds nothing: whatever the later tokens bring, no bit changes before them.
    whole_logs = logs.detach().floor()
    scale = (whole_logs - whole_logs[..., (s - 1) // 2, None, :]).exp2()
    fraction = logs - whole_logs
    x, inverse = fraction.exp2() * scale, (-fraction).exp2() / scale
    left = keep[..., -1, :]
    kept = _products(F.pad(left, (0, 0, 1, 0), value=1))[0]  # (chunks, groups, I, J, C), of the n + 1 ends of blocks
    whole = (keep * kept[..., :-1, :1, :]).flatten(2, 3)
    if momentum is None:
        reach = _flushed(x[..., -1:, :] * inverse)
        last = (kept[..., -1, 1:, None, :] * reach).flatten(2, 3)
        near = _Blocks(
            x,
            inverse,
            None,
            keep[..., 1:, :, :],
            None,
            reach[..., :-1, :, :],
            kept[..., 1:-1, 1:-1, :],
            None,
            None,
            None,
        )
        return _Gates(whole, None, kept[..., -1, :1, :], None, None, last, None, rate, near)
    still, e = _products(momentum.unflatten(2, (n, s)).unsqueeze(-1))
    still = still.squeeze(-1)
    fade, echo = e[..., -1, :], still[..., -1, :].unsqueeze(-1)
    if seen is not None:
        shown = seen.unflatten(2, (n, s)).unsqueeze(-1)
        still, e = still * shown, e * shown
    into = _flushed(x * (inverse * e).cumsum(dim=-2))
    reach = _flushed(x[..., -1:, :] * (still.mT @ inverse))
    moved = into[..., -1, :]
    fades = _products(F.pad(fade, (0, 0, 1, 0), value=1))[0]  # (chunks, groups, I, J, 1)
    # Σ_l A_Il f_l E_(l−1)J: what S at end J has become in W at end I.
    before = F.pad(fades.squeeze(-1)[..., :-1, :], (0, 0, 1, 0)).mT
    come = before.unsqueeze(-3) @ (kept * F.pad(moved, (0, 0, 1, 0)).unsqueeze(-3))
    echoes = (fades[..., 1:-1, 1:-1, :] * echo[..., None, :-1, :, 0]).flatten(-2).unsqueeze(-2)
    near = _Blocks(
        x,
        inverse,
        still,
        keep[..., 1:, :, :],
        into[..., 1:, :, :],
        reach[..., :-1, :, :],
        kept[..., 1:-1, 1:-1, :],
        come[..., 1:-1, 1:-1, :],
        echo[..., :-1, :, :],
        echoes,
    )
    return _Gates(
        whole,
        torch.addcmul(keep * come[..., :-1, :1, :], into, fades[..., :-1, :1, :]).flatten(2, 3),
        kept[..., -1, :1, :],
        come[..., -1, :1, :],
        fades[..., -1, :1, :],
        torch.addcmul(kept[..., -1, 1:, None, :] * reach, come[..., -1, 1:, None, :], echo).flatten(2, 3),
        (fades[..., -1, 1:, None, :] * echo).flatten(2, 3),
        rate,
        near,
    )


def _layers(parts: Sequence[tuple[Tensor, Tensor, Tensor | None]], seen: Tensor | None) -> list[_Gates]:
    """The gates of each layer; few of equally many channels at once, as chunks of one: fewer kernels."""
    channels = [forget.shape[-1] for _, forget, _ in parts]
    if min(channels) < max(channels) or parts[0][1].numel() > SMALL:
        return [_gates(*part, seen) for part in parts]
    step, forget, momentum = zip(*parts)
    pushed = None if momentum[0] is None else torch.cat(momentum)
    gates = _gates(torch.cat(step), torch.cat(forget), pushed, None if seen is None else seen.repeat(len(parts), 1, 1))
    return _each(gates, len(parts), lambda x: x.chunk(len(parts)))


def _later(size: int, x: Tensor) -> Tensor:
    """Which i are after t, (t, i). Quotients of products overflow there, and 0 · ∞ is not 0: mask, do not multiply."""
    return torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)


def _pairs(x: Tensor, blocks: _Blocks) -> Tensor:
    """Within each block y_jc / x_ic for all i and j, (..., n, s s, C), of y (..., b, C)."""
    return (blocks.inverse.unsqueeze(-2) * x.unflatten(-2, blocks.x.shape[-3:-1]).unsqueeze(-3)).flatten(-3, -2)


def _carried(y: Tensor, blocks: _Blocks) -> Tensor:
    """K_mj y_j for each block's start m but the first's, (..., n − 1, b − s, C), of y (..., b − s, C)."""
    y = y.unflatten(-2, blocks.reach.shape[-3:-1])
    carried = blocks.kept.unsqueeze(-2) * (blocks.reach * y).unsqueeze(-4)
    if blocks.come is not None and blocks.echo is not None:
        carried = torch.addcmul(carried, blocks.come.unsqueeze(-2), (blocks.echo * y).unsqueeze(-4))
    return carried.flatten(-3, -2)


def _first_scores(q: Tensor, k: Tensor, gates: _Gates) -> Tensor:
    """−Σ_c q_tc K_tcj θ_j k_jc, (chunks, groups, b, b): what the first layer needs of its tokens, known beforehand."""
    blocks = gates.within
    if not isinstance(blocks, _Blocks):
        return (q @ k.mT) * (blocks * gates.rate.mT)
    k = k * gates.rate
    n, s = blocks.x.shape[-3:-1]
    rows = q.unflatten(-2, (n, s))
    here = rows * blocks.x
    if blocks.still is None:
        near = (here @ (blocks.inverse * k.unflatten(-2, (n, s))).mT).tril()
    else:
        sums = (here @ _pairs(k, blocks).mT).unflatten(-1, (s, s))
        near = (sums.masked_fill(_later(s, q).unsqueeze(-1), 0) * blocks.still.unsqueeze(-3)).sum(dim=-2)
    if n == 1:
        return near.squeeze(2)
    late, early = rows[..., 1:, :, :], k[..., :-s, :]
    far = (late * blocks.keep) @ _carried(early, blocks).mT
    if blocks.into is not None and blocks.echoes is not None:
        far = torch.addcmul(far, (late * blocks.into) @ early.unsqueeze(-3).mT, blocks.echoes)
    scores = torch.diag_embed(near.movedim(-3, -1), dim1=-4, dim2=-2).flatten(-2).flatten(-3, -2)
    return scores + F.pad(far.flatten(-3, -2), (0, s, s, 0))


def _plain_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.gelu(x), torch.ops.aten.gelu_backward(torch.ones_like(x), x)


class _Gelu(torch.autograd.Function):
    """GELU and its slope. The slope of both is x ↦ φ(x) (2 − x²), which autograd takes a dozen kernels for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y, slope = _plain_gelu(x)
        ctx.save_for_backward(x, slope)
        return y, slope

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, of_y: Tensor, of_slope: Tensor) -> Tensor:
        x, slope = ctx.saved_tensors
        if is_differentiated():
            return plain_gradients(_plain_gelu, (x,), (of_y, of_slope))[0]
        square = x.square()
        curve = torch.exp(-0.5 * square).mul_(square.sub_(2)).mul_(of_slope)
        return torch.addcmul(of_y * slope, curve, curve.new_full((1,), -((2 * math.pi) ** -0.5)))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU(x) and GELU′(x)."""
    return _plain_gelu(x) if is_transformed() or torch.compiler.is_compiling() else _Gelu.apply(x)


def _normed_back(error: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """An error behind a layer norm without weights, sent back before it."""
    error = error - error.mean(-1, keepdim=True) - normed * (error * normed).mean(-1, keepdim=True)
    return error * scale


def _errors(
    anchor: Sequence[Tensor], k: Tensor, v: Tensor, residual: bool
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Each layer's inputs h and errors δ at the weights of the chunk's start, and M(k) − v."""
    inputs, slopes = [k], []
    for weight in anchor[:-1]:
        h, slope = _gelu(inputs[-1] @ weight)
        inputs.append(h)
        slopes.append(slope)
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
    for weight, slope in zip(anchor[:0:-1], slopes[::-1]):
        errors.insert(0, (errors[0] @ weight.mT) * slope)
    return inputs, errors, difference


def _read(z: Tensor, i: int, weight: Tensor, moving: Tensor | None, gates: _Gates) -> Tensor:
    """a_t z_t W_0 + f_t z_t S_0."""
    y = (z * gates.keep) @ weight if not i else gates.keep * (z @ weight)
    if moving is None or gates.into is None:
        return y
    into = gates.into
    return torch.addcmul(y, into, z @ moving) if i else torch.baddbmm(y, z * into, moving)


def _written(y: Tensor, z: Tensor, i: int, h: Tensor, δ: Tensor, first: Tensor, gates: _Gates) -> Tensor:
    """y_t − Σ_j K_tj θ_j (z_t·h_j) δ_j."""
    if not i:
        return torch.baddbmm(y, first, δ)
    score, blocks = z @ h.mT, gates.within
    if not isinstance(blocks, _Blocks):
        return torch.baddbmm(y, score * (blocks * gates.rate.mT), δ)
    δ = δ * gates.rate
    n, s = blocks.x.shape[-3:-1]
    near = score.unflatten(-1, (n, s)).unflatten(-3, (n, s)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    if blocks.still is None:
        near = near.tril() @ (blocks.inverse * δ.unflatten(-2, (n, s)))
    else:
        sums = (near.unsqueeze(-2) * blocks.still.unsqueeze(-3)).masked_fill(_later(s, δ).unsqueeze(-1), 0)
        near = sums.flatten(-2) @ _pairs(δ, blocks)
    y = y + (blocks.x * near).flatten(-3, -2)
    if n == 1:
        return y
    late, early = score.unflatten(-2, (n, s))[..., 1:, :, :-s], δ[..., :-s, :]
    far = blocks.keep * (late @ _carried(early, blocks))
    if blocks.into is not None and blocks.echoes is not None:
        far = torch.addcmul(far, blocks.into, (late * blocks.echoes) @ early.unsqueeze(-3))
    return y + F.pad(far.flatten(-3, -2), (0, 0, s, 0))


def _after(
    i: int, weight: Tensor, moving: Tensor | None, h: Tensor, δ: Tensor, gates: _Gates
) -> tuple[Tensor, Tensor | None]:
    """W and S at the chunk's end."""
    left = gates.left if i else gates.left.mT
    kept = left * weight
    # Either factor of a rank-one gradient may take the gates; channels go with the one that has them.
    h, δ = (h, δ * gates.rate) if i else (h * gates.rate, δ)
    inputs, errors = (h, δ * gates.write) if i else (h * gates.write, δ)
    if moving is not None and gates.moved is not None and gates.fade is not None and gates.echo is not None:
        kept = torch.addcmul(kept, gates.moved if i else gates.moved.mT, moving)
        moving = torch.baddbmm(gates.fade * moving, h.mT, δ * gates.echo)
    return torch.baddbmm(kept, inputs.mT, errors), moving


def _cut(x: Tensor, *, start: int, count: int, size: int, room: int, dtype: torch.dtype) -> Tensor:
    """(chunks, groups, size + room, ...) of (batch, heads, tokens, ...), with zeros for the room."""
    part = x[:, :, start : start + count * size]
    part = part.reshape(part.shape[0] * part.shape[1], count, size, *part.shape[3:])
    part = part.transpose(0, 1).to(dtype).contiguous()
    return F.pad(part, (*[0, 0] * (part.dim() - 3), 0, room)) if room else part


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
    if read == "pre":
        # What M_t−1 gives for q_t is what is read after token t − 1 for the next query.
        first = read_memory(queries[:, :, :1].to(state.weights[0].dtype), state.weights, residual=residual)
        queries = torch.cat([queries[:, :, 1:], queries[:, :, -1:]], dim=2)
    dtype, groups, depth = state.weights[0].dtype, batch * heads, len(state.weights)
    weights, moving, anchor = ([x.flatten(0, 1) for x in part] for part in state[:3])
    position = state.position
    if mask is not None:
        hidden = ~mask[:, None, :, None]
        keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    shown = torch.ones_like(step[0, :, :1], dtype=torch.bool) if mask is None else mask[:, None]
    channels = max(gate.shape[-1] for gate in forget)
    rows = 1 if torch.compiler.is_compiling() else groups  # what is traced serves any batch
    most = max(1, ROOM // max(1, rows * chunk * channels * (BLOCK if channels > 1 else chunk)))
    outputs, surprises = [], []
    for start, count, size in _pieces(tokens, position, chunk, most):
        # Blocks are full: the last one of a chunk with tokens that nobody has seen.
        room = -size % BLOCK if size > BLOCK and channels > 1 else 0
        cut = partial(_cut, start=start, count=count, size=size, room=room, dtype=dtype)
        q, k, v = cut(queries), cut(keys), cut(values)
        seen = None if mask is None and not room else cut(shown.expand(batch, heads, tokens)).bool()
        parts = [
            (cut(step[i]), cut(forget[i]), None if momentum is None else cut(momentum[i])) for i in range(len(step))
        ]
        gates = _layers(parts, seen) * (depth if len(step) == 1 else 1)
        scores = _first_scores(q, k, gates[0])
        for c, layers in enumerate(zip(*(_each(gate, count, torch.unbind) for gate in gates))):
            if position == 0:
                anchor = weights
            inputs, errors, difference = _errors(anchor, k[c], v[c], residual)
            if surprised or limit is not None:
                square = sum((h.square().sum(-1) * δ.square().sum(-1) for h, δ in zip(inputs, errors)), k.new_zeros(()))
                surprises.append((difference.detach().square().sum(-1)[:, :size], square.detach().sqrt()[:, :size]))
                if limit is not None:
                    errors = [δ * clamped(square, limit).unsqueeze(-1) for δ in errors]
            z, after = q[c], []
            pushed: list[Tensor | None] = [*moving] if moving else [None] * depth
            for i, (weight, s, h, δ, gate) in enumerate(zip(weights, pushed, inputs, errors, layers)):
                z = F.gelu(z) if i else z
                z = _written(_read(z, i, weight, s, gate), z, i, h, δ, scores[c], gate)
                after.append(_after(i, weight, s, h, δ, gate))
            weights, moving = [w for w, _ in after], [s for _, s in after if s is not None]
            z = q[c] + F.layer_norm(z, z.shape[-1:], eps=EPS) if residual else z
            outputs.append(z[:, :size] if room else z)
            position = (position + size) % chunk
    y = torch.cat(outputs, dim=1).view(batch, heads, tokens, width)
    y = (y if read == "post" else torch.cat([first, y[:, :, :-1]], dim=2)).to(values.dtype)
    ends = (weights, moving, anchor if position else weights)
    held, pushes, at = (tuple(x.view(batch, heads, *x.shape[1:]) for x in part) for part in ends)
    state = MemoryState(held, pushes, at, position)
    if not surprised:
        return y, state, None
    loss, norm = (torch.cat(part, dim=1).view(batch, heads, tokens) for part in zip(*surprises))
    return y, state, Surprise(loss, norm)

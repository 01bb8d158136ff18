"""Toeplitz products by FFT, a slice of channels at a time, and through n × n weights, a block of queries at a time.

With s_t = c_t for t ≥ 0 and s_{L−t} = c_{−t}, y_i = Σ_j c_{j−i} x_j is a circular correlation of length L ≥ 2n − 1:

    y = F⁻¹(F̄(s) F(x)),   ∂x = F⁻¹(F(s) F(∂y)),   ∂s = F⁻¹(F̄(∂y) F(x))

and the same on a grid, with an FFT over both axes. The sums of kernelized attention are such products of n × m·d
numbers. Of these a slice exists at a time, small enough for a processor's cache. Both passes keep memory of
O(n (m + d)), which is also faster than all at once where the whole outgrows the caches. The quadratic form is cut for
the same reasons: it takes O(n²) time, and no more memory than the other.
"""

import math
from collections.abc import Iterator
from typing import no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import (
    backward_without_autocast,
    is_differentiated,
    is_transformed,
    plain_gradients,
    without_autocast,
)

SLICE = {"cpu": 2**18, "cuda": 2**26}  # numbers that are transformed at a time
BLOCK = {"cpu": 2**17, "cuda": 2**26}  # weights that the quadratic form has at a time
LEAST_BLOCK = 32  # queries of a block: with fewer, matrix products are slow


def fft_length(least: int) -> int:
    """The smallest number of at least `least` with no prime factor above 5, and above 128 one that 16 divides.

    Of these FFTs are fast; of 3375 = 3³·5³ they take twice as long as of 3456.

    >>> [fft_length(n) for n in (1, 7, 127, 1025)]
    [1, 8, 128, 1152]
    """
    unit = 16 if least > 128 else 1
    least = max(1, math.ceil(least / unit))
    best = 2 ** math.ceil(math.log2(least))
    five = 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three * 2 ** math.ceil(math.log2(max(least / three, 1))))
            three *= 3
        five *= 5
    return unit * best


@no_type_check  # run-time shape checks inside a class keep a compiler from tracing its making
class _Circle:
    """A kernel of offsets as the spectrum of a circular correlation, for tokens on a line or on a grid."""

    def __init__(self, c: Tensor, precision: str):
        self.sides = [(size + 1) // 2 for size in c.shape[1:]]
        self.dims = tuple(range(-len(self.sides), 0))
        self.lengths = [fft_length(2 * side - 1) for side in self.sides]
        self.dtype = torch.float64 if precision == "double" else torch.promote_types(c.dtype, torch.float32)
        padding = [p for size, length in zip(c.shape[:0:-1], self.lengths[::-1]) for p in (0, length - size)]
        self.shifts = [side - 1 for side in self.sides]
        around = F.pad(c.to(self.dtype), padding).roll([-shift for shift in self.shifts], self.dims)
        self.spectrum = torch.fft.rfftn(around, dim=self.dims)
        self.inside = (..., *(slice(0, side) for side in self.sides))

    def transform(self, x: Tensor) -> Tensor:
        return torch.fft.rfftn(x.to(self.dtype), s=self.lengths, dim=self.dims)

    def back(self, spectrum: Tensor) -> Tensor:
        return torch.fft.irfftn(spectrum, s=self.lengths, dim=self.dims)[self.inside]

    def kernel_of(self, spectrum: Tensor) -> Tensor:
        """The offsets of a circle that was transformed: what `__init__` did, undone."""
        around = torch.fft.irfftn(spectrum, s=self.lengths, dim=self.dims).roll(self.shifts, self.dims)
        return around[(..., *(slice(0, 2 * side - 1) for side in self.sides))]

    def rows_at_a_time(self, device: torch.device) -> int:
        return max(1, SLICE.get(device.type, SLICE["cpu"]) // math.prod(self.lengths))

    def on_grid(self, x: Tensor) -> Tensor:
        """(batch, heads, n, channels) to (batch · heads, channels, *sides), contiguous."""
        return x.mT.reshape(x.shape[0] * x.shape[1], x.shape[-1], *self.sides).contiguous()


def _ranges(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, max(step, 1)):
        yield slice(start, min(start + step, size))


def _slices(rows: int, features: int, channels: int, at_a_time: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut rows × features × channels into boxes of about so many; whole channels first, then features, then rows."""
    channel_step = min(channels, at_a_time)
    feature_step = min(features, max(1, at_a_time // channel_step))
    row_step = max(1, at_a_time // (channel_step * feature_step))
    # What is traced serves any batch: it takes all rows at once.
    for b in [slice(None)] if torch.compiler.is_compiling() else _ranges(rows, row_step):
        for r in _ranges(features, feature_step):
            for d in _ranges(channels, channel_step):
                yield b, r, d


class _Sums(torch.autograd.Function):
    """(c, q, k, v) → Σ_j c_{j−i} (q_i·k_j) v_j; c with all offsets. The n × m·d products are made again, not kept."""

    @staticmethod
    def forward(ctx, c: Tensor, q: Tensor, k: Tensor, v: Tensor, precision: str):
        circle = _Circle(c, precision)
        qs, ks, vs = (circle.on_grid(x) for x in (q, k, v))
        spectrum = circle.spectrum.conj().expand(q.shape[0], q.shape[1], *circle.spectrum.shape[1:]).flatten(0, 1)
        sums = vs.new_zeros(vs.shape, dtype=circle.dtype)
        for b, r, d in _slices(len(vs), ks.shape[1], vs.shape[1], circle.rows_at_a_time(v.device)):
            outer = circle.transform(ks[b, r, None].to(circle.dtype) * vs[b, None, d])
            products = circle.back(outer.mul_(spectrum[b, None, None]))
            sums[b, d] += (qs[b, r, None] * products).sum(dim=1)
        ctx.save_for_backward(c, q, k, v)
        ctx.precision = precision
        return sums.flatten(2).mT.reshape(v.shape).to(v.dtype)

    @staticmethod
    @backward_without_autocast
    def backward(ctx, grad: Tensor):
        c, q, k, v = ctx.saved_tensors
        if is_differentiated():
            return *plain_gradients(_plain_sums, (c, q, k, v), grad), None
        wanted = ctx.needs_input_grad
        circle = _Circle(c, ctx.precision)
        qs, ks, vs, gs = (circle.on_grid(x) for x in (q, k, v, grad))
        spectrum = circle.spectrum.expand(q.shape[0], q.shape[1], *circle.spectrum.shape[1:]).flatten(0, 1)
        grads = [x.new_zeros(x.shape, dtype=circle.dtype) for x in (qs, ks, vs)]
        grad_q, grad_k, grad_v = grads
        grad_s = torch.zeros_like(spectrum)
        for b, r, d in _slices(len(vs), ks.shape[1], vs.shape[1], circle.rows_at_a_time(v.device)):
            sent = circle.transform(ks[b, r, None].to(circle.dtype) * vs[b, None, d])
            received = circle.transform(qs[b, r, None].to(circle.dtype) * gs[b, None, d])
            along = spectrum[b, None, None]
            if wanted[0]:
                grad_s[b] += (received.conj() * sent).sum(dim=(1, 2))
            if wanted[1]:
                grad_q[b, r] += (circle.back(sent.mul_(along.conj())) * gs[b, None, d]).sum(dim=2)
            if not (wanted[2] or wanted[3]):
                continue
            taken = circle.back(received.mul_(along))
            grad_k[b, r] += (taken * vs[b, None, d]).sum(dim=2)
            grad_v[b, d] += (taken * ks[b, r, None]).sum(dim=1)
        grad_c = circle.kernel_of(grad_s.unflatten(0, q.shape[:2]).sum(dim=0)).sum_to_size(c.shape)
        shaped = [g.flatten(2).mT.reshape(x.shape).to(x.dtype) for g, x in zip(grads, (q, k, v))]
        return grad_c.to(c.dtype), *shaped, None


def all_offsets(c: Float[Tensor, "#heads *offsets"], causal: bool) -> Float[Tensor, "#heads *all"]:
    """The kernel with its later offsets: zeros, where causal."""
    return F.pad(c, (0, c.shape[-1] - 1)) if causal else c


def fft_sums(
    c: Float[Tensor, "#heads *offsets"],
    q: Float[Tensor, "batch heads n features"],
    k: Float[Tensor, "batch heads n features"],
    v: Float[Tensor, "batch heads n channels"],
    *,
    causal: bool = False,
    precision: str = "single",
) -> Float[Tensor, "batch heads n channels"]:
    """Σ_j c_{j−i} (q_i·k_j) v_j by FFT: O(n log n · features · channels) time, O(n (features + channels)) memory."""
    dtype = torch.promote_types(torch.promote_types(v.dtype, c.dtype), torch.float32)
    with without_autocast(v):
        inputs = [all_offsets(c, causal).to(dtype), q.to(dtype), k.to(dtype), v.to(dtype)]
        return _plain_sums(*inputs) if _is_plain(q) else _Sums.apply(*inputs, precision)


def fft_matmul(
    c: Float[Tensor, "#heads *offsets"],
    x: Float[Tensor, "batch heads n channels"],
    *,
    causal: bool = False,
    precision: str = "single",
) -> Float[Tensor, "batch heads n channels"]:
    """Σ_j c_{j−i} x_j by FFT, in O(n log n · channels)."""
    ones = torch.ones_like(x[..., :1])
    return fft_sums(c, ones, ones, x, causal=causal, precision=precision)


def _skewed(c: Tensor, dim: int) -> Tensor:
    """Axis `dim` of 2n − 1 offsets to two axes i, j with c_{j−i}, by laying rows one entry short of each other."""
    n = (c.shape[dim] + 1) // 2
    c = F.pad(c.movedim(dim, -1), (0, 1))
    rows = c.unsqueeze(-2).expand(*c.shape[:-1], n, 2 * n).flatten(-2)[..., : n * (2 * n - 1)]
    return rows.unflatten(-1, (n, 2 * n - 1))[..., n - 1 :]


def dense_matrix(c: Float[Tensor, "#heads *offsets"], *, causal: bool = False) -> Float[Tensor, "#heads n n"]:
    """C_ij = c_{j−i}, made of views and one copy an axis, so that its gradient is deterministic and quick."""
    matrix = all_offsets(c, causal)
    axes = matrix.dim() - 1
    for _ in range(axes):  # (heads, H, W) to (heads, W, H, H) to (heads, H, H, W, W)
        matrix = _skewed(matrix, 1)
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2)]
    n = math.prod(matrix.shape[1::2])
    return matrix.permute(order).reshape(c.shape[0], n, n)


def _is_plain(q: Tensor) -> bool:
    """Whether sums are taken by all weights at once: slices and lengths of FFTs are chosen by the number of tokens."""
    return is_transformed() or isinstance(q.shape[-2], torch.SymInt)


def _plain_sums(c: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sums with all n × n weights at once; c with all offsets."""
    return (q @ k.mT * dense_matrix(c)) @ v


@no_type_check
class _Windows:
    """Rows of C_ij = c_{j−i} as views of c: row i is the window of c that begins at the offset −i.

    Windows come in the order of their beginnings, so that row t is that of the query n − 1 − t, on a grid too.
    """

    def __init__(self, c: Tensor, n: int, rows: int, causal: bool):
        self.n, self.causal, self.device = n, causal, c.device
        self.sides = [(size + 1) // 2 for size in c.shape[1:]]
        self.windows = c
        for dim, side in enumerate(self.sides, start=1):  # (heads, 2H−1, 2W−1) to (heads, H, W, H, W)
            self.windows = self.windows.unfold(dim, side, 1)
        rows = 1 if torch.compiler.is_compiling() else rows  # what is traced serves any batch
        most = BLOCK.get(c.device.type, BLOCK["cpu"]) // max(1, rows * n)
        self.lines = max(1, max(most, LEAST_BLOCK) * self.sides[0] // n)

    def blocks(self) -> Iterator[tuple[slice, int, Tensor]]:
        """Some rows, how many keys they see at most, and their weights (heads, rows, keys)."""
        inner = self.n // self.sides[0]
        for lines in _ranges(self.sides[0], self.lines):
            seen = self.n - lines.start if self.causal else self.n
            block = self.windows[:, lines].reshape(len(self.windows), -1, self.n)[..., :seen]
            yield slice(lines.start * inner, lines.stop * inner), seen, block

    def add_gradient(self, grad_c: Tensor, rows: slice, grads: Tensor) -> None:
        """What C's rows were given, (heads, rows, keys), to where they were cut from: what `blocks` did, undone."""
        inner = self.n // self.sides[0]
        sums = F.pad(grads, (0, self.n - grads.shape[-1]))
        sums = sums.reshape(len(sums), -1, *self.sides[1:], *self.sides)
        if len(self.sides) == 2:  # (heads, lines, W, H, W) to (heads, offsets, W, W)
            sums = _unskewed(sums.movedim((1, 3), (-2, -1))).movedim(-1, 1)
        sums = _unskewed(sums)
        start = rows.start // inner
        grad_c[:, start : start + sums.shape[1]] += sums


def _unskewed(x: Float[Tensor, "*rest rows n"]) -> Float[Tensor, "*rest offsets"]:
    """Sums of x over all (t, j) with the same t + j: each row is shifted by one more column, then all are added."""
    rows, n = x.shape[-2:]
    wide = x.new_zeros(*x.shape[:-1], n + rows - 1)
    # Row t of a view with steps one longer than a row begins at column t of row t.
    wide.as_strided(x.shape, (*wide.stride()[:-2], n + rows, 1)).copy_(x)
    return wide.sum(dim=-2)


class _QuadraticSums(torch.autograd.Function):
    """(c, q, k, v) → Σ_j c_{j−i} (q_i·k_j) v_j through weights of a block of queries, made again on the way back."""

    @staticmethod
    def forward(ctx, c: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool):
        batch, heads, n, _ = q.shape
        back, keys, values = (x.reshape(batch * heads, n, x.shape[-1]) for x in (q.flip(-2), k, v))
        windows = _Windows(c, n, batch * heads, causal)
        sums, room = [], q.new_empty(0)  # for the scores of a block, which the system is asked for once
        for rows, seen, weights in windows.blocks():
            shape = (batch * heads, weights.shape[1], seen)
            room = room if room.numel() >= math.prod(shape) else q.new_empty(math.prod(shape))
            scores = torch.bmm(back[:, rows], keys[:, :seen].mT, out=room[: math.prod(shape)].view(shape))
            scores.view(batch, heads, *shape[1:]).mul_(weights)
            sums.append(torch.bmm(scores, values[:, :seen]))
        ctx.save_for_backward(c, q, k, v)
        ctx.causal = causal
        return torch.cat(sums, dim=-2).view(*q.shape[:-1], v.shape[-1]).flip(-2)

    @staticmethod
    @backward_without_autocast
    def backward(ctx, grad: Tensor):
        c, q, k, v = ctx.saved_tensors
        if is_differentiated():
            return *plain_gradients(_plain_sums, (c, q, k, v), grad), None
        n, back, given = q.shape[-2], q.flip(-2), grad.flip(-2)
        windows = _Windows(c, n, q.shape[0] * q.shape[1], ctx.causal)
        grad_c, grad_k, grad_v, grads_q = torch.zeros_like(c), torch.zeros_like(k), torch.zeros_like(v), []
        for rows, seen, weights in windows.blocks():
            scores, wanted = back[:, :, rows] @ k[:, :, :seen].mT, given[:, :, rows] @ v[:, :, :seen].mT
            if ctx.needs_input_grad[0]:
                windows.add_gradient(grad_c, rows, (scores * wanted).sum(dim=0).sum_to_size(weights.shape))
            scores, wanted = scores.mul_(weights), wanted.mul_(weights)
            grad_v[:, :, :seen] += scores.mT @ given[:, :, rows]
            grad_k[:, :, :seen] += wanted.mT @ back[:, :, rows]
            grads_q.append(wanted @ k[:, :, :seen])
        return grad_c, torch.cat(grads_q, dim=-2).flip(-2), grad_k, grad_v, None


def quadratic_sums(
    c: Float[Tensor, "#heads *offsets"],
    q: Float[Tensor, "batch heads n features"],
    k: Float[Tensor, "batch heads n features"],
    v: Float[Tensor, "batch heads n channels"],
    *,
    causal: bool = False,
) -> Float[Tensor, "batch heads n channels"]:
    """The same sums through n × n weights: O(n² (features + channels)) time, O(n (features + channels)) memory."""
    dtype = torch.promote_types(torch.promote_types(v.dtype, c.dtype), torch.float32)
    with without_autocast(v):
        inputs = [all_offsets(c, causal).to(dtype), q.to(dtype), k.to(dtype), v.to(dtype)]
        return _plain_sums(*inputs) if _is_plain(q) else _QuadraticSums.apply(*inputs, causal)

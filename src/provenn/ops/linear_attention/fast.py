"""Linear attention in PyTorch, for any device: through weights where tokens are few, else in linear time.

In linear time the bidirectional form is one product each way. The causal one is chunked and rests on one bilinear
operation, y_i = Σ_{j≤i} (q_i·k_j) v_j. Inside a chunk it is two small matrix products with a triangle between them;
what came before a chunk enters as the matrix Σ k vᵀ of the chunks before, a running sum over chunks. Its three
gradients are the same operation with the roles exchanged, two of them from the other end, so the backward pass needs
nothing but the inputs and is differentiable again.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import cast

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

from .reference import LinearState, accumulator, masked, normalised

CHUNK = 64
WHOLE = 2**18  # weights that are made all at once where sequences are short
SLICE = {"cpu": 2**17, "cuda": 2**26}  # numbers of one intermediate result that exist at a time

# (q, k, v, start, reverse) → (y, end), with rows flattened: (rows, tokens, width) and (rows, features, dim).
Product = Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def chunked_product(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, reverse: bool, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """y_i = q_i·start + Σ_j (q_i·k_j) v_j over j ≤ i, or j ≥ i where `reverse`; and end = start + Σ_j k_j v_jᵀ."""
    n = q.shape[1]
    if isinstance(n, torch.SymInt):
        # An export with open length takes whatever is true of its example for a rule: one chunk, or none to fill up.
        padding = -n % chunk + chunk
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
    else:
        chunk = min(n, chunk)
        padding = -n % chunk
        q, k, v = (F.pad(x, (0, 0, 0, padding)) if padding else x for x in (q, k, v))
    q, k, v = (x.reshape(x.shape[0], x.shape[1] // chunk, chunk, x.shape[2]) for x in (q, k, v))
    weights = q @ k.mT
    weights = weights.triu() if reverse else weights.tril()
    y = weights @ v
    totals = k.mT @ v
    if reverse:
        totals = totals.flip(1)
    states = torch.cat([start.unsqueeze(1), totals], dim=1).cumsum(dim=1)
    before, end = states[:, :-1], states[:, -1]
    y = y + q @ (before.flip(1) if reverse else before)  # not in place, which vmap could not follow
    return y.flatten(1, 2)[:, :n], end


def sliced_product(q: Tensor, k: Tensor, v: Tensor, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """`chunked_product` without a record for autograd, some rows at a time: what it makes stays in the cache."""
    rows, n, features = q.shape
    dim = v.shape[-1]
    count = max(1, math.ceil(n / CHUNK))
    chunk = math.ceil(n / count)  # 65 tokens are two chunks of 33, not of 64
    padding = count * chunk - n
    y, end = v.new_empty(rows, n, dim), torch.empty_like(start)
    for part in _slices(rows, n * max(chunk, features, dim), q.device):
        size = min(part.stop, rows) - part.start
        parts = (F.pad(x[part], (0, 0, 0, padding)) if padding else x[part] for x in (q, k, v))
        query, key, value = (x.reshape(size * count, chunk, x.shape[-1]) for x in parts)
        weights = torch.bmm(query, key.mT)
        weights = weights.triu_() if reverse else weights.tril_()
        inside = torch.bmm(weights, value)
        states = torch.bmm(key.mT, value).unflatten(0, (size, count))
        before = start[part]
        for i in range(count - 1, -1, -1) if reverse else range(count):  # each chunk's total to the sum before it
            after = before + states[:, i]
            states[:, i] = before
            before = after
        y[part] = inside.baddbmm_(query, states.flatten(0, 1)).view(size, -1, dim)[:, :n]
        end[part] = before
    return y, end


def _slices(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cut rows so that each part, of so many numbers a row, is small enough for a processor's cache."""
    step = max(1, SLICE.get(device.type, SLICE["cpu"]) // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


class CausalProduct(torch.autograd.Function):
    """(q, k, v, start) → (y, end), by any form of the product.

    With g = ∂L/∂y and D = ∂L/∂end:  ∂L/∂q_i = Σ_{j≤i} (g_i·v_j) k_j + start g_i,
    ∂L/∂k_i = Σ_{j≥i} (v_i·g_j) q_j + D v_i,  ∂L/∂v_i = Σ_{j≥i} (k_i·q_j) g_j + Dᵀ k_i,  ∂L/∂start = Σ_j q_j g_jᵀ + D.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, start: Tensor, reverse: bool, product: Product):
        ctx.save_for_backward(q, k, v, start)
        ctx.reverse, ctx.product = reverse, product
        return product(q, k, v, start, reverse)

    @staticmethod
    @backward_without_autocast
    def backward(ctx, g: Tensor, d: Tensor):
        q, k, v, start = ctx.saved_tensors
        to, back = (ctx.reverse, ctx.product), (not ctx.reverse, ctx.product)
        grad_q, _ = CausalProduct.apply(g, v, k, start.mT, *to)
        grad_k, _ = CausalProduct.apply(v, g, q, d.mT, *back)
        grad_v, grad_start = CausalProduct.apply(k, q, g, d, *back)
        return grad_q, grad_k, grad_v, grad_start, None, None


def causal_attention(
    queries: Float[Tensor, "*batch tokens features"],
    keys: Float[Tensor, "*batch tokens features"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    state: LinearState | None = None,
    product: Product | None = None,
) -> tuple[Float[Tensor, "*batch tokens dim"], LinearState]:
    """Causal linear attention in chunks: linear work, no loop over tokens, sums in float32 at least.

    Args:
        queries, keys: φ(q) and φ(k), features already mapped.
        values: v.
        mask: True where a token may be attended; broadcasts to (*batch, tokens).
        state: what came before; by default nothing.
        product: the form of the product, a kernel; by default that of this module.

    Returns the output at every token and the state after the last.
    """
    *batch, n, dim = values.shape
    features = keys.shape[-1]
    dtype = accumulator(queries, keys, values)
    k, v = masked(mask, keys.to(dtype), values.to(dtype))
    if state is None:
        state = LinearState.empty(*batch, features=features, dim=dim, dtype=dtype, device=values.device)
    # A column of ones beside the values carries the normaliser along.
    v = torch.cat([v, v.new_ones(*batch, n, 1)], dim=-1)
    start = torch.cat([state.s, state.z.unsqueeze(-1)], dim=-1).to(dtype)
    # Features that lie in columns would be copied by the cutting of every chunk, both ways; so they are once.
    q, k, v, start = (_rows(x).contiguous() for x in (queries.to(dtype), k, v, start))
    with without_autocast(v):
        if is_transformed():
            y, end = chunked_product(q, k, v, start, reverse=False)
        else:
            if product is None:  # a compiler fuses and an export carries elsewhere what is not cut into slices
                product = chunked_product if torch.compiler.is_compiling() else sliced_product
            y, end = cast(tuple[Tensor, Tensor], CausalProduct.apply(q, k, v, start, False, product))
    y, end = y.view(*batch, n, dim + 1), end.view(*batch, features, dim + 1)
    outputs = normalised(y[..., :-1], y[..., -1]).to(values.dtype)
    return outputs, LinearState(end[..., :-1], end[..., -1])


def short_attention(
    queries: Float[Tensor, "*batch queries features"],
    keys: Float[Tensor, "*batch tokens features"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    causal: bool = True,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "*batch queries dim"]:
    """The same outputs through tokens × tokens weights: quadratic, and for few tokens the least work.

    Arguments as in `causal_attention`. Sums are divided after they are taken, which leaves n² divisions out.
    """
    *batch, _, dim = values.shape
    dtype = accumulator(queries, keys, values)
    q = queries.to(dtype)
    k, v = masked(mask, keys.to(dtype), values.to(dtype))
    with without_autocast(v):
        if is_transformed() or torch.compiler.is_compiling():
            return _weighted(q, k, v, causal).to(values.dtype)
        y = cast(Tensor, Quadratic.apply(_rows(q), _rows(k), _rows(v), causal))
    return y.view(*batch, queries.shape[-2], dim).to(values.dtype)


def _weighted(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    weights = q @ k.mT
    if causal:
        weights = weights.tril()
    return normalised(weights @ v, weights.sum(dim=-1))


class Quadratic(torch.autograd.Function):
    """`_weighted`, some rows at a time, so that their weights stay in the cache; many are made again on the way back.

    With y = s/z, s_i = Σ_j w_ij v_j and z_i = Σ_j w_ij:  ∂L/∂s = g/z, ∂L/∂z = −g·y/z, ∂L/∂w_ij = (g_i/z_i)·(v_j − y_i).
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool):
        rows, queries, _ = q.shape
        tokens = k.shape[1]
        parts = list(_slices(rows, queries * tokens, q.device))
        kept = any(ctx.needs_input_grad) and rows * queries * tokens <= WHOLE
        held = rows if kept else min(rows, max((part.stop - part.start for part in parts), default=0))
        weights = q.new_empty(held, queries, tokens)
        y = v.new_empty(rows, queries, v.shape[-1])
        total = q.new_empty(rows, queries, 1)
        for part in parts:
            chosen = weights[part] if kept else weights[: min(rows, part.stop) - part.start]
            torch.bmm(q[part], k[part].mT, out=chosen)
            if causal:
                chosen.tril_()
            torch.sum(chosen, dim=-1, keepdim=True, out=total[part])
            torch.bmm(chosen, v[part], out=y[part])
        y.div_(total.masked_fill_(total == 0, 1))
        ctx.save_for_backward(q, k, v, y, total, weights if kept else None)
        ctx.causal = causal
        return y

    @staticmethod
    @backward_without_autocast
    def backward(ctx, grad: Tensor):
        q, k, v, y, total, kept = ctx.saved_tensors
        if is_differentiated():
            return *plain_gradients(functools.partial(_weighted, causal=ctx.causal), (q, k, v), grad), None
        grad_s = grad / total
        grad_z = (grad_s * y).sum(dim=-1, keepdim=True).neg_()
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        for part in _slices(len(q), q.shape[1] * k.shape[1], q.device):
            if kept is None:
                weights = torch.bmm(q[part], k[part].mT)
                weights = weights.tril_() if ctx.causal else weights
            else:
                weights = kept[part]
            grad_w = torch.baddbmm(grad_z[part], grad_s[part], v[part].mT)
            if ctx.causal:
                grad_w.tril_()
            _product(weights.mT, grad_s[part], grad_v[part])
            _product(grad_w, k[part], grad_q[part])
            _product(grad_w.mT, q[part], grad_k[part])
        return grad_q, grad_k, grad_v, None


def pooled_attention(
    queries: Float[Tensor, "*batch queries features"],
    keys: Float[Tensor, "*batch tokens features"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "*batch queries dim"]:
    """The outputs of `bidirectional_attention` alone, with fewer calls each way: short sequences are made of those."""
    if is_transformed() or torch.compiler.is_compiling():
        return bidirectional_attention(queries, keys, values, mask=mask)[0]
    *batch, _, dim = values.shape
    dtype = accumulator(queries, keys, values)
    k, v = masked(mask, keys.to(dtype), values.to(dtype))
    with without_autocast(v):
        y = cast(Tensor, Pooled.apply(*(_rows(x) for x in (queries.to(dtype), k, v))))
    return y.view(*batch, queries.shape[-2], dim).to(values.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])  # not −1, which an empty batch leaves open


class Pooled(torch.autograd.Function):
    """y = q S / q z with S = kᵀ v and z = Σ k.

    With g = ∂L/∂y, G = g/(q z) and c = −G·y:  ∂L/∂q = G Sᵀ + c zᵀ, ∂L/∂S = qᵀ G, ∂L/∂z = qᵀ c, and on to k and v.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor):
        s, z = torch.bmm(k.mT, v), k.sum(dim=1, keepdim=True)
        total = torch.bmm(z, q.mT).mT  # a row times a matrix takes a quarter of a matrix times a column
        total.masked_fill_(total == 0, 1)
        y = torch.bmm(q, s).div_(total)
        ctx.save_for_backward(q, k, v, s, z, y, total)
        return y

    @staticmethod
    @backward_without_autocast
    def backward(ctx, grad: Tensor):
        q, k, v, s, z, y, total = ctx.saved_tensors
        if is_differentiated():
            return plain_gradients(lambda *x: bidirectional_attention(*x)[0], (q, k, v), grad)
        grad_sums = grad / total
        grad_total = (grad_sums * y).sum(dim=-1, keepdim=True).neg_()
        grad_s, grad_z = torch.bmm(q.mT, grad_sums), torch.bmm(grad_total.mT, q)
        grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
        _product(grad_sums, s.mT, grad_q)
        _product(v, grad_s.mT, grad_k)
        return grad_q.addcmul_(grad_total, z), grad_k.add_(grad_z), torch.bmm(k, grad_s)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b. Into columns it is made as outᵀ = bᵀ aᵀ, or PyTorch would make it elsewhere and copy it."""
    if out.stride(-1) == 1:
        torch.bmm(a, b, out=out)
    else:
        torch.bmm(b.mT, a.mT, out=out.mT)


def bidirectional_attention(
    queries: Float[Tensor, "*batch queries features"],
    keys: Float[Tensor, "*batch tokens features"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    state: LinearState | None = None,
    floor: float = 0.0,
) -> tuple[Float[Tensor, "*batch queries dim"], LinearState]:
    """Every query attends to all tokens: one state is summed, then read. Arguments as in `causal_attention`.

    `floor` is the least number that a query's sums are divided by (see `linear_attention_weights`).
    """
    dtype = accumulator(queries, keys, values)
    q = queries.to(dtype)
    k, v = masked(mask, keys.to(dtype), values.to(dtype))
    with without_autocast(v):
        s, z = k.mT @ v, k.sum(dim=-2)
        if state is not None:
            s, z = state.s.to(dtype) + s, state.z.to(dtype) + z
        outputs = normalised(q @ s, (q @ z.unsqueeze(-1)).squeeze(-1), floor)
    return outputs.to(values.dtype), LinearState(s, z)

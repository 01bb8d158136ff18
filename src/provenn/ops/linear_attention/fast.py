"""Linear attention in PyTorch, for any device: chunked for the causal form, one product each way for the other.

All rests on one bilinear operation, y_i = Σ_{j≤i} (q_i·k_j) v_j. Inside a chunk it is two small matrix products with a
triangle between them; what came before a chunk enters as the matrix Σ k vᵀ of the chunks before, a running sum over
chunks. Its three gradients are the same operation with the roles exchanged, two of them from the other end, so the
backward pass needs nothing but the inputs and is differentiable again.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import backward_without_autocast, is_transformed, without_autocast

from .reference import LinearState, accumulator, masked, normalised

CHUNK = 64

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
    product: Product = chunked_product,
) -> tuple[Float[Tensor, "*batch tokens dim"], LinearState]:
    """Causal linear attention in chunks: linear work, no loop over tokens, sums in float32 at least.

    Args:
        queries, keys: φ(q) and φ(k), features already mapped.
        values: v.
        mask: True where a token may be attended; broadcasts to (*batch, tokens).
        state: what came before; by default nothing.
        product: the form of the product, `chunked_product` or a kernel.

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
    rows = math.prod(batch)  # not −1, which an empty batch leaves open
    q, k, v, start = (x.reshape(rows, *x.shape[-2:]) for x in (queries.to(dtype), k, v, start))
    with without_autocast(v):
        if is_transformed():
            y, end = chunked_product(q, k, v, start, reverse=False)
        else:
            y, end = cast(tuple[Tensor, Tensor], CausalProduct.apply(q, k, v, start, False, product))
    y, end = y.view(*batch, n, dim + 1), end.view(*batch, features, dim + 1)
    outputs = normalised(y[..., :-1], y[..., -1]).to(values.dtype)
    return outputs, LinearState(end[..., :-1], end[..., -1])


def bidirectional_attention(
    queries: Float[Tensor, "*batch queries features"],
    keys: Float[Tensor, "*batch tokens features"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    state: LinearState | None = None,
) -> tuple[Float[Tensor, "*batch queries dim"], LinearState]:
    """Every query attends to all tokens: one state is summed, then read. Arguments as in `causal_attention`."""
    dtype = accumulator(queries, keys, values)
    q = queries.to(dtype)
    k, v = masked(mask, keys.to(dtype), values.to(dtype))
    with without_autocast(v):
        s, z = k.mT @ v, k.sum(dim=-2)
        if state is not None:
            s, z = state.s.to(dtype) + s, state.z.to(dtype) + z
        outputs = normalised(q @ s, (q @ z.unsqueeze(-1)).squeeze(-1))
    return outputs.to(values.dtype), LinearState(s, z)

"""Attention with rescaled weights by one call of fused softmax attention, over keys that stand twice."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import is_transformed
from provenn.ops.rescaled_attention.reference import explicit

FLOOR = 0.5  # what factors are raised to at least: a logarithm near 0 would have no gradient to speak of
MULTIPLE = 8  # of a head's width, as fused kernels want it


def doubled_keys(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch heads keys head_dim"],
    v: Float[Tensor, "batch heads keys width"],
    *,
    bias: Float[Tensor, "#batch #heads #queries #keys"] | None = None,
    factors: Float[Tensor, "#batch #heads #queries #keys"] | None = None,
    visible: Bool[Tensor, "#batch #heads #queries #keys"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries width"]:
    """The ratio of two sums of exponentials, which share one softmax; arguments as in `rescaled_attention`.

    With ℓ the log-sum-exp over keys and c > 0,

        y_i = e^{ℓ_i(S+B+log c) − ℓ_i(S+B)} · softmax_j(S+B+log c) V,

    so each key stands twice: with the score S+B+log c and the value (v, 0), and with S+B and (0, 1). A softmax over all
    of them has one denominator, which the quotient of its first outputs and its last loses again. Factors of any sign
    are raised by a constant λ first, which the second copy takes back: Σ p (c + λ) v − λ Σ p v; so no logarithm of 0
    arises, and gradients are right for any c. In float32 at least: fused kernels want scores in the type of the
    queries, and half a precision has too few digits for them and for the difference.
    """
    if is_transformed():  # the fused kernel that is taken then gives scores no gradient
        return explicit(q, k, v, bias=bias, factors=factors, visible=visible, scale=scale)
    width, scale = v.shape[-1], q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (1, 1, q.shape[-2], k.shape[-2])
    given, (q, k, v) = v.dtype, (x.to(dtype) for x in (q, k, v))
    b = q.new_zeros(shape, dtype=dtype) if bias is None else bias.to(dtype)
    c = q.new_ones(shape, dtype=dtype) if factors is None else factors.to(dtype)
    raised = (FLOOR - c.detach().amin()).clamp_min(0) if c.numel() else c.new_zeros(())
    scores = torch.cat([b + (c + raised).log(), b.expand(torch.broadcast_shapes(b.shape, c.shape))], dim=-1)
    if visible is not None:
        scores = scores.masked_fill(~torch.cat([visible, visible], dim=-1), -torch.inf)
    first = F.pad(v, (0, 1))
    second = F.pad(-raised * v, (0, 1), value=1.0)
    values, keys = torch.cat([first, second], dim=-2), torch.cat([k, k], dim=-2)
    # Fused kernels want queries, keys and values of one width: zeros change no product.
    size = max(q.shape[-1], width + 1)
    size += -size % MULTIPLE
    q, keys, values = (F.pad(x, (0, size - x.shape[-1])) for x in (q, keys, values))
    scores = scores.expand(q.shape[0], q.shape[1], -1, -1)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=scores, scale=scale)
    share = y[..., width : width + 1]
    # A query that may attend to no key has 0 in both.
    return (y[..., :width] / share.masked_fill(share == 0, 1)).to(given)

"""Attention with rescaled weights by one call of fused softmax attention, over keys that stand three times."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import is_transformed
from provenn.ops.rescaled_attention.reference import explicit
from provenn.ops.softmax_attention import softmax_attention

MULTIPLE = 8  # of a head's width, as fused kernels want it


def tripled_keys(
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

    A factor c of any sign is sinh a, with a = asinh c: half the difference of the positive numbers e^a and e^−a. So

        y_i = Σ_j p_ij c_ij v_j = ½ Σ_j (e^{S+B+a} v_j − e^{S+B−a} v_j) / Σ_j e^{S+B},

    and each key stands three times: with the score S+B+a and the value (v/2, 0), with S+B−a and (−v/2, 0), and with S+B
    and (0, 1). A softmax over all of them has one denominator, which the quotient of its first outputs and its last
    loses again. Every sum is of numbers of one sign, as exact as the definition's however far apart factors lie. In
    float32 at least: fused kernels want scores in the type of the queries, and half a precision has too few digits for
    them and for the difference.
    """
    if is_transformed():  # the fused kernel that is taken then gives scores no gradient
        return explicit(q, k, v, bias=bias, factors=factors, visible=visible, scale=scale)
    width, scale = v.shape[-1], q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (1, 1, q.shape[-2], k.shape[-2])
    given, (q, k, v) = v.dtype, (x.to(dtype) for x in (q, k, v))
    b = q.new_zeros(shape, dtype=dtype) if bias is None else bias.to(dtype)
    c = q.new_ones(shape, dtype=dtype) if factors is None else factors.to(dtype)
    a, b = torch.broadcast_tensors(c.asinh(), b)
    scores = torch.cat([b + a, b - a, b], dim=-1)
    if visible is not None:
        scores = scores.masked_fill(~torch.cat([visible] * 3, dim=-1), -torch.inf)
    half = F.pad(v / 2, (0, 1))
    values, keys = (
        torch.cat([half, -half, F.pad(torch.zeros_like(v), (0, 1), value=1.0)], dim=-2),
        torch.cat([k] * 3, dim=-2),
    )
    # Fused kernels want queries, keys and values of one width: zeros change no product.
    size = max(q.shape[-1], width + 1)
    size += -size % MULTIPLE
    q, keys, values = (F.pad(x, (0, size - x.shape[-1])) for x in (q, keys, values))
    scores = scores.expand(q.shape[0], q.shape[1], -1, -1)
    y = softmax_attention(q, keys, values, mask=scores, scale=scale)
    share = y[..., width : width + 1]
    # A query that may attend to no key has 0 in both.
    return (y[..., :width] / share.masked_fill(share == 0, 1)).to(given)

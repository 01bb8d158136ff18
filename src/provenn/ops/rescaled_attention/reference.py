"""Attention with rescaled weights by its definition."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def explicit(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch heads keys head_dim"],
    v: Float[Tensor, "batch heads keys width"],
    *,
    bias: Float[Tensor, "#batch #heads #queries #keys"] | None = None,
    factors: Float[Tensor, "#batch #heads #queries #keys"] | None = None,
    visible: Bool[Tensor, "#batch #heads #queries #keys"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries width"]:
    """softmax(s Q Kᵀ + B) ⊙ C · V, the softmax in float32 at least; arguments as in `rescaled_attention`."""
    weights = probabilities(q, k, bias=bias, visible=visible, scale=scale).to(v.dtype)
    if factors is not None:
        # After the cast, as in the authors' code.
        weights = weights * factors.to(v.dtype)
    return weights @ v


def probabilities(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch heads keys head_dim"],
    *,
    bias: Float[Tensor, "#batch #heads #queries #keys"] | None = None,
    visible: Bool[Tensor, "#batch #heads #queries #keys"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """softmax(s Q Kᵀ + B), in float32 at least; a row of zeros where a query may attend to no key."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT).to(dtype)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if visible is None:
        return scores.softmax(dim=-1)
    # The least finite number and not −∞: a row without any key would be 0/0, whose gradient no mask can take away.
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    return scores.softmax(dim=-1).masked_fill(~visible, 0)

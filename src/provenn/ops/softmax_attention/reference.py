"""Softmax attention by its definition."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def explicit(
    q: Float[Tensor, "*batch queries head_dim"],
    k: Float[Tensor, "*batch keys head_dim"],
    v: Float[Tensor, "*batch keys width"],
    *,
    mask: Bool[Tensor, "*#batch #queries #keys"] | Float[Tensor, "*#batch #queries #keys"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "*batch queries width"]:
    """softmax(s Q Kᵀ + B) V, the softmax in float32 at least; arguments as in `softmax_attention`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT).to(dtype)
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return scores.softmax(dim=-1).to(v.dtype) @ v
    if mask.dtype == torch.bool:
        hidden = ~mask
    else:
        hidden, scores = mask == -torch.inf, scores + mask.to(dtype).clamp_min(torch.finfo(dtype).min)
    # The least finite number and not −∞: a row without any key would be 0/0, whose gradient no mask can take away.
    scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
    return scores.softmax(dim=-1).masked_fill(hidden, 0).to(v.dtype) @ v

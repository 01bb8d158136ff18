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
    """y_i = Σ_j softmax_j(s q_i·k_j + b_ij) v_j, the softmax in float32 at least.

    Args:
        q, k, v: queries, keys and values of each head.
        mask: True where a query may attend to a key, or b, numbers on the scores; −∞ hides as False does. A query that
            may attend to no key gets 0.
        causal: whether query i sees keys 1..i alone, and of these the ones that the mask leaves.
        scale: s; by default 1/√head_dim.

    >>> v = torch.tensor([[[1.0], [3.0]]])
    >>> explicit(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), v, mask=torch.tensor([[[False, True]]]), causal=True)
    tensor([[[0.],
             [3.]]])
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT).to(dtype)
    if mask is None and not causal:
        return scores.softmax(dim=-1).to(v.dtype) @ v
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        hidden = ~hidden.logical_not().tril()
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        hidden, scores = hidden | (mask == -torch.inf), scores + mask.to(dtype).clamp_min(torch.finfo(dtype).min)
    # The least finite number and not −∞: a row without any key would be 0/0, whose gradient no mask can take away.
    scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
    return scores.softmax(dim=-1).masked_fill(hidden, 0).to(v.dtype) @ v

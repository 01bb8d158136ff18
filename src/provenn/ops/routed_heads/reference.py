"""Attention in which a token uses some of the heads, by its definition (Jin et al., 2024, arXiv:2410.11842, section 3).

A pair (token, head) that is active gives the head's softmax attention over the keys of all tokens; one that is not
gives 0. Keys and values belong to every token in every head: other tokens may attend to them.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.softmax_attention import softmax_attention


def causal_mask(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
    """True where a query may attend: the last query sees all keys, the one before it all but the last, and so on."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def dense_masked_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch groups keys dim"],
    v: Float[Tensor, "batch groups keys width"],
    active: Bool[Tensor, "batch heads queries"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "batch keys"] | None = None,
    bias: Float[Tensor, "heads queries keys"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries width"]:
    """The definition: every head for every token, and zeros where the pair is not active. It saves nothing.

    The arguments are `routed_attention`'s.
    """
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    if mask is None and not causal:
        y = softmax_attention(q, k, v, mask=bias, scale=scale)
    elif mask is None and bias is None and q.shape[2] == k.shape[2]:
        y = softmax_attention(q, k, v, causal=True, scale=scale)
    else:
        may = torch.ones((), dtype=torch.bool, device=q.device) if mask is None else mask[:, None, None, :]
        if causal:
            may = may & causal_mask(q.shape[2], k.shape[2], q.device)
        weights = may if bias is None else bias.masked_fill(~may, -torch.inf)
        y = softmax_attention(q, k, v, mask=weights, scale=scale)
    return torch.where(active.unsqueeze(-1), y, 0)

"""Softmax attention over the union of two sets of keys, from the attention over each, by its definition."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Partial(NamedTuple):
    """Softmax attention over some of the keys: the output, and the log of the sum of exponentials of the scores.

    For a query that sees none of these keys lse is −∞, and the output does not matter.
    """

    output: Float[Tensor, "*batch dim"]
    lse: Float[Tensor, "*batch"]


def merge_by_weights(a: Partial, b: Partial) -> Partial:
    """The definition: ℓ = log(e^ℓ_a + e^ℓ_b),  o = e^(ℓ_a − ℓ) o_a + e^(ℓ_b − ℓ) o_b, in float32 at least."""
    dtype = torch.promote_types(a.output.dtype, torch.float32)
    # (*batch, 2): a softmax over the two sides.
    lses = torch.stack([a.lse.to(dtype), b.lse.to(dtype)], dim=-1)
    nothing = lses == -torch.inf
    # A query that sees nothing at all keeps lse −∞ and gets output 0; the shift keeps ∞ − ∞ from arising.
    m = lses.amax(dim=-1, keepdim=True).detach()
    weights = (lses - m.masked_fill(m == -torch.inf, 0)).exp().masked_fill(nothing, 0)
    total = weights.sum(dim=-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1)
    outputs = torch.stack([a.output.to(dtype), b.output.to(dtype)], dim=-2).masked_fill(nothing.unsqueeze(-1), 0)
    output = (weights.unsqueeze(-1) * outputs).sum(dim=-2)
    return Partial(output.to(a.output.dtype), (total.log() + m).squeeze(-1))

"""Attention from logarithms of features by its definition: a softmax of their log-sum-exp."""

import torch
from jaxtyping import Float
from torch import Tensor


def log_attention_weights(
    queries: Float[Tensor, "*batch queries features"],
    keys: Float[Tensor, "*batch tokens features"],
    factors: Float[Tensor, "*heads queries tokens"] | None = None,
) -> Float[Tensor, "*batch queries tokens"]:
    """a_ij ∝ f_ij Σ_r e^{log φ_r(q_i) + log φ_r(k_j)} over j ≤ i; the queries are those of the last tokens."""
    n, tokens = queries.shape[-2], keys.shape[-2]
    # (*batch, queries, tokens, features) in full: what the fast form never forms beyond a block.
    scores = (queries.unsqueeze(-2) + keys.unsqueeze(-3)).logsumexp(dim=-1)
    if factors is not None:
        scores = scores + factors.log()
    later = torch.ones(n, tokens, dtype=torch.bool, device=keys.device).triu(tokens - n + 1)
    return scores.masked_fill(later, -torch.inf).softmax(dim=-1)

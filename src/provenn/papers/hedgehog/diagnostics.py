"""Spikiness and monotonicity (section 3): what attention weights that mimic softmax have, and earlier maps lack."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FLOOR = 1e-12


def attention_entropy(weights: Float[Tensor, "*batch queries tokens"]) -> Float[Tensor, "*batch queries"]:
    """−Σ_j a_j log a_j of each query, in nats: low where attention is spiky.

    >>> round(attention_entropy(torch.full((1, 4), 0.25)).item(), 4)
    1.3863
    """
    return -torch.special.xlogy(weights, weights).sum(dim=-1)


def cross_entropy(
    target: Float[Tensor, "*batch queries tokens"], weights: Float[Tensor, "*batch queries tokens"]
) -> Float[Tensor, "*batch queries"]:
    """−Σ_j a_j log â_j of each query; â is floored at 1e-12."""
    return -(target * weights.clamp_min(FLOOR).log()).sum(dim=-1)


def divergence(
    target: Float[Tensor, "*batch queries tokens"], weights: Float[Tensor, "*batch queries tokens"]
) -> Float[Tensor, "*batch queries"]:
    """KL(a ‖ â) = Σ_j a_j log(a_j / â_j) of each query, in nats: 0 only where the weights are equal."""
    return cross_entropy(target, weights) - attention_entropy(target)


def _ranks(x: Tensor, seen: Tensor) -> Tensor:
    """Ranks of the seen entries of a row, ties at their middle, less the mean rank; 0 where not seen."""
    below = (x.unsqueeze(-1) > x.unsqueeze(-2)) & seen.unsqueeze(-2)
    equal = (x.unsqueeze(-1) == x.unsqueeze(-2)) & seen.unsqueeze(-2)
    ranks = below.sum(-1) + 0.5 * (equal.sum(-1) - 1)
    mean = (ranks * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
    return ((ranks - mean) * seen).double()


def rank_correlation(
    products: Float[Tensor, "*batch queries tokens"],
    weights: Float[Tensor, "*batch queries tokens"],
    seen: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "*batch queries"]:
    """Spearman's correlation of a query's weights with its dot products q·k: 1 where attention is monotone.

    Args:
        products: q·k.
        weights: a.
        seen: True where a token may be attended. Queries with fewer than two such tokens, or whose weights are all
            equal, give NaN: leave them out of a mean with `nanmean`.

    Memory grows with queries · tokens².
    """
    seen = torch.ones_like(weights, dtype=torch.bool) if seen is None else seen.expand_as(weights)
    a, b = _ranks(products, seen), _ranks(weights, seen)
    return ((a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()).to(weights.dtype)


def inverted_pairs(
    products: Float[Tensor, "*batch queries tokens"],
    weights: Float[Tensor, "*batch queries tokens"],
    seen: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "*batch queries"]:
    """Share of the pairs of tokens in which the one with the smaller q·k has the larger weight; NaN without a pair.

    Arguments as in `rank_correlation`.
    """
    seen = torch.ones_like(weights, dtype=torch.bool) if seen is None else seen.expand_as(weights)
    pairs = (products.unsqueeze(-1) > products.unsqueeze(-2)) & seen.unsqueeze(-1) & seen.unsqueeze(-2)
    inverted = pairs & (weights.unsqueeze(-1) < weights.unsqueeze(-2))
    return inverted.sum(-1).sum(-1).to(weights.dtype) / pairs.sum(-1).sum(-1).masked_fill(~pairs.any(-1).any(-1), 0)


def softmax_weights(
    queries: Float[Tensor, "*batch queries head_dim"],
    keys: Float[Tensor, "*batch tokens head_dim"],
    *,
    causal: bool = True,
    mask: Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "*batch queries tokens"]:
    """a = softmax(q kᵀ · scale), in float32 at least: the target of distillation.

    Args:
        queries, keys: q and k.
        causal: query i sees tokens up to i only; where there are fewer queries than tokens, they are the last ones.
        mask: True where a token may be attended; broadcasts to (*batch, tokens).
        scale: 1/√head_dim by default.
    """
    scale = 1 / math.sqrt(queries.shape[-1]) if scale is None else scale
    dtype = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(dtype) @ keys.to(dtype).mT * scale
    may = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    may = may.tril(scores.shape[-1] - scores.shape[-2]) if causal else may
    may = may if mask is None else may & mask.unsqueeze(-2)
    # A query that may attend to nothing has weights 0, not NaN.
    return scores.masked_fill(~may, -torch.inf).softmax(dim=-1).masked_fill(~may, 0)

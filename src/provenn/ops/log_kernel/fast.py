"""Attention from logarithms of features, in blocks of queries, each relative to the largest that it has seen.

Exponentials of unbounded keys fit no floating-point number, and no shift of them that is the same for all queries is
right where attention is causal: relative to a later key all earlier ones vanish. A shift of feature r by M_r cancels
between φ_r(q) and φ_r(k), so each query takes for M_r the maximum over the keys up to its own (log-sum-exp with a
running maximum). Then its largest term is 1: no denominator vanishes, and what underflows is below rounding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from provenn.core.narrowing import present

from .reference import log_attention_weights

BLOCK = 8  # queries: inside a block every pair has its features summed one by one


class LogState(NamedTuple):
    """What attention without factors remembers of all keys: Σ_j φ(k_j) (v_j, 1)ᵀ relative to each feature's maximum."""

    sums: Float[Tensor, "*batch features both"]
    peak: Float[Tensor, "*batch features"]

    @classmethod
    def empty(cls, *batch: int, features: int, dim: int, like: Tensor) -> "LogState":
        """The state of no tokens."""
        lowest = torch.finfo(like.dtype).min  # finite, so that differences are numbers
        return cls(like.new_zeros(*batch, features, dim + 1), like.new_full((*batch, features), lowest))


def log_attention(
    queries: Float[Tensor, "*batch queries features"],
    keys: Float[Tensor, "*batch tokens features"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    factors: Float[Tensor, "*heads queries tokens"] | None = None,
    state: LogState | None = None,
) -> tuple[Float[Tensor, "*batch queries dim"], LogState | None]:
    """y_i = Σ_{j ≤ i} a_ij v_j, a_ij ∝ f_ij Σ_r e^{log φ_r(q_i) + log φ_r(k_j)}, for logarithms of any size.

    Args:
        queries: log φ(q) of the last tokens, or of all.
        keys: log φ(k); −∞ where a token may not be attended.
        values: v.
        factors: f ≥ 0 of every pair, such as e^{b_{j−i}}; they take O(tokens) a query, without them it is O(1).
        state: of attention without factors, what came before.

    Returns the output of every query, 0 where nothing may be attended, and the state after the last where there is one.
    """
    if state is None and isinstance(keys.shape[-2], torch.SymInt):
        # An export for any number of tokens cannot count its blocks, so it takes all weights at once.
        blind = (keys > -torch.inf).any(dim=-1).cumsum(dim=-1)[..., -queries.shape[-2] :] == 0
        weights = log_attention_weights(queries, keys, factors).masked_fill(blind.unsqueeze(-1), 0)
        return weights @ values, None
    # A value of 1 beside v: its weighted sum is the denominator, in the same product.
    augmented_values = F.pad(values, (0, 1), value=1.0)
    if factors is None and state is None:
        state = LogState.empty(*keys.shape[:-2], features=keys.shape[-1], dim=values.shape[-1], like=keys)
    lowest = torch.finfo(keys.dtype).min
    past = keys.shape[-2] - queries.shape[-2]
    outputs = []
    for start in range(past, keys.shape[-2], BLOCK):
        log_queries = queries[..., start - past : start - past + BLOCK, :]
        block = slice(start, start + log_queries.shape[-2])
        log_keys, v = keys[..., block, :], augmented_values[..., block, :]
        if state is not None:
            peak = state.peak
        elif start:
            peak = keys[..., :start, :].detach().amax(dim=-2).clamp_min(lowest)
        else:
            peak = torch.full_like(keys[..., 0, :], lowest)
        running = torch.maximum(log_keys.detach().cummax(dim=-2).values, peak.unsqueeze(-2))
        shift = (log_queries.detach() + running).amax(dim=-1, keepdim=True)
        later = torch.ones(
            log_queries.shape[-2], log_queries.shape[-2], dtype=torch.bool, device=log_queries.device
        ).triu(1)
        # (*batch, block, block, features), one by one: inside a block each query has a running maximum of its own.
        pairs = log_queries.unsqueeze(-2) + log_keys.unsqueeze(-3) - shift.unsqueeze(-1)
        inside = pairs.masked_fill(later.unsqueeze(-1), -torch.inf).exp().sum(dim=-1)
        # What came before is relative to its own peak; this brings it to each query's shift, ≤ 1 by construction.
        reach = (log_queries + peak.unsqueeze(-2) - shift).exp()
        if state is not None:
            sums = reach @ state.sums + inside @ v
            # The state moves to the new maximum, which never falls, so its factor is ≤ 1.
            last = running[..., -1, :]
            decayed = state.sums * (peak - last).exp().unsqueeze(-1)
            state = LogState(decayed + (log_keys - last.unsqueeze(-2)).exp().mT @ v, last)
        else:
            f = present(factors, "factors")[..., start - past : start - past + BLOCK, :]
            earlier = reach @ (keys[..., :start, :] - peak.unsqueeze(-2)).exp().mT
            sums = (earlier * f[..., :start]) @ augmented_values[..., :start, :] + (inside * f[..., block]) @ v
        normalisers = sums[..., -1:]
        outputs.append(sums[..., :-1] / torch.where(normalisers > 0, normalisers, 1))
    return torch.cat(outputs, dim=-2), state

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
    both = F.pad(values, (0, 1), value=1.0)
    if factors is None and state is None:
        state = LogState.empty(*keys.shape[:-2], features=keys.shape[-1], dim=values.shape[-1], like=keys)
    lowest = torch.finfo(keys.dtype).min
    before = keys.shape[-2] - queries.shape[-2]
    outputs = []
    for start in range(before, keys.shape[-2], BLOCK):
        a = queries[..., start - before : start - before + BLOCK, :]
        block = slice(start, start + a.shape[-2])
        e, v = keys[..., block, :], both[..., block, :]
        if state is not None:
            peak = state.peak
        elif start:
            peak = keys[..., :start, :].detach().amax(dim=-2).clamp_min(lowest)
        else:
            peak = torch.full_like(keys[..., 0, :], lowest)
        running = torch.maximum(e.detach().cummax(dim=-2).values, peak.unsqueeze(-2))
        shift = (a.detach() + running).amax(dim=-1, keepdim=True)
        later = torch.ones(a.shape[-2], a.shape[-2], dtype=torch.bool, device=a.device).triu(1)
        pairs = a.unsqueeze(-2) + e.unsqueeze(-3) - shift.unsqueeze(-1)
        inside = pairs.masked_fill(later.unsqueeze(-1), -torch.inf).exp().sum(dim=-1)
        reach = (a + peak.unsqueeze(-2) - shift).exp()
        if state is not None:
            sums = reach @ state.sums + inside @ v
            last = running[..., -1, :]
            kept = state.sums * (peak - last).exp().unsqueeze(-1)
            state = LogState(kept + (e - last.unsqueeze(-2)).exp().mT @ v, last)
        else:
            assert factors is not None
            f = factors[..., start - before : start - before + BLOCK, :]
            earlier = reach @ (keys[..., :start, :] - peak.unsqueeze(-2)).exp().mT
            sums = (earlier * f[..., :start]) @ both[..., :start, :] + (inside * f[..., block]) @ v
        bottom = sums[..., -1:]
        outputs.append(sums[..., :-1] / torch.where(bottom > 0, bottom, 1))
    return torch.cat(outputs, dim=-2), state

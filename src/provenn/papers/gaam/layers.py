"""Gaussian Adaptive Attention, GAAM (Ioannides et al., 2024, arXiv:2401.11143): the gate of the paper's experiments.

The library's "mixture", which carries the same name, is in `mixture.py`. Neither compares positions with each other.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import check_heads, check_tokens, hide_tokens, split_heads
from provenn.ops.autograd import at_least_single
from provenn.ops.softmax_attention import softmax_attention
from provenn.papers.gaam.slices import (
    align_mask,
    check_slices,
    count_from_end,
    join_slices,
    moments,
    seen_slices,
    split_slices,
)

FLOOR = 1e-8  # added to every variance


class GateState(NamedTuple):
    """What a stream keeps of the tokens so far: the first, and count, sum and sum of squares of what differs from it.

    Differences from the first token leave variances as they are, and lose no digits to a large mean.
    """

    first: Float[Tensor, "batch dim"]
    seen: Float[Tensor, "batch 1"]
    total: Float[Tensor, "batch dim"]
    squares: Float[Tensor, "batch dim"]


class GaussianAdaptiveAttention(nn.Module):
    """Gate every entry by how near it is to the mean of its feature along an axis: GAAM of the experiments.

    Of each head's slice of the axis, with means and variances of each example and feature along it:

    z = (x − (μ + δ)) / √(σ² + 1e-8 + ε),  G = exp(−z² / 2ξ),  y = x ⊙ G   (Algorithm 1)

    ξ is not squared (the text squares it, the algorithm and the code do not), G is not normalised, and there is no
    residual. With δ = 0 a slice of n entries has Σ z² ≤ n: the mean of −log G over any slice is 1 / 2ξ, whatever it
    holds.

    Args:
        dim: d, features: the last axis of the input.
        heads: H contiguous slices of the axis, each with its own δ and ξ.
        axis: along which mean and variance are taken: any but the last, negative ones too. Of the example axis, 0, it
            mixes examples.
        pool: an axis over which the input is averaged before, as the scripts do with time; the gate is the same all
            along it.
        causal: mean and variance of the positions up to each, which then depends on nothing that comes later; of one
            head. With axis −2 it streams.
        uneven: whether the last head takes the rest where heads do not divide the axis; the scripts refuse it.
        positive: keep ξ above zero by a softplus; as released it is free, and may become negative, where G is above 1.
        scale: ξ at the start.
        eps: ε.

    Shapes: any with at least two axes, the last of `dim`, to the same. Parameters: 2·H·d. Slot: token-mixer.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        axis: int = -2,
        pool: int | None = None,
        causal: bool = False,
        uneven: bool = False,
        positive: bool = False,
        scale: float = 2.0,
        eps: float = 1e-5,
    ):
        check_whole(dim=dim, heads=heads, axis=axis, pool=pool)
        check_finite(scale=scale, eps=eps)
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if axis == -1:
            raise ValueError("axis must not be the last, which holds the features, got -1")
        if causal and (heads > 1 or pool is not None):
            raise ValueError(f"a causal gate has one head and pools nothing, got heads={heads} and pool={pool}")
        if scale <= 0 or eps < 0:
            raise ValueError(f"scale must be above 0 and eps at least 0, got {scale} and {eps}")
        self.dim, self.heads, self.axis, self.pool, self.causal = dim, heads, axis, pool, causal
        self.uneven, self.positive, self.eps = uneven, positive, eps
        start = math.log(math.expm1(scale)) if positive else scale
        self.offset = nn.Parameter(torch.zeros(heads, dim))
        self.scale = nn.Parameter(torch.full((heads, dim), float(start)))

    def widths(self) -> Float[Tensor, "heads dim"]:
        """ξ."""
        scale = at_least_single(self.scale)
        return F.softplus(scale) if self.positive else scale

    def _checked_axis(self, x: Tensor) -> int:
        """The axis, counted from the end."""
        if x.dim() < 2 or x.shape[-1] != self.dim:
            raise ValueError(f"expected at least two axes, the last of {self.dim} features, got {tuple(x.shape)}")
        axis = count_from_end(self.axis, x)
        if axis == -1:
            raise ValueError(f"axis {self.axis} of {tuple(x.shape)} holds the features: choose another")
        if not x.shape[axis]:
            raise ValueError(f"axis {self.axis} of {tuple(x.shape)} has no positions: expected at least one")
        return axis

    def weights(
        self, x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*mask"] | None = None
    ) -> Float[Tensor, "*weights"]:
        """G, of the shape of `x`, but for a pooled axis, which has one position; in float32 at least."""
        axis = self._checked_axis(x)
        y, mask = at_least_single(x), align_mask(mask, x, axis)
        if self.pool is not None:
            pool = count_from_end(self.pool, x)
            if pool in (axis, -1):
                raise ValueError(f"pool must be an axis besides features and normalised ones, got {self.pool}")
            y = y.mean(dim=pool, keepdim=True)
            if mask is not None and mask.shape[pool] > 1:
                raise ValueError("with a pooled axis the mask is (examples, positions of the normalised axis)")
        # The normalised axis last: (…, d, n), and (…, d, heads, slice) of it.
        y = y.movedim(axis, -1)
        seen = None if mask is None else mask.movedim(axis, -1)
        if self.causal:
            return self._running(y, seen).movedim(-1, axis)
        if y.shape[-1] % self.heads and not self.uneven:
            raise ValueError(
                f"heads must divide axis {self.axis}, of size {y.shape[-1]}, got {self.heads}; with uneven=True the "
                "last takes the rest"
            )
        check_slices(y.shape[-1], self.heads)
        parts = split_slices(y, self.heads)
        mean, variance = moments(parts, seen_slices(seen, y, self.heads))
        gate = self._gaussian(parts, mean, variance, self.offset.T[..., None], self.widths().T[..., None])
        return join_slices(gate, y.shape[-1]).movedim(-1, axis)

    def _gaussian(self, y: Tensor, mean: Tensor, variance: Tensor, offset: Tensor, width: Tensor) -> Tensor:
        deviation = (y - mean - at_least_single(offset)) / (variance + FLOOR + self.eps).sqrt()
        return torch.exp(-deviation.square() / (2 * width))

    def _running(self, y: Tensor, seen: Tensor | None) -> Tensor:
        """The gate of (…, d, n) by running means and variances; 1 where nothing was seen yet."""
        if seen is None:
            count = torch.arange(1, y.shape[-1] + 1, device=y.device, dtype=y.dtype)
            first, given = y[..., :1], y - y[..., :1]
        else:
            count = seen.to(y.dtype).cumsum(-1)
            at = seen.int().argmax(dim=-1, keepdim=True).expand(*y.shape[:-1], 1)
            first = y.gather(-1, at)
            given = torch.where(seen, y - first, 0)
        total, squares = given.cumsum(-1), given.square().cumsum(-1)
        gate = self._from_sums(y, first, count, total, squares)
        return gate if seen is None else torch.where(count > 0, gate, 1)

    def _from_sums(self, y: Tensor, first: Tensor, count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
        """The gate of (…, d, n), from sums over differences from the first that was seen."""
        count = count.clamp(min=1)
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        return self._gaussian(y, first + mean, variance, self.offset[0][:, None], self.widths()[0][:, None])

    def forward(
        self, x: Float[Tensor, "*shape"], *, mask: Bool[Tensor, "*mask"] | None = None, return_weights: bool = False
    ) -> Float[Tensor, "*shape"] | tuple[Float[Tensor, "*shape"], Float[Tensor, "*weights"]]:
        """The input times its gate.

        Args:
            x: what is gated.
            mask: True where a position may be seen, (examples, positions of the axis) or of the shape of `x` without
                features. What may not be seen has no part in mean and variance, and is gated all the same.
            return_weights: whether the gate is given too.

        Raises:
            ValueError: an axis that there is not, heads that do not divide it, another mask, or one that leaves an
                example nothing to see.
        """
        gate = self.weights(x, mask)
        y = x * gate.to(x.dtype)
        return (y, gate) if return_weights else y

    def init_state(self, batch: int) -> GateState:
        """The state of `batch` streams before their first token."""
        zeros = at_least_single(self.offset).new_zeros(batch, self.dim)
        return GateState(zeros, zeros[:, :1], zeros, zeros)

    def step(self, x_t: Float[Tensor, "batch dim"], state: GateState) -> tuple[Float[Tensor, "batch dim"], GateState]:
        """One token more of a causal gate, in constant memory."""
        if not self.causal:
            raise ValueError("a gate that looks both ways cannot stream: build it with causal=True")
        if x_t.dim() != 2 or x_t.shape[-1] != self.dim:
            raise ValueError(f"expected one token a stream, (batch, {self.dim}), got {tuple(x_t.shape)}")
        y = at_least_single(x_t)
        first = torch.where(state.seen > 0, state.first.to(y.dtype), y)
        given = y - first
        state = GateState(first, state.seen + 1, state.total + given, state.squares + given.square())
        gate = self._from_sums(*(part.unsqueeze(-1) for part in (y, *state))).squeeze(-1)
        return x_t * gate.to(x_t.dtype), state

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, axis={self.axis}, causal={self.causal}"


class GroupedQueryAttention(nn.Module):
    """Attention whose query heads share keys and values in groups (Ainslie et al., 2023), a norm before the last map.

    Args:
        dim: width of a token.
        heads: query heads; must divide `dim`.
        kv_heads: heads of keys and values; must divide `heads`.
        summed: as released with the paper: the products of a group's queries with their keys are summed before the
            softmax, and divided by √p twice, so that there are `kv_heads` heads in all. For the authors' weights.

    Shapes: (batch, tokens, dim) to the same. Xavier-normal matrices and zero biases at the start, as released.
    """

    def __init__(self, dim: int, heads: int = 8, kv_heads: int = 2, *, summed: bool = False):
        check_whole(dim=dim, heads=heads, kv_heads=kv_heads)
        super().__init__()
        check_heads(dim, heads)
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got kv_heads={kv_heads} and heads={heads}")
        self.dim, self.heads, self.kv_heads, self.summed = dim, heads, kv_heads, summed
        shared = dim // heads * kv_heads
        joined = shared if summed else dim
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, shared)
        self.value = nn.Linear(dim, shared)
        self.norm = nn.LayerNorm(joined)
        self.out = nn.Linear(joined, dim)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended."""
        check_tokens(x, self.dim, mask)
        q = split_heads(self.query(x), self.heads)
        seen = hide_tokens(x, mask)
        k, v = (split_heads(linear(seen), self.kv_heads) for linear in (self.key, self.value))
        groups = self.heads // self.kv_heads
        if self.summed:
            # A second √p, and the sum over the queries of a group: heads of one group stand side by side.
            q = q.unflatten(1, (self.kv_heads, groups)).sum(dim=2) / math.sqrt(q.shape[-1])
        else:
            k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        y = softmax_attention(q, k, v, mask=None if mask is None else mask[:, None, None, :])
        return self.out(self.norm(y.transpose(1, 2).flatten(2)))


class GQDAAM(nn.Module):
    """The gate, a map to fewer features, and grouped-query attention: GAAM before attention by dot products.

    Args:
        dim: features that come in.
        width: features of the attention.
        slices: heads of the gate.
        heads, kv_heads, summed: of `GroupedQueryAttention`.

    Shapes: (batch, n, dim) to (batch, n, width); the gate is along n.
    """

    def __init__(
        self, dim: int, width: int = 512, *, slices: int = 1, heads: int = 8, kv_heads: int = 2, summed: bool = False
    ):
        super().__init__()
        self.gate = GaussianAdaptiveAttention(dim, slices)
        self.reduce = nn.Linear(dim, width)
        self.attention = GroupedQueryAttention(width, heads, kv_heads, summed=summed)

    def forward(
        self,
        x: Float[Tensor, "batch n dim"],
        *,
        mask: Bool[Tensor, "batch n"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "batch n width"] | tuple[Float[Tensor, "batch n width"], Float[Tensor, "batch n dim"]]:
        """`mask` is True where a position may be seen; with `return_weights` the gate too."""
        gated, gate = self.gate(x, mask=mask, return_weights=True)
        y = self.attention(self.reduce(gated), mask=mask)
        return (y, gate) if return_weights else y


def importance_factor(weights: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Weights scaled to lie from 0 to 1: (A − min A) / (max A − min A), zeros where all are equal.

    >>> importance_factor(torch.tensor([[1.0, 3.0], [2.0, 5.0]]))
    tensor([[0.0000, 0.5000],
            [0.2500, 1.0000]])
    """
    lowest, highest = weights.aminmax()
    return (weights - lowest) / (highest - lowest).clamp(min=torch.finfo(weights.dtype).tiny)


def layer_shares(importance: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
    """The share of each layer in the importance of all: its sum over features, divided by that of all layers."""
    sums = importance.sum(dim=-1)
    return sums / sums.sum().clamp(min=torch.finfo(sums.dtype).tiny)

"""The Residual Expansion Theorem: a tower as an ensemble, level by level (arXiv:2510.03470).

T_n(x) = x + λ Σ_i F_i(x) + λ² Σ_{i<j} F_j'(x)[F_i(x)] + O(λ³)

Our forms for what lies beyond second order: level m of T_n is, by recursion over the modules,

G_n^(m) = G_{n−1}^(m) + [λ^{m−1}] F_n(Σ_r λ^r G_{n−1}^(r)).

Level 3 in full, with S_{k−1} = Σ_{i<k} F_i, is

Σ_{i<j<k} F_k' F_j' F_i + ½ Σ_k F_k''[S_{k−1}, S_{k−1}].
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .jets import taylor
from .policies import ScalePolicy
from .tower import ResidualTower


@dataclass(frozen=True)
class Expansion:
    """A tower's output and the levels of its ensemble at one input.

    Attributes:
        levels: level k is the sum over all chains of k modules, their scales included: λ^k G^(k), level 0 is x.
        output: T_n(x) itself.
    """

    levels: list[Tensor]
    output: Tensor

    def partial_sums(self) -> list[Tensor]:
        """The tower truncated at each order."""
        return list(itertools.accumulate(self.levels))

    def remainders(self) -> list[float]:
        """‖T_n(x) − Σ_{k≤m} level k‖ for each order m."""
        return [(self.output - total).norm().item() for total in self.partial_sums()]

    def shares(self) -> list[float]:
        """‖level k‖/‖T_n(x) − x‖ for k = 1, 2, …: how much of what the tower adds lies in each level."""
        added = (self.output - self.levels[0]).norm()
        return [(level.norm() / added).item() for level in self.levels[1:]]


def residual_expansion(tower: ResidualTower, x: Float[Tensor, "..."], order: int) -> Expansion:
    """Levels 0 … `order` of the tower at x, exactly, with one call of each module (Taylor mode).

    Where each module has a scale of its own, λ^k stands for the product of a chain's scales. The modules must be
    smooth at x; for ReLU the result is what holds away from the kinks.

    Args:
        tower: in evaluation mode if it has batch norms, whose output depends on the batch.
        x: the stream that enters the tower; float64 for remainders below 1e-6.
        order: m, the highest level; costs O(n m²).
    """
    if order < 0:
        raise ValueError(f"order must be at least 0, got {order}")
    _refuse_training_norms(tower)
    levels = [x] + [torch.zeros_like(x)] * order
    for f in branches(tower):
        if order:
            # G_n^(m) = G_{n−1}^(m) + [λ^{m−1}] F_n(…): a module's series to one order less, since its scale gives one.
            added = taylor(f, levels[:order])
            # O(n m²) instead of C(n, m) chains, and without the noise of finite differences in λ.
            levels = [x, *(level + term for level, term in zip(levels[1:], added))]
    with torch.no_grad():
        return Expansion(levels, tower(x))


def branches(tower: ResidualTower) -> list[Callable[[Tensor], Tensor]]:
    """λ_i F_i of each module, as the policy sees it: the scale and a norm before the block included."""

    def branch(join: ScalePolicy, block: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda z: join.branch(z, block, tower.depth)

    return [branch(join, block) for join, block in tower.pairs()]


def chain(fs: Sequence[Callable[[Tensor], Tensor]], x: Float[Tensor, "..."], path: Sequence[int]) -> Tensor:
    """One member of the ensemble: F_ik'(x) … F_i2'(x)[F_i1(x)] for i1 < … < ik; x itself for the empty path."""
    if not path:
        return x
    # Fused attention has no forward-mode derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        v = fs[path[0]](x)
        for index in path[1:]:
            # Every Jacobian is taken at x, not at the stream so far: what the stream adds belongs to higher levels.
            v = torch.func.jvp(fs[index], (x,), (v,))[1]
    return v


def enumerate_level(tower: ResidualTower, x: Float[Tensor, "..."], order: int) -> Tensor:
    """Level `order` summed member by member: C(n, k) chains, and at order 3 the curvature terms.

    The reference for `residual_expansion` on small towers; orders above 3 are refused, except that linear modules,
    which have no curvature, may use `enumerate_chains`.
    """
    if order > 3:
        raise ValueError(f"enumeration knows orders 0 to 3, got {order}; use residual_expansion")
    total = enumerate_chains(tower, x, order)
    if order == 3:
        fs = branches(tower)
        earlier = torch.zeros_like(x)
        for f in fs:
            # ½ F_k''[S, S] with S = Σ_{i<k} F_i: a formula without it leaves a remainder of λ³ and not λ⁴.
            total = total + 0.5 * _second_derivative(f, x, earlier)
            earlier = earlier + chain([f], x, (0,))
    return total


def enumerate_chains(tower: ResidualTower, x: Float[Tensor, "..."], order: int) -> Tensor:
    """Σ over all chains of `order` modules, one by one; all of the level for linear modules or up to order 2."""
    fs = branches(tower)
    paths = itertools.combinations(range(len(fs)), order)
    return torch.stack([chain(fs, x, path) for path in paths]).sum(0) if order <= len(fs) else torch.zeros_like(x)


def sample_chains(
    tower: ResidualTower, x: Float[Tensor, "..."], order: int, samples: int, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Estimate Σ over the chains of `order` modules from random ones, where C(n, k) is out of reach.

    Returns:
        the unbiased estimate and its standard error, entry by entry.
    """
    n = len(tower.blocks)
    if not 1 <= order <= n:
        raise ValueError(f"order must be between 1 and the {n} modules, got {order}")
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    fs = branches(tower)
    picks = [sorted(torch.randperm(n, generator=generator)[:order].tolist()) for _ in range(samples)]
    estimates = torch.stack([chain(fs, x, path) for path in picks]) * math.comb(n, order)
    return estimates.mean(0), estimates.std(0) / samples**0.5


def _second_derivative(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """F''(x)[v, v]."""

    def first(z: Tensor) -> Tensor:
        return torch.func.jvp(f, (z,), (v,))[1]

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(first, (x,), (v,))[1]


def _refuse_training_norms(tower: nn.Module) -> None:
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in tower.modules()):
        raise ValueError("a batch norm in training mode mixes the batch; call .eval() first")


@dataclass(frozen=True)
class PathLengths:
    """How the 2^n paths of a tower spread over lengths, each weighted by the product of its scales.

    Attributes:
        weights: share of all weight at each length 0 … n; sums to 1.
        log_total: log Σ_k C(n,k) λ^k = n log(1 + λ).
    """

    weights: Float[Tensor, " lengths"]
    log_total: float

    @property
    def mean(self) -> float:
        """nλ/(1 + λ): n/2 for λ = 1, about √n for 1/√n, about 1 for 1/n."""
        return (torch.arange(len(self.weights), dtype=torch.float64) * self.weights).sum().item()

    @property
    def std(self) -> float:
        squares = (torch.arange(len(self.weights), dtype=torch.float64) ** 2 * self.weights).sum().item()
        # E[k²] − E[k]², which rounds below 0 where all paths have one length.
        return max(squares - self.mean**2, 0.0) ** 0.5


def path_lengths(scales: Sequence[float]) -> PathLengths:
    """Path lengths of a tower whose modules have these scales and equal size: Binomial(n, λ/(1+λ)) for equal ones.

    >>> round(path_lengths([1.0] * 50).mean, 6)
    25.0
    """
    weights = torch.ones(1, dtype=torch.float64)
    for scale in scales:
        if scale < 0:
            raise ValueError(f"scales must not be negative, got {scale}")
        probability = scale / (1 + scale)
        longer = torch.zeros(len(weights) + 1, dtype=torch.float64)
        # One module more: a path goes round it with weight 1 or through it with weight λ, as shares of 1 + λ.
        longer[:-1] = weights * (1 - probability)
        longer[1:] += weights * probability
        weights = longer
    return PathLengths(weights, sum(math.log1p(scale) for scale in scales))


def level_terms(n: int, order: int) -> int:
    """How many terms a level of smooth modules has: C(n, k) chains, and at order 3 ordered pairs of curvature.

    >>> level_terms(8, 2), level_terms(8, 3)
    (28, 196)
    """
    if not 0 <= order <= 3:
        raise ValueError(f"terms are known for orders 0 to 3, got {order}")
    # Pairs (i, j) with i, j < k, ordered and with i = j: the square of the sum S_{k−1}.
    curvature = sum((k - 1) ** 2 for k in range(1, n + 1)) if order == 3 else 0
    return math.comb(n, order) + curvature

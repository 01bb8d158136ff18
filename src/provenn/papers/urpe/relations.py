"""How two tokens stand to each other: the indices r(i, j) that bias and multiplier are looked up by."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.nn.arguments import check_whole
from provenn.ops.toeplitz import dense_matrix


@runtime_checkable
class Relations(Protocol):
    """An index provider: which of `size` relations the key at j has to the query at i."""

    @property
    def size(self) -> int:
        """How many relations there are."""

    def index(self, queries: Int[Tensor, " queries"], keys: Int[Tensor, " keys"]) -> Int[Tensor, "queries keys"]:
        """r(i, j) of tokens at these positions."""


def check_sizes(**sizes: int) -> None:
    """Are these whole numbers of at least 1?

    Raises:
        ValueError: one is not, by its name.
    """
    check_whole(**sizes)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


@dataclass(frozen=True)
class Offsets:
    """One relation an offset: r = (j − i) + n − 1 ("unique" in the authors' code). Farther ones are the farthest's.

    Args:
        reach: n, tokens that have offsets of their own.
        causal: keys are not later than their query: n relations instead of 2n − 1.

    >>> Offsets(3).index(torch.arange(3), torch.arange(3)).tolist()
    [[2, 3, 4], [1, 2, 3], [0, 1, 2]]
    """

    reach: int
    causal: bool = False

    def __post_init__(self) -> None:
        check_sizes(max_length=self.reach)

    @property
    def size(self) -> int:
        return self.reach if self.causal else 2 * self.reach - 1

    def index(self, queries: Int[Tensor, " queries"], keys: Int[Tensor, " keys"]) -> Int[Tensor, "queries keys"]:
        return self._of(keys - queries[:, None])

    def _of(self, offsets: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        return offsets.clamp(1 - self.reach, 0 if self.causal else self.reach - 1) + self.reach - 1

    def matrix(self, table: Float[Tensor, "relations heads"], tokens: int) -> Float[Tensor, "heads tokens tokens"]:
        """The table at r(i, j) of all pairs, made of views and one copy: a gather's gradient takes longer."""
        ends = torch.arange(1 - tokens, 1 if self.causal else tokens, device=table.device)
        return dense_matrix(table[self._of(ends)].mT, causal=self.causal)


@dataclass(frozen=True)
class LogBuckets:
    """Offsets in buckets that widen with the distance, as T5 and DeBERTa have them (the authors' option).

    Of each sign, |j − i| < k/4 has a bucket of its own, and the rest share k/4 more in equal steps of the logarithm
    up to `farthest`, beyond which all is one. Two of the k + 1 numbers are never used, as in the authors' code.

    Args:
        buckets: k.
        farthest: the distance from which on there is one bucket.
    """

    buckets: int = 64
    farthest: int = 128

    def __post_init__(self) -> None:
        check_sizes(buckets=self.buckets, max_distance=self.farthest)
        if self.buckets < 8 or self.buckets % 4:
            raise ValueError(f"buckets must be a multiple of 4 and at least 8, got {self.buckets}")
        if self.farthest <= self.buckets // 4:
            raise ValueError(f"max_distance must be more than buckets / 4 = {self.buckets // 4}, got {self.farthest}")

    @property
    def size(self) -> int:
        return self.buckets + 1

    def index(self, queries: Int[Tensor, " queries"], keys: Int[Tensor, " keys"]) -> Int[Tensor, "queries keys"]:
        offsets = keys - queries[:, None]
        half, exact = self.buckets // 2, self.buckets // 4
        distance = offsets.abs()
        # In float32, as the authors compute it: at a bucket's edge another precision may fall on the other side.
        steps = (distance.clamp_min(1).float() / exact).log() / math.log(self.farthest / exact) * (half - exact)
        bucket = torch.where(distance < exact, distance, (exact + steps.long()).clamp_max(half - 1)) * offsets.sign()
        return bucket + 2 * (bucket >= 0) + half - 1


@dataclass(frozen=True)
class Window:
    """One relation an offset of rows and columns, for tokens on a grid, row by row (as in Swin's windows).

    Args:
        height, width: of the grid.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        check_sizes(height=self.height, width=self.width)

    @property
    def size(self) -> int:
        return (2 * self.height - 1) * (2 * self.width - 1)

    def index(self, queries: Int[Tensor, " queries"], keys: Int[Tensor, " keys"]) -> Int[Tensor, "queries keys"]:
        cells = self.height * self.width
        if max(len(queries), len(keys)) > cells:
            grid = f"{self.height}×{self.width}"
            raise ValueError(f"a grid of {grid} has {cells} cells, got {max(len(queries), len(keys))} tokens")
        rows = keys // self.width - (queries // self.width)[:, None]
        columns = keys % self.width - (queries % self.width)[:, None]
        rows = rows.clamp(1 - self.height, self.height - 1) + self.height - 1
        return rows * (2 * self.width - 1) + columns + self.width - 1


@dataclass(frozen=True)
class Paths:
    """One relation a length of the shortest path between two nodes of a graph (as in Graphormer).

    0 to `farthest` are lengths, longer ones the farthest's; then comes "no path" (a length of −1), and the relation of
    a virtual node to all. Lengths are given to the layer with the tokens.

    Args:
        farthest: the longest path with a relation of its own.
    """

    farthest: int

    def __post_init__(self) -> None:
        check_sizes(max_distance=self.farthest)

    @property
    def size(self) -> int:
        return self.farthest + 3

    def of(self, lengths: Int[Tensor, "*batch nodes nodes"]) -> Int[Tensor, "*batch nodes nodes"]:
        """r of path lengths, −1 where there is no path."""
        return torch.where(lengths < 0, self.farthest + 1, lengths.clamp_max(self.farthest))

    def with_virtual_node(self, lengths: Int[Tensor, "*batch nodes nodes"]) -> Int[Tensor, "*batch more more"]:
        """r with a node before all others that has one relation to everything, itself included."""
        return torch.nn.functional.pad(self.of(lengths), (1, 0, 1, 0), value=self.farthest + 2)

    def index(self, queries: Int[Tensor, " queries"], keys: Int[Tensor, " keys"]) -> Int[Tensor, "queries keys"]:
        raise ValueError("positions in a sequence do not give path lengths: call the layer with relations=")


RELATIONS: dict[str, Callable[..., Relations]] = {
    "offset": Offsets,
    "bucket": LogBuckets,
    "grid": Window,
    "path": Paths,
}

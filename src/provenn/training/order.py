"""The order in which a training sees its examples: fixed by the seed, the same again for a run that goes on."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler


class EpochSampler(Sampler[int]):
    """A fresh order every epoch that depends on seed and epoch alone, so that a resumed run sees the same batches.

    Of several processes each takes every so manieth example: together their batches are one process's larger batch.
    Where the count does not divide, the first examples of the order come twice.

    Args:
        count, seed: how many examples, and what fixes their order.
        rank, processes: which of how many processes this is.
        epoch, start: where a resumed run goes on: so many of the process's examples of this epoch were taken.
    """

    def __init__(self, count: int, seed: int, rank: int = 0, processes: int = 1, *, epoch: int = 0, start: int = 0):
        self.count, self.seed, self.rank, self.processes = count, seed, rank, processes
        self.epoch, self.start = epoch, start

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this as each epoch begins; a resumed one keeps its start."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator)
        indices = torch.arange(self.rank, self.processes * len(self), self.processes) % self.count
        return iter(order[indices].tolist()[self.start :])

    def __len__(self) -> int:
        return math.ceil(self.count / self.processes)


class Batches(IterableDataset):
    """Whole batches in the order in which they are made: training data that are counted by steps, not by passes.

    A run that goes on makes them again, and leaves out those that it has had.

    Args:
        make: begins them anew, the same each time.
        count: how many there are.
        start: how many are left out.
    """

    def __init__(self, make: Callable[[], Iterable[Any]], count: int, start: int = 0):
        self.make, self.count, self.start = make, count, start

    @classmethod
    def of(cls, batches: Iterable[Any]) -> "Batches":
        """Batches that are there already, or others, which are held."""
        if isinstance(batches, Batches):
            return batches
        held = list(batches)
        return cls(lambda: held, len(held))

    def after(self, done: int) -> "Batches":
        """All but the first."""
        return Batches(self.make, self.count, done)

    def __iter__(self) -> Iterator[Any]:
        return islice(self.make(), self.start, self.count)

    def __len__(self) -> int:
        return self.count

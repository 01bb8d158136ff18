"""The order in which a training sees its examples: fixed by the seed, the same again for a run that goes on."""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


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

"""How a training is run, whatever it learns: the hardware that it takes, and what it leaves in a folder."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.distributed import METHODS

STRATEGIES = ("auto", "ddp", "fsdp")
LOGGERS = ("csv", "tensorboard")
PROCESSES = 16  # that may be asked for where there are fewer cores: hundreds would stop the machine


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuse a number of something that is too small."""
    if value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, got {value}")


@dataclass(frozen=True)
class Hardware:
    """What a training runs on, and how its processes share the work.

    Lightning starts the processes of a machine by running the program again, or torchrun has. Only the first of all
    returns from a training; the others leave the program.

    Args:
        device: cpu, cuda, mps or a torch device.
        devices: processes on each machine, a device each. The recipe's `batch_size` is each one's: two give the weights
            of one with twice the batch, to rounding, where the loss is a mean over examples and nothing draws or mixes
            the batch.
        num_nodes: machines.
        strategy: auto, ddp or fsdp. With fsdp each process holds a part of the weights, their gradients and
            the optimizer's state.
        context_parallel: processes that share each sequence, for language models of softmax attention. Where `devices`
            is 1, there are as many processes. The weights are those of one process, to rounding, where nothing draws.
        context_method: how they share it, one of `provenn.distributed.METHODS`.
        workers: processes that read the data; 0 reads in the main process. Augmentation draws other numbers with them.

    Raises:
        UserError: a number or a word that cannot be, here or at all.
    """

    device: str = "cpu"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    context_parallel: int = 1
    context_method: str = "ring"
    workers: int = 0

    def __post_init__(self) -> None:
        check_at_least("workers", self.workers, 0)
        if self.strategy not in STRATEGIES:
            raise UserError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        for name in ("devices", "num_nodes", "context_parallel"):
            check_at_least(name, getattr(self, name), 1)
        if self.context_method not in METHODS:
            raise UserError(f"context_method must be one of {', '.join(METHODS)}, got {self.context_method!r}")
        if self.processes % self.context_parallel:
            raise UserError(f"context_parallel={self.context_parallel} does not divide {self.processes} processes")
        if self.context_parallel > 1 and self.sharded:
            raise UserError("context_parallel needs whole weights in each process: take strategy ddp")
        if self.device.startswith("cuda") and self.processes_here > torch.cuda.device_count():
            raise UserError(
                f"devices must be at most {torch.cuda.device_count()} on this machine, got {self.processes_here}"
            )
        most = max(os.cpu_count() or 1, PROCESSES)
        for name, count in (("devices", self.processes_here), ("workers", self.workers)):
            if count > most:
                raise UserError(f"{name} must be at most {most} on this machine, got {count}")

    @property
    def processes_here(self) -> int:
        """Processes on each machine."""
        return self.context_parallel if self.devices * self.num_nodes == 1 else self.devices

    @property
    def processes(self) -> int:
        """Processes on all machines."""
        return self.processes_here * self.num_nodes

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return self.strategy == "fsdp"


@dataclass(frozen=True)
class Saving:
    """What a training writes to a folder, besides a checkpoint after every epoch.

    Args:
        folder: where to.
        resume: go on from the folder's checkpoint, where there is one.
        save_every: steps between two further checkpoints; None writes those of the epochs alone.
        keep_best: number of epochs, the best by the validation metric, whose models are kept as
            `best-EPOCH.safetensors`.
        save: writes such a model to a file.
        logger: csv or tensorboard: loss and rate of each step, metrics of each epoch, under `folder`/log.
    """

    folder: Path
    resume: bool = False
    save_every: int | None = None
    keep_best: int = 0
    save: Callable[[nn.Module, Path], None] | None = None
    logger: str | None = None

    def __post_init__(self) -> None:
        check_at_least("keep_best", self.keep_best, 0)
        if self.save_every is not None:
            check_at_least("save_every", self.save_every, 1)
        if self.keep_best and self.save is None:
            raise UserError("keep_best needs `save`, which writes a model to a file")
        if self.logger is not None and self.logger not in LOGGERS:
            raise UserError(f"logger must be one of {', '.join(LOGGERS)}, got {self.logger!r}")

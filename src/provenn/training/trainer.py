"""Lightning's trainer, set up so that a training is deterministic, quiet, and ends as a program expects."""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from provenn.core.errors import UserError

LIGHTNING = ("lightning.pytorch", "lightning.fabric", "lightning")  # its loggers
LOGGERS = ("csv", "tensorboard")
LOG = "log"  # the folder of what they write


def load_lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning
        import lightning.pytorch.callbacks
    return lightning


def make_strategy(name: str, processes: int) -> Any:
    """Lightning's strategy of that name."""
    if name != "fsdp":
        return "ddp" if name == "auto" and processes > 1 else name
    return load_lightning().pytorch.strategies.ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def make_logger(name: str, out: Path) -> Any:
    """Lightning's logger of that name; each start of a run gets a folder `version_N` under `out`/log."""
    if name not in LOGGERS:
        raise UserError(f"logger must be one of {', '.join(LOGGERS)}, got {name!r}")
    if name == "tensorboard" and not any(
        importlib.util.find_spec(package) for package in ("tensorboard", "tensorboardX")
    ):
        raise UserError("the tensorboard logger needs a package: pip install 'provenn[tensorboard]'; or take csv")
    loggers = load_lightning().pytorch.loggers
    return (loggers.CSVLogger if name == "csv" else loggers.TensorBoardLogger)(out, name=LOG)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Ask torch for deterministic algorithms, and leave it as it was."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted or before[0], warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def plain_interrupt(trainer: Any) -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt, where Lightning would leave the process."""
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    if trainer.interrupted:
        raise KeyboardInterrupt

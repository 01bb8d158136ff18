"""Lightning's trainer, set up so that a training is deterministic, quiet, and ends as a program expects."""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from provenn.core.errors import UserError
from provenn.training.checkpoints import checkpoint_writer
from provenn.training.options import Hardware, Saving
from provenn.training.recipes import Recipe

LIGHTNING = ("lightning.pytorch", "lightning.fabric", "lightning")  # its loggers
LOG = "log"  # the folder of what they write


def load_lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning
        import lightning.pytorch.callbacks
    return lightning


def make_trainer(recipe: Recipe, hardware: Hardware, saving: Saving | None, history: Any) -> Any:
    """The trainer of one training; `history` is the callback that notes it."""
    lightning = load_lightning()
    callbacks = [history]
    if saving is not None:
        callbacks.append(
            lightning.pytorch.callbacks.ModelCheckpoint(
                dirpath=saving.folder,
                filename="last",
                save_top_k=1,
                enable_version_counter=False,
                save_on_train_epoch_end=True,
            )
        )
    kind = hardware.device.split(":")[0]
    return lightning.Trainer(
        accelerator={"cuda": "gpu"}.get(kind, kind),
        devices=hardware.processes_here,
        num_nodes=hardware.num_nodes,
        strategy=_strategy(hardware),
        use_distributed_sampler=False,
        max_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        gradient_clip_val=recipe.clip,
        accumulate_grad_batches=recipe.accumulate,
        precision=recipe.precision,
        callbacks=callbacks,
        plugins=[] if saving is None else [checkpoint_writer()],
        logger=False if saving is None or saving.logger is None else _logger(saving.logger, saving.folder),
        enable_checkpointing=saving is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=None if saving is None else saving.folder,
    )


def _strategy(hardware: Hardware) -> Any:
    """Lightning's strategy, by name or as an object."""
    if hardware.sharded:
        return load_lightning().pytorch.strategies.ModelParallelStrategy(
            data_parallel_size=hardware.processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return "ddp" if hardware.strategy == "auto" and hardware.processes > 1 else hardware.strategy


def _logger(name: str, folder: Path) -> Any:
    """Lightning's logger of that name; each start of a run gets a folder `version_N` under `folder`/log."""
    if name == "tensorboard" and not any(
        importlib.util.find_spec(package) for package in ("tensorboard", "tensorboardX")
    ):
        raise UserError("the tensorboard logger needs a package: pip install 'provenn[tensorboard]'; or take csv")
    loggers = load_lightning().pytorch.loggers
    return (loggers.CSVLogger if name == "csv" else loggers.TensorBoardLogger)(folder, name=LOG)


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

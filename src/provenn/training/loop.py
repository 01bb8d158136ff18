"""Training, on Lightning: the same loop for every task, deterministic for a seed, resumable bit for bit."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.distributed import METHODS
from provenn.tasks.base import Task, TaskData, count_examples
from provenn.training.augmentation import check_recipe
from provenn.training.checkpoints import check_fits, checkpoint_writer, clear_best, newest
from provenn.training.context import TokenShare, check_divides_tokens
from provenn.training.history import BestModels, history_class, in_float32
from provenn.training.module import Diverged, module_class
from provenn.training.processes import leave_group, lost_ranks_reported, whole_state
from provenn.training.recipes import Recipe
from provenn.training.systems import before_saving
from provenn.training.trainer import (
    LIGHTNING,
    deterministic,
    load_lightning,
    make_logger,
    make_strategy,
    plain_interrupt,
)

STRATEGIES = ("auto", "ddp", "fsdp")
SHARDED_PRECISIONS = ("32-true", "bf16-mixed")
PROCESSES = 16  # that may be asked for where there are fewer cores: hundreds would stop the machine


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Args:
        model: trained, in eval mode.
        metrics: of the test split.
        curve: one entry an epoch: `epoch`, `train_loss`, and the validation metrics.
        seconds: wall time of the training.
        steps: how many were taken.
    """

    model: nn.Module
    metrics: dict[str, float]
    curve: list[dict[str, float | int]] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0

    def series(self, key: str) -> list[float | int]:
        """One column of the curve."""
        return [entry[key] for entry in self.curve if key in entry]


def fit(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: str = "cpu",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    context_parallel: int = 1,
    context_method: str = "ring",
    workers: int = 0,
    out: Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    keep_best: int = 0,
    save: Callable[[nn.Module, Path], None] | None = None,
    logger: str | None = None,
    title: str = "training",
) -> Fit:
    """Build a model from the seed and train it.

    The model may bring a loss, optimizers and a last step of its own: see `provenn.training.systems`.

    Args:
        build: makes the model; called after the seed is set, so that a seed fixes the weights.
        task, data, recipe: what is learned, from what, and how.
        seed: fixes weights, order, dropout and augmentation.
        device: cpu, cuda or mps.
        devices, num_nodes, strategy: how many processes train together on how many machines, and how: "ddp", or "fsdp",
            in which each holds a part of weights, gradients and the optimizer's state between steps. `batch_size` is
            each one's: two give the weights of one with twice the batch, to rounding, where the loss is a mean over
            examples and nothing draws or mixes the batch. Lightning starts those of a machine by running the program
            again (or torchrun has); only the first of all returns, the others leave the program.
        context_parallel, context_method: how many of these processes share each sequence, and by which method of
            `provenn.distributed.METHODS`: of language models of softmax attention. Where `devices` is 1 there
            are so many. The weights are those of one process, to rounding, where nothing draws.
        workers: processes that read the data; 0 reads in this one. Augmentation draws otherwise with them than without.
        out: a folder for checkpoints after every epoch; None keeps none.
        resume: go on from the checkpoint in `out` where there is one.
        save_every: a checkpoint after every so many steps too.
        keep_best, save: the models of so many best epochs by the validation metric are written, by `save(model, file)`,
            as `best-EPOCH.safetensors` in `out`.
        logger: "csv" or "tensorboard": loss and rate of each step, metrics of each epoch, under `out`/log.
        title: of the progress bar.

    Raises:
        UserError: a loss that is not finite, with the step at which it happened; patience or keep_best without their
            metric; another process that has ended; or what does not go together.
    """
    for name, value, least in (("workers", workers, 0), ("keep_best", keep_best, 0), ("save_every", save_every, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, got {value}")
    if out is None and (save_every or keep_best or logger):
        raise UserError("save_every, keep_best and logger write to a folder: give out")
    if keep_best and save is None:
        raise UserError("keep_best needs `save`, which writes a model to a file")
    if strategy == "fsdp" and (keep_best or recipe.ema is not None):
        raise UserError("keep_best and ema need whole weights in each process: take strategy ddp")
    if strategy not in STRATEGIES:
        raise UserError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    for name, value in (("devices", devices), ("num_nodes", num_nodes)):
        if value < 1:
            raise UserError(f"{name} must be a whole number of at least 1, got {value}")
    if context_parallel < 1:
        raise UserError(f"context_parallel must be a whole number of at least 1, got {context_parallel}")
    if context_parallel > 1:
        if devices * num_nodes == 1:
            devices = context_parallel
        if devices * num_nodes % context_parallel:
            raise UserError(f"context_parallel={context_parallel} does not divide {devices * num_nodes} processes")
        if context_method not in METHODS:
            raise UserError(f"context_method must be one of {', '.join(METHODS)}, got {context_method!r}")
        if strategy == "fsdp":
            raise UserError("context_parallel needs whole weights in each process: take strategy ddp")
    if strategy == "fsdp" and recipe.precision not in SHARDED_PRECISIONS:
        raise UserError(f"strategy fsdp takes precision {', '.join(SHARDED_PRECISIONS)}, got {recipe.precision!r}")
    if device.startswith("cuda") and devices > torch.cuda.device_count():
        raise UserError(f"devices must be at most {torch.cuda.device_count()} on this machine, got {devices}")
    most_processes = max(os.cpu_count() or 1, PROCESSES)
    if devices > most_processes:
        raise UserError(f"devices must be at most {most_processes} on this machine, got {devices}")
    if workers > most_processes:
        raise UserError(f"workers must be at most {most_processes} on this machine, got {workers}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed}")
    check_recipe(recipe, task)
    if not count_examples(data.train):
        raise UserError(f"{data.name} has nothing to train on")
    lightning = load_lightning()
    joined_here = not torch.distributed.is_initialized()
    torch.manual_seed(seed)
    model = build()
    check_recipe(recipe, task, model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{title}: nothing to train, {type(model).__name__} has no parameters that need a gradient")
    if context_parallel > 1:
        check_divides_tokens(model, task, context_method, context_parallel)
    best = BestModels(out, keep_best, save) if out is not None and save is not None and keep_best else None
    history = history_class()(task, data, title, recipe, out, save_every, best)
    going_on = newest(out) if resume and out is not None else None
    if out is not None and going_on is None:
        clear_best(out)
    callbacks: list[Any] = [history]
    if out is not None:
        callbacks.append(
            lightning.pytorch.callbacks.ModelCheckpoint(
                dirpath=out, filename="last", save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
            )
        )
    # Lightning's tips and banners say nothing that our user can act on.
    with progress.quiet_loggers(*LIGHTNING), deterministic(device == "cpu"):
        trainer = lightning.Trainer(
            accelerator={"cuda": "gpu"}.get(device.split(":")[0], device.split(":")[0]),
            devices=devices,
            num_nodes=num_nodes,
            strategy=make_strategy(strategy, devices * num_nodes),
            use_distributed_sampler=False,
            max_epochs=recipe.epochs,
            max_steps=recipe.max_steps or -1,
            gradient_clip_val=recipe.clip,
            accumulate_grad_batches=recipe.accumulate,
            precision=recipe.precision,
            callbacks=callbacks,
            plugins=[] if out is None else [checkpoint_writer()],
            logger=False if logger is None or out is None else make_logger(logger, out),
            enable_checkpointing=out is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=out,
        )
        module = module_class()(model, task, data, recipe, seed, history, workers)
        if context_parallel > 1:
            module.share = TokenShare(context_parallel, context_method)
        start = time.perf_counter()
        if going_on is not None:
            check_fits(going_on, module, devices * num_nodes)
        try:
            with plain_interrupt(trainer), lost_ranks_reported(trainer):
                trainer.fit(module, ckpt_path=None if going_on is None else str(going_on), weights_only=True)
        except Diverged:  # all processes stop at the same step, and the first one says so
            if joined_here:
                leave_group(history.wrapper)
            if not trainer.is_global_zero:
                raise SystemExit(0) from None
            raise
        seconds = time.perf_counter() - start
        if module.share is not None:
            module.share.leave(module.model)
        weights = whole_state(module.model) if strategy == "fsdp" else None
    if joined_here:
        leave_group(history.wrapper)
    if not trainer.is_global_zero:
        raise SystemExit(0)
    if weights is None:
        model = module.model.to(device)
    else:
        model = build().to(device)
        model.load_state_dict(weights)
    if recipe.ema is not None:
        model.load_state_dict(module.learned().state_dict())
    history.restore_best(model)
    model = in_float32(model).eval()
    before_saving(model)
    with torch.no_grad():
        metrics = task.evaluate(model, data.test)
    return Fit(model, metrics, history.curve, round(seconds, 3), trainer.global_step)

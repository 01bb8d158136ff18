"""Training, on Lightning: the same loop for every task, deterministic for a seed, resumable bit for bit."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.tasks.base import Task, TaskData, count_examples
from provenn.training.augmentation import check_recipe
from provenn.training.checkpoints import check_fits, clear_best, newest
from provenn.training.context import TokenShare, check_divides_tokens
from provenn.training.history import history_class, in_float32
from provenn.training.module import Diverged, module_class
from provenn.training.options import Hardware, Saving
from provenn.training.processes import as_one_run, leave_group, whole_state
from provenn.training.recipes import Recipe
from provenn.training.systems import before_saving
from provenn.training.trainer import LIGHTNING, deterministic, make_trainer, plain_interrupt

SHARDED_PRECISIONS = ("32-true", "bf16-mixed")
ONE_CPU = Hardware()


@dataclass(frozen=True)
class Fit:
    """A finished training.

    Args:
        model: trained, in eval mode.
        metrics: of the test split.
        curve: one entry an epoch: `epoch`, `train_loss`, and the validation metrics.
        seconds: wall time of the training.
        steps: how many were taken.
        losses: of each batch of the last epoch.
    """

    model: nn.Module
    metrics: dict[str, float]
    curve: list[dict[str, float | int]] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    losses: list[float] = field(default_factory=list)

    def series(self, key: str) -> list[float | int]:
        """One column of the curve."""
        return [entry[key] for entry in self.curve if key in entry]


class NothingToTrain(UserError):
    """No parameter of the model asks for a gradient."""


def fit(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    saving: Saving | None = None,
    title: str = "training",
) -> Fit:
    """Build a model from the seed and train it.

    The model may bring a loss, optimizers and a last step of its own: see `provenn.training.systems`.

    Args:
        build: makes the model; called after the seed is set, so that a seed fixes the weights.
        task, data, recipe: what is learned, from what, and how.
        seed: fixes weights, order, dropout and augmentation.
        hardware: where, and over how many processes.
        saving: the folder for checkpoints and models; None keeps none.
        title: of the progress bar.

    Raises:
        UserError: a loss that is not finite, with the step at which it happened; patience or keep_best without their
            metric; another process that has ended; or what does not go together.
    """
    if hardware.sharded and (recipe.ema is not None or (saving is not None and saving.keep_best)):
        raise UserError("keep_best and ema need whole weights in each process: take strategy ddp")
    if hardware.sharded and recipe.precision not in SHARDED_PRECISIONS:
        raise UserError(f"strategy fsdp takes precision {', '.join(SHARDED_PRECISIONS)}, got {recipe.precision!r}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed}")
    check_recipe(recipe, task)
    if not count_examples(data.train):
        raise UserError(f"{data.name} has nothing to train on")
    joined_here = not torch.distributed.is_initialized()
    torch.manual_seed(seed)
    model = build()
    check_recipe(recipe, task, model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        name = type(model).__name__
        raise NothingToTrain(f"{title}: nothing to train, {name} has no parameters that need a gradient")
    if hardware.context_parallel > 1:
        check_divides_tokens(model, task, hardware.context_method, hardware.context_parallel)
    history = history_class()(task, data, title, recipe, saving)
    going_on = newest(saving.folder) if saving is not None and saving.resume else None
    if saving is not None and going_on is None:
        clear_best(saving.folder)
    # Lightning's tips and banners say nothing that our user can act on.
    with progress.quiet_loggers(*LIGHTNING), deterministic(hardware.device == "cpu"):
        trainer = make_trainer(recipe, hardware, saving, history)
        module = module_class()(model, task, data, recipe, seed, history, hardware.workers)
        if hardware.context_parallel > 1:
            module.share = TokenShare(hardware.context_parallel, hardware.context_method)
        start = time.perf_counter()
        if going_on is not None:
            check_fits(going_on, module, hardware.processes)
        try:
            with plain_interrupt(trainer), as_one_run(trainer):
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
        weights = whole_state(module.model) if hardware.sharded else None
    if joined_here:
        leave_group(history.wrapper)
    if not trainer.is_global_zero:
        raise SystemExit(0)
    if weights is None:
        model = module.model.to(hardware.device)
    else:
        model = build().to(hardware.device)
        model.load_state_dict(weights)
    if recipe.ema is not None:
        model.load_state_dict(module.learned().state_dict())
    history.restore_best(model)
    metrics = {}
    if count_examples(data.test):
        model = in_float32(model)
        before_saving(model.eval())
        with torch.no_grad():
            metrics = task.evaluate(model, data.test)
    losses = [loss.item() for loss in history.losses]
    return Fit(model.eval(), metrics, history.curve, round(seconds, 3), trainer.global_step, losses)

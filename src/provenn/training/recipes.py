"""Recipes: how a model is trained, as plain data."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from provenn.errors import UserError

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
LARGEST_LR = 1e30  # far above any that trains; beyond it the optimizers' own numbers overflow


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults are nobody's paper: a preset's own recipe stands in its `paper.toml`.

    Args:
        epochs: passes over the training data.
        batch_size: examples a step and process: several processes take so many each.
        accumulate: batches whose gradients are summed up to one step's; the mean over all of them counts.
        optimizer: sgd, adam, adamw or radam.
        lr: learning rate; its peak where the schedule has one.
        weight_decay, momentum, betas: the optimizer's.
        decay_vectors: whether what has fewer than two dimensions (biases, gains of norms) decays like the rest.
        schedule: constant, cosine (to `final_lr`), onecycle, step (by `gamma` every `step_epochs` epochs), multistep
            (by `gamma` at each of `milestones`) or exponential (by `gamma` each epoch).
        milestones: of multistep, as shares of all steps, such as (0.5, 0.8).
        final_lr: where cosine ends.
        warmup_steps: linear, before the schedule.
        clip: largest norm of the gradient; None leaves it.
        patience: stop after so many epochs without a better validation metric, and return to the best.
        max_steps: a bound on the steps, whatever the epochs.
        precision: Lightning's: 32-true, 64-true, bf16-mixed, 16-mixed, bf16-true or 16-true.
        ema: how much of the moving average of the weights stays at each step, such as 0.9999. The average is what is
            validated, tested and saved; None keeps none.
    """

    epochs: int = 10
    batch_size: int = 32
    accumulate: int = 1
    optimizer: Literal["sgd", "adam", "adamw", "radam"] = "adamw"
    lr: float | int = 1e-3
    weight_decay: float | int = 0.0
    decay_vectors: bool = True
    momentum: float | int = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "cosine", "onecycle", "step", "multistep", "exponential"] = "constant"
    step_epochs: int = 30
    milestones: tuple[float, ...] = ()
    gamma: float | int = 0.1
    final_lr: float | int = 0.0
    warmup_steps: int = 0
    clip: float | int | None = None
    patience: int | None = None
    max_steps: int | None = None
    precision: str = "32-true"
    ema: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "max_steps", "step_epochs", "accumulate"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("weight_decay", "momentum", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"clip must be a positive number, got {self.clip}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UserError(f"lr must be a positive number, got {self.lr}")
        if self.lr > LARGEST_LR:
            raise UserError(f"lr must be at most {LARGEST_LR:g}, got {self.lr:g}")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if (self.schedule == "multistep") != bool(self.milestones):
            raise UserError(f"milestones belong to multistep, got {self.milestones} with {self.schedule}")
        if not 0 <= self.final_lr <= self.lr:
            raise UserError(f"final_lr must lie between 0 and lr, {self.lr:g}, got {self.final_lr}")
        if self.final_lr and self.schedule != "cosine":
            raise UserError(f"final_lr belongs to cosine, got {self.final_lr} with {self.schedule}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema must lie between 0 and 1, got {self.ema}")
        if self.ema is not None and self.precision in ("bf16-true", "16-true"):
            raise UserError(
                f"ema needs weights of more digits than {self.precision} has: take {self.precision.split('-')[0]}-mixed"
            )
        if not all(low < high for low, high in pairwise((0, *self.milestones, 1))):
            raise UserError(f"milestones must grow and lie between 0 and 1, got {self.milestones}")

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        weights: Any = [p for p in model.parameters() if p.requires_grad]
        if not self.decay_vectors:
            vectors = {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0}
            weights = [{"params": [p for p in weights if p.ndim >= 2]}, vectors]
        if self.optimizer == "sgd":
            return torch.optim.SGD(weights, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return OPTIMIZERS[self.optimizer](weights, self.lr, betas=tuple(self.betas), weight_decay=self.weight_decay)

    def make_schedule(
        self, optimizer: torch.optim.Optimizer, steps: int, steps_per_epoch: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The factor on the learning rate at each step."""

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
            epoch = step // max(1, steps_per_epoch)
            return SCHEDULES[self.schedule](self, min(done, 1.0), epoch)

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _cosine(done: float, end: float) -> float:
    return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2


def _onecycle(done: float, rise: float = 0.3, start: float = 1 / 25, end: float = 1e-4 / 25) -> float:
    low, high, part = (start, 1.0, done / rise) if done < rise else (end, 1.0, (1 - done) / (1 - rise))
    return low + (high - low) * (1 - math.cos(math.pi * part)) / 2


OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
}
SCHEDULES: dict[str, Callable[[Recipe, float, int], float]] = {
    "constant": lambda recipe, done, epoch: 1.0,
    "cosine": lambda recipe, done, epoch: _cosine(done, recipe.final_lr / recipe.lr),
    "onecycle": lambda recipe, done, epoch: _onecycle(done),
    "step": lambda recipe, done, epoch: recipe.gamma ** (epoch // recipe.step_epochs),
    "multistep": lambda recipe, done, epoch: recipe.gamma ** sum(done >= share for share in recipe.milestones),
    "exponential": lambda recipe, done, epoch: recipe.gamma**epoch,
}


def recipe_of(facts: dict[str, Any], **changes: Any) -> Recipe:
    """A recipe from a preset's facts and the user's changes; a field that does not exist is refused."""
    merged = {**facts, **{key: value for key, value in changes.items() if value is not None}}
    merged |= {name: tuple(merged[name]) for name in ("betas", "milestones") if name in merged}  # TOML has lists
    known = asdict(Recipe())
    for name in merged:
        if name not in known:
            raise UserError(f"a recipe has no field {name!r}; it has: {', '.join(known)}")
    return Recipe(**merged)

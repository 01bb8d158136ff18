"""Recipes: how a model is trained, as plain data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.core.settings import check_numbers

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
POLICIES = ("imagenet", "cifar10", "svhn")  # that AutoAugment found
WHOLE = ("epochs", "batch_size", "patience", "max_steps", "step_epochs", "accumulate")
CHOSEN = ("optimizer", "schedule", "precision", "auto_augment")
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
        eps: of adam, adamw and radam.
        decay_vectors: whether what has fewer than two dimensions (biases, gains of norms) decays like the rest.
        no_decay: patterns of names of parameters that do not decay, such as ("*temperature", "*embedding*").
        layer_decay: the factor on the rate from each block to the one before it, as BEiT is tuned (such as 0.65);
            what lies before the first block has one more, what lies behind the last none. 1 leaves all alike.
        schedule: constant, cosine, linear, inverse-sqrt, onecycle, poly, step, multistep or exponential. Cosine and
            linear end at `final_lr`. Inverse-sqrt is of the steps, from the end of the warm-up. Poly is the share of
            the steps that is left, to the power of 0.9, as segmentation has it. The last three multiply by `gamma`:
            step every `step_epochs` epochs, multistep at each of `milestones`, exponential each epoch.
        milestones: of multistep, as shares of all steps, such as (0.5, 0.8).
        final_lr: where cosine and linear end.
        warmup_steps: linear, before the schedule.
        clip: largest norm of the gradient; None leaves it.
        patience: stop after so many epochs without a better validation metric, and return to the best.
        max_steps: a bound on the steps, whatever the epochs.
        precision: Lightning's: 32-true, 64-true, bf16-mixed, 16-mixed, bf16-true or 16-true.
        ema: how much of the moving average of the weights stays at each step, such as 0.9999. The average is what is
            validated, tested and saved; None keeps none.
        label_smoothing: the share of each target that is spread evenly over all classes or tokens.
        mixup, cutmix: α of the Beta distribution that mixes pairs of a batch's images and their classes, by weight or
            by a rectangle; 0 does not. Of both, one is drawn for each batch.
        crop: the least share of a file's area that a random crop takes, such as 0.08; None leaves it to the task.
            Images that are not cropped from files stay as they are.
        rand_augment: the magnitude of RandAugment's two operations an image, such as 9; 0 does none; by kornia.
        auto_augment: the policy of AutoAugment: imagenet, cifar10 or svhn; by kornia.
        random_erasing: the probability with which a rectangle of an image is put to its mean; by kornia.

    Augmentation is of images with classes, and of training alone. What is drawn for an image follows from the seed, the
    epoch and the image's index in the data; what is drawn for a batch, from the seed and the step.
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
    eps: float = 1e-8
    no_decay: tuple[str, ...] = ()
    layer_decay: float | int = 1.0
    schedule: Literal[
        "constant", "cosine", "linear", "inverse-sqrt", "onecycle", "poly", "step", "multistep", "exponential"
    ] = "constant"
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
    label_smoothing: float | int = 0.0
    mixup: float | int = 0.0
    cutmix: float | int = 0.0
    crop: float | int | None = None
    rand_augment: float | int = 0.0
    auto_augment: Literal["imagenet", "cifar10", "svhn"] | None = None
    random_erasing: float | int = 0.0

    def __post_init__(self) -> None:
        for name in WHOLE:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name, value in vars(self).items():
            if isinstance(value, float) and math.isinf(value) and name != "lr":
                raise UserError(f"{name} must be a finite number, got {value}")
        for name in ("weight_decay", "warmup_steps", "mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, share in (("momentum", self.momentum), *(("betas", beta) for beta in self.betas)):
            if not 0 <= share < 1:
                raise UserError(f"{name} must lie between 0 and 1, below 1, got {share}")
        for name in ("clip", "eps", "gamma"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"{name} must be a positive number, got {getattr(self, name)}")
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
        if self.final_lr and self.schedule not in ("cosine", "linear"):
            raise UserError(f"final_lr belongs to cosine and linear, got {self.final_lr} with {self.schedule}")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay must lie above 0 and be at most 1, got {self.layer_decay}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must lie between 0 and 1, below 1, got {self.label_smoothing}")
        if not 0 <= self.random_erasing <= 1:
            raise UserError(f"random_erasing must be a probability from 0 to 1, got {self.random_erasing}")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise UserError(f"crop must lie above 0 and be at most 1, the whole image, got {self.crop}")
        if not 0 <= self.rand_augment < 10:
            raise UserError(f"rand_augment must lie between 0 and 10, below 10, got {self.rand_augment}")
        if self.auto_augment not in (None, *POLICIES):
            raise UserError(f"auto_augment must be one of {', '.join(POLICIES)}, got {self.auto_augment!r}")
        if self.auto_augment is not None and self.rand_augment:
            raise UserError("give rand_augment or auto_augment, not both")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema must lie between 0 and 1, got {self.ema}")
        if self.ema is not None and self.precision in ("bf16-true", "16-true"):
            raise UserError(
                f"ema needs weights of more digits than {self.precision} has: take {self.precision.split('-')[0]}-mixed"
            )
        if not all(low < high for low, high in pairwise((0, *self.milestones, 1))):
            raise UserError(f"milestones must grow and lie between 0 and 1, got {self.milestones}")

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of all parameters that need a gradient, grouped by their decay and rate.

        Raises:
            UserError: a pattern of `no_decay` that no name meets, or `layer_decay` without blocks to count.
        """
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for pattern in self.no_decay:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise UserError(
                    f"no_decay: no parameter is called {pattern!r}; there are {', '.join(list(named)[:5])}, …"
                )
        depths = block_depths(model) if self.layer_decay != 1 else {}
        count = max(depths.values(), default=0)
        groups: dict[tuple[bool, float], dict[str, Any]] = {}
        if not self.decay_vectors:
            groups[True, 1.0], groups[False, 1.0] = {"params": []}, {"params": [], "weight_decay": 0.0}
        for name, p in named.items():
            left_alone = any(fnmatchcase(name, pattern) for pattern in self.no_decay)
            decays = not left_alone and (self.decay_vectors or p.ndim >= 2)
            scale = self.layer_decay ** (count - depths[name]) if depths else 1.0
            group: dict[str, Any] = {"params": [], "lr": self.lr * scale, **({} if decays else {"weight_decay": 0.0})}
            groups.setdefault((decays, scale), group)["params"].append(p)
        weights: Any = list(groups.values())
        if self.optimizer == "sgd":
            return torch.optim.SGD(weights, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return OPTIMIZERS[self.optimizer](
            weights, self.lr, betas=tuple(self.betas), eps=self.eps, weight_decay=self.weight_decay
        )

    def make_schedule(
        self, optimizer: torch.optim.Optimizer, steps: int, steps_per_epoch: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The factor on the learning rate at each step."""

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            if self.schedule == "inverse-sqrt":
                return math.sqrt(max(1, self.warmup_steps) / (step + 1))
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
    "linear": lambda recipe, done, epoch: 1 - done * (1 - recipe.final_lr / recipe.lr),
    "inverse-sqrt": lambda recipe, done, epoch: 1.0,  # follows from the step itself
    "onecycle": lambda recipe, done, epoch: _onecycle(done),
    "poly": lambda recipe, done, epoch: (1 - done) ** 0.9,
    "step": lambda recipe, done, epoch: recipe.gamma ** (epoch // recipe.step_epochs),
    "multistep": lambda recipe, done, epoch: recipe.gamma ** sum(done >= share for share in recipe.milestones),
    "exponential": lambda recipe, done, epoch: recipe.gamma**epoch,
}


def block_depths(model: nn.Module) -> dict[str, int]:
    """How deep each parameter lies: 0 before the first block, then the blocks one by one, then what lies behind.

    The blocks are the modules of the commonest class that stand in rows (`ModuleList`, `Sequential`). Their order is
    the one in which the system defines them. What is defined between two of them counts with the one before.

    Raises:
        UserError: there are no such rows.

    >>> block_depths(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1, bias=False)))
    {'0.weight': 1, '0.bias': 1, '2.weight': 2}
    """
    rows = _in_rows("", model)
    if not rows:
        raise UserError(f"layer_decay needs blocks in a row, and {type(model).__name__} has none")
    kinds = [kind for _, kind in rows]
    commonest = max(dict.fromkeys(kinds), key=kinds.count)
    blocks = [f"{name}." for name, kind in rows if kind is commonest]
    order = {
        name: next((i for i, b in enumerate(blocks) if name.startswith(b)), None)
        for name, _ in model.named_parameters()
    }
    depths, depth, entered = {}, 0, set()
    for name, block in order.items():
        depth = depth if block is None else block + 1
        entered |= {block} - {None}
        # What stands outside of the rows is as deep as the block before it; behind the last it is the head.
        behind = block is None and len(entered) == len(blocks)
        depths[name] = len(blocks) + 1 if behind else depth
    return depths


def _in_rows(name: str, module: nn.Module) -> list[tuple[str, type]]:
    """Name and class of the modules with parameters that stand in the outermost rows."""
    rows = (nn.ModuleList, nn.Sequential)
    children = []
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(child, rows) or not isinstance(module, rows):
            children += _in_rows(path, child)
        elif next(child.parameters(), None) is not None:
            children.append((path, type(child)))
    return children


def recipe_of(facts: dict[str, Any], **overrides: Any) -> Recipe:
    """A recipe from a preset's facts and the user's changes.

    Raises:
        UserError: a field that does not exist, or a value that it does not take.
    """
    from pydantic import TypeAdapter, ValidationError

    merged = {**facts, **{key: value for key, value in overrides.items() if value is not None}}
    hints = get_type_hints(Recipe)
    for name, value in merged.items():
        if name not in hints:
            raise UserError(f"a recipe has no field {name!r}; it has: {', '.join(hints)}")
        if isinstance(value, str) and str(hints[name]).startswith("tuple"):
            value = [part.strip() for part in value.split(",")]  # as it is typed on the command line
        try:
            merged[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            if name in WHOLE:
                raise UserError(f"{name} must be a whole number of at least 1, got {value!r}") from None
            if name in CHOSEN:
                known = [word for hint in (hints[name], *get_args(hints[name])) for word in get_args(hint)]
                words = ", ".join(word for word in known if isinstance(word, str))
                raise UserError(f"{name} must be one of {words}, got {value!r}") from None
            raise UserError(f"{name}: {error.errors()[0]['msg']}, got {value!r}") from None
        check_numbers(name, value, merged[name])
    return Recipe(**merged)

"""Trainings of several stages: what learns in each, on what data, with which loss and recipe."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core.errors import UserError
from provenn.tasks.base import Task, TaskData
from provenn.training.checkpoints import CHECKPOINT, PREVIOUS
from provenn.training.history import in_float32
from provenn.training.loop import ONE_CPU, Fit, NothingToTrain, fit
from provenn.training.options import Hardware, Saving
from provenn.training.order import Batches
from provenn.training.recipes import Recipe
from provenn.training.systems import before_saving

STEPS = ("new parts", "all")  # of `new_then_all`


class Lesson(Task):
    """A loss and nothing else: the work of a stage that brings its own batches and is judged elsewhere.

    Args:
        batch_loss: the loss of a model on a batch; it is taken even where the model brings one of its own.
    """

    name, metric, higher_is_better, reads = "lesson", "loss", False, "nothing"
    embedded: dict[str, str] = {}  # noqa: RUF012
    overrules = True

    def __init__(self, batch_loss: Callable[[Any, Any], Tensor]):
        self.batch_loss = batch_loss

    def load(self, source: str | Path, *, seed: int = 0, **options: Any) -> TaskData:
        raise UserError(f"a stage that brings its own batches reads no data, got {str(source)!r}")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.batch_loss(model, batch)

    def evaluate(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> dict[str, float]:
        return {}

    def dummy_baseline(self, data: TaskData) -> float:
        raise UserError("a stage that brings its own batches has no dummy baseline: it is judged elsewhere")


@dataclass(frozen=True)
class Stage:
    """One part of a training.

    Args:
        name: of the progress bar, and of the folder with the stage's checkpoints.
        task: loss and metrics.
        data: what it learns from.
        recipe: how.
        learning: opens the model for the stage and gives what is trained: see `only`. By default all of it learns.
    """

    name: str
    task: Task
    data: TaskData
    recipe: Recipe
    learning: Callable[[Any], AbstractContextManager[nn.Module]] = nullcontext

    @classmethod
    def of_batches(
        cls,
        name: str,
        batch_loss: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        learning: Callable[[Any], AbstractContextManager[nn.Module]] = nullcontext,
        **recipe: Any,
    ) -> "Stage":
        """A step on each of some batches, in their order, at a constant rate.

        Args:
            name, learning: as of the stage.
            batch_loss: of a model and a batch.
            batches: `Batches`, which are made as they are needed, or others, which are held.
            recipe: how: fields of `Recipe`, such as lr and clip.
        """
        data = TaskData(name, Batches.of(batches), Batches.of([]), Batches.of([]), fingerprint="")
        return cls(name, Lesson(batch_loss), data, Recipe(epochs=1, batch_size=1, **recipe), learning)


@contextmanager
def only(learns: Callable[[Any], Iterable[nn.Parameter]], model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the parameters that `learns` gives ask for gradients, and no others; for `Stage.learning`."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    learning = set(learns(model))
    for parameter in asked:
        parameter.requires_grad_(parameter in learning)
    try:
        yield model
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)


def new_then_all(
    task: Task,
    data: TaskData,
    recipe: Recipe,
    new: Callable[[Any], Iterable[nn.Parameter]],
    *,
    first: float = 1 / 3,
    share: float = 0.1,
) -> list[Stage]:
    """The two steps in which a network with trained weights is tuned: its new parts, then all of it.

    Args:
        task, data: of both.
        recipe: of both together.
        new: the parameters that no weights brought, such as those of another head.
        first: the share of epochs and steps in which they learn alone, at the recipe's rate.
        share: of the rate, at which all learns afterwards.
    """
    alone = max(1, int(first * recipe.epochs))
    once, then = None, None
    if recipe.max_steps is not None:
        once = max(1, int(first * recipe.max_steps))
        then = max(1, recipe.max_steps - once)
    fresh = replace(recipe, epochs=alone, max_steps=once)
    whole = replace(recipe, epochs=max(1, recipe.epochs - alone), max_steps=then)
    whole = replace(whole, lr=share * recipe.lr, final_lr=share * recipe.final_lr)
    return [Stage(STEPS[0], task, data, fresh, partial(only, new)), Stage(STEPS[1], task, data, whole)]


def fit_stages(
    build: Callable[[], nn.Module],
    plan: Callable[[Any, Task, TaskData, Recipe], Sequence[Stage]],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    saving: Saving | None = None,
) -> Fit:
    """Build a model from the seed and train it stage after stage; in one outcome, with the task's metrics of the test.

    Args:
        build, task, data, recipe, seed, hardware, saving: as in `fit`.
        plan: the stages of a model, by task, data and recipe.

    Raises:
        UserError: as in `run_stages`.
    """
    torch.manual_seed(seed)
    model = build()
    stages = [
        replace(stage, data=replace(stage.data, test=Batches.of([]))) for stage in plan(model, task, data, recipe)
    ]
    if saving is not None and not saving.resume:
        for stage in stages:  # or a later --resume would go on with those of another training
            for name in (CHECKPOINT, PREVIOUS):
                (saving.folder / stage.name / name).unlink(missing_ok=True)
    parts = run_stages(model, stages, seed=seed, hardware=hardware, saving=saving)
    curve: list[dict[str, float | int]] = []
    for part in parts:
        before = len(curve)
        curve += [{**entry, "epoch": entry["epoch"] + before} for entry in part.curve]
    model = in_float32(parts[-1].model)
    before_saving(model.eval())
    with torch.no_grad():
        metrics = task.evaluate(model, data.test)
    seconds, steps = sum(part.seconds for part in parts), sum(part.steps for part in parts)
    return Fit(model, metrics, curve, round(seconds, 3), steps, parts[-1].losses)


def run_stages(
    model: nn.Module,
    stages: Sequence[Stage],
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    saving: Saving | None = None,
    after: Callable[[Stage, Fit], None] = lambda stage, done: None,
) -> list[Fit]:
    """Train a model in place, stage after stage; each of its modules then is in the mode in which it was before.

    A run that was killed goes on in the stage in which it stopped, with the weights that the ended stages left. A stage
    in which no parameter asks for a gradient is passed over.

    Args:
        model: to train.
        stages: in their order, each of another name.
        seed: of order and dropout in each stage.
        hardware: one process.
        saving: where to keep checkpoints; each stage has a folder of its name there.
        after: called when a stage has ended, such as to measure.

    Raises:
        UserError: several processes, two stages of one name, or what `fit` refuses.
    """
    if hardware.processes > 1:
        raise UserError(f"a training of several stages runs in one process, got {hardware.processes}")
    if len({stage.name for stage in stages}) < len(stages):
        raise UserError(f"stages need different names, got {', '.join(stage.name for stage in stages)}")
    results = []
    modes = {module: module.training for module in model.modules()}
    for stage in stages:
        model.train()
        done = Fit(model, {})
        with ExitStack() as opened, suppress(NothingToTrain):
            done = fit(
                partial(opened.enter_context, stage.learning(model)),  # which may draw, from the seed
                stage.task,
                stage.data,
                stage.recipe,
                seed=seed,
                hardware=hardware,
                saving=None if saving is None else replace(saving, folder=saving.folder / stage.name),
                title=stage.name,
            )
        for module, training in modes.items():
            module.training = training
        results.append(done)
        after(stage, done)
    return results

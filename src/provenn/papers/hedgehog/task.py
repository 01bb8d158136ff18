"""Distillation as a kind of work: another task's data and metric, and the maps' loss instead of its own."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.papers.hedgehog.distillation import map_parameters, teaching, without_dropout
from provenn.tasks import Task, TaskData, get_task
from provenn.tasks.base import device_of
from provenn.training import Hardware, Stage, only, run_stages


def distillation_loss_of(model: nn.Module, inputs: Any) -> Tensor:
    """The mean over layers of −Σ_j a_ij log â_ij, with dropout off; 0 where no attention is linear."""
    with teaching(model) as losses, without_dropout(model):
        model(inputs)
    return torch.stack(losses).mean() if losses else torch.zeros(())


def distill(model: nn.Module, batches: Iterable[Any], *, lr: float = 1e-2) -> list[float]:
    """Train the feature maps of a converted model on its own softmax weights; nothing else in it changes.

    Args:
        model: as `linearise` left it.
        batches: what the model reads; targets are not needed.
        lr: of Adam.

    Returns the loss of every step; [] where the maps have no parameters.
    """
    learning = partial(only, map_parameters)
    stage = Stage.of_batches("distillation", distillation_loss_of, batches, learning, optimizer="adam", lr=lr)
    return run_stages(model, [stage], hardware=Hardware(str(device_of(model))))[0].losses


class Distillation(Task):
    """Train the maps of a converted model with `fit`: all of its layers at once, on their own softmax weights.

    The host's parameters get no gradient, and keep their values where the recipe has no weight decay. Metrics are the
    task's, of the model with its linear attention.

    Args:
        of: the task that the host was trained for; its batches begin with what the model reads.
    """

    def __init__(self, of: str):
        self.of = get_task(of)
        self.name, self.metric, self.higher_is_better = of, self.of.metric, self.of.higher_is_better
        self.embedded, self.reads = self.of.embedded, self.of.reads

    def load(self, source: str | Path, *, seed: int = 0, **options: Any) -> TaskData:
        return self.of.load(source, seed=seed, **options)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """That of the maps: a batch begins with what the model reads."""
        return distillation_loss_of(model, batch[0])

    def evaluate(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> dict[str, float]:
        return self.of.evaluate(model, dataset, batch_size)

    def dummy_baseline(self, data: TaskData) -> float:
        return self.of.dummy_baseline(data)

    def seen(self, data: TaskData, examples: int, seed: int) -> TaskData:
        return self.of.seen(data, examples, seed)

    def predict(self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Path], output: Path | None) -> str:
        return self.of.predict(model, meta, inputs, output)

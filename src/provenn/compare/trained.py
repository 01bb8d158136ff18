"""A candidate's training, which may fail without costing the others theirs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from provenn.tasks import Recipe, fit
from provenn.tasks.base import Task, TaskData
from provenn.tasks.training import Diverged


class Trained(NamedTuple):
    """A model, its metrics on the test data, and why its training ended early, if it did."""

    model: nn.Module
    metrics: dict[str, float]
    diverged: str = ""


def trained(
    build: Callable[[], nn.Module], task: Task, data: TaskData, recipe: Recipe, *, seed: int, device: str, title: str
) -> Trained:
    """Train a model of that seed. One that diverges counts as it was before its first step."""
    try:
        done = fit(build, task, data, recipe, seed=seed, device=device, title=title)
    except Diverged as error:
        torch.manual_seed(seed)
        model = build().to(device).eval()
        with torch.no_grad():
            return Trained(model, task.evaluate(model, data.test), str(error))
    return Trained(done.model, done.metrics)

"""Every paper's smallest system of each kind of work trains in the precisions that people train in."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from provenn import tasks, training
from provenn.catalog import cards
from provenn.inference.paper import Paper
from provenn.tasks import TaskData
from provenn.testing.checks import smallest_presets
from provenn.training import Recipe
from provenn.training.loop import NothingToTrain

WORK = [
    (slug, work)
    for slug, card in cards().items()
    for work in dict.fromkeys(card.work_of(preset) for preset in card.presets)
    if work
]


@cache
def embedded(task: str, name: str | None) -> TaskData:
    kind = tasks.get_task(task)
    return kind.load(name or next(iter(kind.embedded)))


@pytest.mark.parametrize("slug, work", WORK)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.filterwarnings("ignore:.*fp16 is not supported on CPU")
def test_a_system_trains_in_half_precision(slug: str, work: str, precision: str, monkeypatch: pytest.MonkeyPatch):
    card, task = cards()[slug], tasks.get_task(work)
    (preset,) = (preset for preset in smallest_presets(card) if card.work_of(preset) == work)
    data = embedded(task.name, preset.data)
    evaluated = []

    def evaluate(model: nn.Module, dataset: Any, batch_size: int = 256) -> dict[str, float]:
        evaluated.extend(p.dtype for p in model.parameters())
        return {task.metric: 0.0}

    monkeypatch.setattr(task, "evaluate", evaluate)
    recipe = Recipe(epochs=1, max_steps=2, batch_size=2, precision=precision)
    try:
        fit = training.fit(lambda: Paper(card).build(preset.name, **data.options), task, data, recipe)
    except NothingToTrain:
        assert not list(Paper(card).build(preset.name).parameters()), "a system with parameters has what to train"
        return
    assert fit.steps == 2
    assert math.isfinite(fit.curve[-1]["train_loss"])
    assert {*evaluated, *(p.dtype for p in fit.model.parameters())} == {torch.float32}, "data and metrics are float32"

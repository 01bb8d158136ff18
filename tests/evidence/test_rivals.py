"""Of several baselines the best of each seed counts, and each must beat the dummy baseline."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from provenn.core.digest import digest
from provenn.evidence import Run, Study
from provenn.evidence.run import run_to_end
from provenn.tasks import Task, TaskData
from provenn.training import Fit, Recipe

SCORES = {"a": (0.9, 0.9, 0.9), "b": (0.7, 0.8, 0.6), "c": (0.6, 0.9, 0.5)}


class Guessing(Task):
    """A task in which part and seed decide the metric."""

    name, metric, higher_is_better, embedded, reads = "guessing", "score", True, {}, ""

    def load(self, source, *, seed=0, **options): ...

    def predict(self, model, meta, inputs, output): ...

    def loss(self, model, batch): ...

    def evaluate(self, model, dataset, batch_size=256):
        return {"score": SCORES[model.part][model.seed % 3]}

    def dummy_baseline(self, data):
        return 0.1 if self.higher_is_better else 2.0


class Errors(Guessing):
    """The same, where less is better."""

    higher_is_better = False


class Answer(nn.Module):
    def __init__(self, part: str):
        super().__init__()
        self.part = part


def data(seed: int, smoke: bool) -> TaskData:
    train, val, test = (TensorDataset(torch.zeros(count, 1)) for count in (1, 2, 3))
    return TaskData(f"data {seed}", train, val, test, fingerprint=f"f{seed}")


def trained(build, task, data, recipe, *, seed, hardware, title):
    model = build()
    model.seed = seed
    return Fit(model, task.evaluate(model, data.test), [], steps=1)


STUDY = Study(
    "guesses",
    Guessing(),
    data=data,
    variants={"a": ("variant A", "a"), "b": ("variant B", "b"), "c": ("variant C", "c")},
    build=Answer,
    recipe=Recipe(epochs=1, batch_size=4),
    lrs=(0.01, 0.03, 0.1),
    trained=trained,
)


def measured(tmp_path, study, *sides):
    return run_to_end(study.against(*sides)(Run("p", tmp_path, seeds=(0, 1, 2))))


def test_of_several_baselines_the_best_of_each_seed_counts(tmp_path):
    measurement = measured(tmp_path, STUDY, "a", ("b", "c"))
    assert measurement.values == [0.9, 0.9, 0.9] and measurement.baselines == [0.7, 0.9, 0.6]
    assert measurement.sides == ("variant A", "best of variant B, variant C")
    assert {skill.variant for skill in measurement.skills} == {"variant A", "variant B", "variant C"}
    assert [row[0] for row in measurement.tables[0].rows] == ["variant A", "variant B", "variant C"]


def test_of_errors_the_best_is_the_least(tmp_path):
    measurement = measured(tmp_path, replace(STUDY, task=Errors()), ("b", "c"), ("a", "c"))
    assert measurement.values == [0.7, 0.9, 0.6] and measurement.baselines == [0.6, 0.9, 0.5]


def test_several_baselines_count_in_the_digest_as_what_they_are():
    both, turned = STUDY.against("a", ("b", "c")), STUDY.against(("a", "b"), "c")
    assert len({digest(each) for each in (both, turned, STUDY.against("a", "b"))}) == 3
    with pytest.raises(ValueError, match="no variant 'd'"):
        STUDY.against("a", ("b", "d"))

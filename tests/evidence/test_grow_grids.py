"""Records from before grids grew: further rates are tried for their sides, and where the choice stands values stay."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from plugins import script
from provenn.catalog import Experiment, Region
from provenn.evidence import Measurement, Run, Study
from provenn.evidence.measurement import Skill
from provenn.evidence.record import Record
from provenn.tasks import Task, TaskData
from provenn.training import Fit, Recipe

BEST = {"inside": 0.03, "beyond": 0.3, "far": math.inf, "at": 0.1}


class Slope(Task):
    name, metric, higher_is_better, embedded, reads = "slope", "score", True, {}, ""

    def load(self, source, *, seed=0, **options): ...

    def loss(self, model, batch): ...

    def dummy_baseline(self, data):
        return -9.0

    def evaluate(self, model, dataset, batch_size=256):
        return {"score": model.lr if math.isinf(model.best) else -abs(math.log(model.lr / model.best))}


def trained(build, task, data, recipe, *, seed, hardware, title):
    model = build()
    model.lr = recipe.lr
    return Fit(model, task.evaluate(model, data.test), [], steps=1)


def build(part: str) -> nn.Module:
    model = nn.Identity()
    model.best = BEST[part]
    return model


def data(seed: int, smoke: bool) -> TaskData:
    split = TensorDataset(torch.zeros(1, 1))
    return TaskData("none", split, split, split, fingerprint="f")


STUDY = Study(
    "slopes",
    Slope(),
    data=data,
    variants={part: (f"the {part}", part) for part in BEST},
    build=build,
    recipe=Recipe(max_steps=1),
    lrs=(0.01, 0.03, 0.1),
    trained=trained,
)


def record(*parts: str) -> Record:
    reached = {f"the {part}": {f"{lr:g}": score(part, lr) for lr in STUDY.lrs} for part in parts}
    best = {label: max(of, key=of.get) for label, of in reached.items()}
    skills = [
        Skill(variant=f"the {part}", values=[0.9, 0.91, 0.92], dummy_baseline=[0.0] * 3, higher_is_better=True)
        for part in parts
    ]
    measurement = Measurement.paired(
        [0.9, 0.91, 0.92],
        [0.5, 0.5, 0.51],
        seeds=[7, 8, 9],
        skills=skills,
        setting={"lr": {k: float(v) for k, v in best.items()}, "tuned": {"seed": 1, "validation score": reached}},
        note=f"First. At the edge of the rates that were tried: {', '.join(best)}, another.",
    )
    experiment = Experiment(id="e", says="it is", kind="quality", expects=Region(above=0), why="so")
    return Record.of(experiment, measurement, budget="small")


def score(part: str, lr: float) -> float:
    model = build(part)
    model.lr = lr
    return Slope().evaluate(model, None)["score"]


@pytest.mark.parametrize(
    "part, tried, moved",
    [
        ("inside", [0.01, 0.03, 0.1], None),
        ("at", [0.01, 0.03, 0.1, 0.333], None),
        ("beyond", [0.01, 0.03, 0.1, 0.333, 1.11], 0.333),
        ("far", [0.01, 0.03, 0.1, 0.333, 1.11, 3.7], 3.7),
    ],
)
def test_a_side_gets_the_rates_that_its_study_would_give_it(part, tried, moved, tmp_path):
    grow = script("grow_grids")
    (side,) = grow.sides_of(STUDY.figure(part), record(part))
    reached = grow.grown(STUDY, Run("p", tmp_path), side)
    assert list(reached) == tried and STUDY.best_rate(reached) == (moved or side.lr)


def test_where_the_choice_stands_values_stay_and_the_rates_that_were_tried_are_kept(tmp_path):
    grow = script("grow_grids")
    before = record("at", "inside")
    sides = grow.sides_of(STUDY.against("at", "inside"), before)
    every = {side.label: grow.grown(STUDY, Run("p", tmp_path), side) for side in sides}
    after = grow.with_rates(before.measurement, STUDY, every)
    assert list(after.setting["tuned"]["validation score"]["the at"]) == ["0.01", "0.03", "0.1", "0.333"]
    assert after.note == (
        "First. At the edge of the rates that were tried: another. "
        "Further rates were tried later, and the choice stands."
    )
    kept = {"setting", "note"}
    assert after.model_dump(exclude=kept) == before.measurement.model_dump(exclude=kept)


def test_a_side_that_stays_at_an_end_supports_nothing(tmp_path):
    grow = script("grow_grids")
    before = record("far", "inside")
    (side, _) = grow.sides_of(STUDY.against("far", "inside"), before)
    after = grow.with_rates(before.measurement, STUDY, {side.label: grow.grown(STUDY, Run("p", tmp_path), side)})
    assert [skill.unsettled for skill in after.skills] == [True, False] and "still at an end" in after.note

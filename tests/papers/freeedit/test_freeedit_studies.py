"""FreeEdit's trials: both sides of a comparison train alike, and dummy baselines are the best of simple answers."""

import pytest
import torch

from provenn.papers.freeedit import FreeEdit, studies
from provenn.papers.freeedit.experiments import PAIRS, named
from provenn.papers.freeedit.studies import PRIOR, STEPS, TUNING
from provenn.tasks import get_task

UNTRAINED = ("pasted", "source returned", "mean object")


class Counted(FreeEdit):
    """An editor that knows for how many steps it was trained, and nothing else."""

    def __init__(self, steps):
        torch.nn.Module.__init__(self)
        self.steps = steps


class Answers(FreeEdit):
    """An editor that makes the same of every source."""

    def __init__(self, make):
        torch.nn.Module.__init__(self)
        self.make = make

    def edit(self, source, *asked, seeds):
        return self.make(source)


@pytest.fixture
def steps_of(monkeypatch):
    """An outcome whose error of each model is the number of steps that it was trained for."""

    def trained(self, model, data, plan):
        return Counted(model.steps + sum(steps for _, steps in plan))

    def built(self, base=None, **options):
        return Counted(0 if base is None else base.steps)

    def errors(model, data, *, scale=None):
        return dict.fromkeys(("inside", "outside"), torch.full((len(data),), float(model.steps)))

    monkeypatch.setattr(studies.Bench, "trained", trained)
    monkeypatch.setattr(studies.Bench, "built", built)
    monkeypatch.setattr(studies, "clean_errors", errors)
    monkeypatch.setattr(studies, "overlap", lambda model, *_: {"IoU": model.steps})
    monkeypatch.setattr(studies, "SMOKE", {"train": 32, "val": 4, "test": 40})
    return studies.outcome(True, "cpu", 700)


def test_both_sides_of_each_comparison_train_for_as_many_steps(steps_of):
    assert steps_of["DRRA"] == PRIOR + 2 * STEPS and steps_of["DRRA, tuned"] == PRIOR + 2 * STEPS + TUNING
    for name, pair in PAIRS.items():
        for rival in pair.theirs:
            if rival not in UNTRAINED:
                assert steps_of[named(pair.ours, pair.kind)] == steps_of[named(rival, pair.kind)], name
    assert steps_of["DRRA, sampled IoU"] == steps_of["masked, sampled IoU"]


def test_no_constant_answer_overlaps_more_than_the_dummy_baseline():
    data = get_task("image-editing").load("tiles", seed=700, examples=100)
    best = studies.constant_overlap(data.test, data.train, 40)
    answers = (torch.zeros_like, torch.ones_like, lambda source: 1 - source, lambda source: source)
    found = [studies.overlap(Answers(make), data.test, data.test, 40)["IoU"] for make in answers]
    assert found[3] == 0 < found[2] < 1 and best >= max(found) and 0.15 < best < 0.5


def test_the_mean_object_is_that_of_each_kind_and_of_all_where_a_kind_has_none():
    train = get_task("image-editing").load("tiles", seed=700, examples=60).train
    whole = studies.mean_objects(train)
    adds = torch.utils.data.Subset(train, [k for k, edit in enumerate(train) if edit.kind == 0])
    alone = studies.mean_objects(adds)
    torch.testing.assert_close(alone, alone[:1].expand_as(alone))
    torch.testing.assert_close(whole[0], alone[0])
    assert not whole[2].allclose(whole[0], atol=0.02)


def test_further_steps_read_as_many_pairs_as_quality_tuning():
    data = get_task("image-editing").load("tiles", seed=700, examples=60)
    first, clean = (len(part(data).train) for part in (studies.first_tenth, studies.cleanest))
    assert first == clean < 12

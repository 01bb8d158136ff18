"""Equal budget: a study gives all its variants the same data, steps, seeds and tuning, and reads the test split."""

import math
from collections import deque
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from provenn.catalog import Experiment, Region
from provenn.core.digest import digest
from provenn.core.errors import UserError
from provenn.evidence import Run, Study, Verdict, decide
from provenn.evidence.experiment import parameters_of, with_overrides
from provenn.evidence.record import LEDGER, Ledger
from provenn.evidence.run import run_to_end
from provenn.evidence.study import TUNING_SEED
from provenn.tasks import Task, TaskData
from provenn.training import Diverged, Fit, Recipe

BEST = {"a": 0.01, "b": 0.1}  # the rate with which each variant does best on validation data
SKILL = {"a": 0.9, "b": 0.7}
THREE = {"a": (0.9, 0.9, 0.9), "b": (0.7, 0.8, 0.6), "c": (0.6, 0.9, 0.5)}  # by part, of three seeds


class Answer(nn.Module):
    """What a training left: which part, with what rate and seed."""

    def __init__(self, part: str):
        super().__init__()
        self.part = part


class Guessing(Task):
    """A task in which the split, the part and the rate decide the metric."""

    name, metric, higher_is_better, embedded, reads = "guessing", "score", True, {}, ""

    def load(self, source, *, seed=0, **options): ...

    def predict(self, model, meta, inputs, output): ...

    def loss(self, model, batch): ...

    def evaluate(self, model, dataset, batch_size=256):
        split = {1: "train", 2: "val", 3: "test"}[len(dataset)]
        if split == "val":
            return {"score": 1.0 if model.lr == BEST[model.part] else 0.5}
        if (model.part, model.seed) in COLLAPSES:
            return {"score": 0.501}
        noise = 0.001 * (model.seed % 7) * (2 if model.part == "a" else 1)
        return {"score": SKILL[model.part] + noise + (0.05 if split == "train" else 0.0)}

    def dummy_baseline(self, data):
        return 0.5


def data(seed: int, smoke: bool) -> TaskData:
    train, val, test = (TensorDataset(torch.zeros(count, 1)) for count in (1, 2, 3))
    return TaskData(f"data {seed}", train, val, test, fingerprint=f"f{seed}")


def build(part: str) -> nn.Module:
    return Answer(part)


CALLS: deque[dict] = deque()
DIVERGES: set[tuple[str, int]] = set()
COLLAPSES: set[tuple[str, int]] = set()


def trained(build, task, data, recipe, *, seed, hardware, title):
    model = build()
    CALLS.append({"part": model.part, "recipe": recipe, "seed": seed, "data": data.name, "title": title})
    if (model.part, seed) in DIVERGES:
        raise Diverged("the loss became nan")
    model.lr, model.seed = recipe.lr, seed
    curve = [{"epoch": epoch, "score": 0.1 * epoch} for epoch in (1, 2)]
    return Fit(model, task.evaluate(model, data.test), curve, steps=7)


STUDY = Study(
    "guesses",
    Guessing(),
    data=data,
    variants={"a": ("variant A", "a"), "b": ("variant B", "b")},
    build=build,
    recipe=Recipe(epochs=2, batch_size=4),
    lrs=(0.01, 0.03, 0.1),
    probes={"depth": lambda model, data: float(len(data.test))},
    trained=trained,
    about="nothing",
)


@pytest.fixture(autouse=True)
def fresh():
    CALLS.clear()
    DIVERGES.clear()
    COLLAPSES.clear()


def run_in(tmp_path, **more) -> Run:
    return Run("p", tmp_path, **{"seeds": (0, 1, 2, 3, 4), **more})


def test_every_variant_has_the_same_data_steps_seeds_and_tuning(tmp_path):
    run_to_end(STUDY.against("a", "b")(run_in(tmp_path)))
    by_part = {part: [call for call in CALLS if call["part"] == part] for part in "ab"}
    for calls in by_part.values():
        tried = [call["recipe"].lr for call in calls if call["seed"] == TUNING_SEED]
        assert tried[:3] == [0.01, 0.03, 0.1] and len(tried) == 4, "the best is at an end, and one more is tried there"
        assert [call["seed"] for call in calls if call["seed"] != TUNING_SEED] == [0, 1, 2, 3, 4]
        assert all(call["data"] == f"data {call['seed']}" for call in calls)
    plain = [[(replace(call["recipe"], lr=1.0), call["seed"]) for call in calls] for calls in by_part.values()]
    assert plain[0] == plain[1]


def test_each_variant_s_rate_is_the_best_on_validation_data_and_its_figure_is_the_test_split_s(tmp_path):
    measurement = run_to_end(STUDY.against("a", "b")(run_in(tmp_path)))
    assert measurement.setting["lr"] == {"variant A": 0.01, "variant B": 0.1}
    assert measurement.setting["tuned"]["validation score"]["variant B"] == {
        "0.01": 0.5,
        "0.03": 0.5,
        "0.1": 1.0,
        "0.333": 0.5,
    }
    assert measurement.values == [pytest.approx(0.9 + 0.002 * seed) for seed in range(5)]
    assert measurement.effect == pytest.approx(0.202) and measurement.sides == ("variant A", "variant B")
    assert not any(skill.unsettled for skill in measurement.skills) and "grid" not in measurement.note


@pytest.mark.parametrize(
    "best, tried, unsettled",
    [
        (0.03, [0.01, 0.03, 0.1], False),
        (0.1, [0.01, 0.03, 0.1, 0.333], False),
        (0.333, [0.01, 0.03, 0.1, 0.333, 1.11], False),
        (0.00333, [0.01, 0.03, 0.1, 0.00333, 0.00111], False),
        (math.inf, [0.01, 0.03, 0.1, 0.333, 1.11, 3.7], True),
        (0.0, [0.01, 0.03, 0.1, 0.00333, 0.00111, 0.00037], True),
    ],
)
def test_a_grid_grows_where_its_best_is_at_an_end_three_times_a_side(tmp_path, best, tried, unsettled):
    class Slope(Guessing):
        def evaluate(self, model, dataset, batch_size=256):
            lr = model.lr
            near = -lr if best == 0.0 else lr if math.isinf(best) else -abs(math.log(lr / best))
            return {"score": near if len(dataset) == 2 else 0.9}

    study = replace(STUDY, task=Slope())
    measurement = run_to_end(study.figure("a")(run_in(tmp_path)))
    assert [call["recipe"].lr for call in CALLS if call["seed"] == TUNING_SEED] == tried
    chosen = measurement.setting["lr"]["variant A"]
    assert chosen == (tried[-1] if unsettled else best)
    assert [skill.unsettled for skill in measurement.skills] == [unsettled]
    assert ("still at an end of the grown grid: variant A." in measurement.note) == unsettled
    assert {call["recipe"].lr for call in CALLS if call["seed"] != TUNING_SEED} == {chosen}


def test_a_grid_does_not_grow_over_a_rate_that_diverges(tmp_path):
    def diverging(build, task, data, recipe, *, seed, **more):
        if recipe.lr > 0.1:
            raise Diverged("the loss became nan")
        return trained(build, task, data, recipe, seed=seed, **more)

    measurement = run_to_end(replace(STUDY, trained=diverging).figure("b")(run_in(tmp_path)))
    assert measurement.setting["tuned"]["validation score"]["variant B"]["0.333"] is None
    assert measurement.setting["lr"] == {"variant B": 0.1} and not measurement.skills[0].unsettled


def test_where_lower_is_better_the_rate_is_the_one_with_the_lowest_figure(tmp_path):
    class Errors(Guessing):
        higher_is_better = False

        def evaluate(self, model, dataset, batch_size=256):
            return {"score": 1 - super().evaluate(model, dataset)["score"]}

    measurement = run_to_end(replace(STUDY, task=Errors()).against("a", "b")(run_in(tmp_path)))
    assert measurement.setting["lr"] == {"variant A": 0.01, "variant B": 0.1}


def test_a_variant_that_has_nothing_to_learn_is_at_no_edge_of_the_rates(tmp_path, monkeypatch):
    monkeypatch.setitem(BEST, "b", None)  # all rates are alike
    measurement = run_to_end(STUDY.against("a", "b")(run_in(tmp_path)))
    assert set(measurement.setting["tuned"]["validation score"]["variant B"].values()) == {0.5}
    assert list(measurement.setting["tuned"]["validation score"]["variant B"]) == ["0.01", "0.03", "0.1"]


def test_what_stands_beside_a_figure_is_shown(tmp_path):
    alone, beside = (run_to_end(STUDY.figure("a", shown=shown)(run_in(tmp_path))) for shown in ((), ("b",)))
    assert alone.tables == [] and [row[0] for row in beside.tables[0].rows] == ["variant A", "variant B"]
    assert run_to_end(STUDY.against("a", "b")(run_in(tmp_path))).tables == [], "both sides are told with the effect"


def test_all_that_decides_the_values_is_in_the_record(tmp_path):
    measurement = run_to_end(STUDY.against("a", "b")(run_in(tmp_path)))
    assert measurement.fingerprint == "f0" and measurement.seeds == [0, 1, 2, 3, 4]
    assert measurement.setting["recipe"] == {"epochs": 2, "batch_size": 4, "optimizer": "adamw"}
    assert {key: measurement.setting[key] for key in ("train", "val", "test")} == {"train": 1, "val": 2, "test": 3}
    assert [skill.dummy_baseline for skill in measurement.skills] == [[0.5] * 5] * 2


def test_exchanged_variants_are_noticed(tmp_path):
    experiment = Experiment(
        id="c", kind="quality", says="A.", expects=Region(above=0), sides=("variant A", "variant B")
    )
    assert decide(experiment, run_to_end(STUDY.against("a", "b")(run_in(tmp_path))))[0] is Verdict.SUPPORTED
    assert decide(experiment, run_to_end(STUDY.against("b", "a")(run_in(tmp_path))))[0] is Verdict.NOT_MEASURED


def changed_build(part: str) -> nn.Module:
    model = Answer(part)
    model.part = str(part)
    return model


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": Recipe(epochs=3, batch_size=4)},
        {"build": changed_build},
        {"variants": {"a": ("variant A", "b"), "b": ("variant B", "a")}},
        {"probes": {"depth": lambda model, data: 2.0}},
        {"setting": {"more": 1}},
        {"data": lambda seed, smoke: replace(data(seed, smoke), fingerprint="another")},
    ],
)
def test_nothing_stale_is_kept(tmp_path, change):
    run = run_in(tmp_path)
    run_to_end(STUDY.against("a", "b")(run))
    count = len(CALLS)
    again = {"ledger": Ledger.read(run.folder / LEDGER), "reuse": True}
    run_to_end(STUDY.against("a", "b")(run_in(tmp_path, **again)))
    assert count == 2 * (4 + 5) == len(CALLS), "the same study was trained again"
    run_to_end(replace(STUDY, **change).against("a", "b")(run_in(tmp_path, **again)))
    assert len(CALLS) == 2 * count, "a changed study kept stale trials"


def test_two_studies_of_one_name_are_not_taken_for_each_other(tmp_path):
    run, other = run_in(tmp_path), replace(STUDY, recipe=Recipe(epochs=3, batch_size=4))
    recipes = [run_to_end(study.against("a", "b")(run)).setting["recipe"]["epochs"] for study in (STUDY, other)]
    assert recipes == [2, 3]


def test_another_variant_costs_the_others_nothing(tmp_path):
    run = run_in(tmp_path)
    run_to_end(STUDY.against("a", "b")(run))
    count = len(CALLS)
    run = run_in(tmp_path, ledger=Ledger.read(run.folder / LEDGER), reuse=True)
    run_to_end(replace(STUDY, variants={**STUDY.variants, "c": ("variant C", "b")}).against("a", "b", shown=["c"])(run))
    assert len(CALLS) == count + 4 + 5


def test_another_rate_is_tried_and_the_others_are_kept(tmp_path):
    run = run_in(tmp_path)
    run_to_end(STUDY.against("a", "b")(run))
    count = len(CALLS)
    run = run_in(tmp_path, ledger=Ledger.read(run.folder / LEDGER), reuse=True)
    wider = run_to_end(replace(STUDY, lrs=(*STUDY.lrs, 0.3)).against("a", "b")(run))
    assert wider.setting["lrs"] == [*STUDY.lrs, 0.3] and wider.setting["lr"] == {"variant A": 0.01, "variant B": 0.1}
    assert len(CALLS) == count + 2, "more was trained than a new rate needs"


def test_a_diverged_training_counts_as_the_dummy_baseline(tmp_path):
    DIVERGES.update({("b", 1), ("b", 2)})
    measurement = run_to_end(STUDY.against("a", "b")(run_in(tmp_path)))
    assert measurement.baselines[1:3] == [0.5, 0.5] and "2 of 5 trainings of variant B diverged" in measurement.note


def test_a_training_that_collapsed_is_named_and_counts(tmp_path):
    """It ends hardly above the dummy baseline, where the others of its variant are far above."""
    COLLAPSES.add(("b", 3))
    measurement = run_to_end(STUDY.against("a", "b")(run_in(tmp_path)))
    assert measurement.baselines[3] == 0.501
    assert "1 of 5 trainings of variant B collapsed" in measurement.note and "seed 3." in measurement.note
    COLLAPSES.clear()
    again = run_to_end(STUDY.against("a", "b")(run_in(tmp_path / "again")))
    assert "collapsed" not in again.note


def test_a_rate_that_diverges_is_not_chosen(tmp_path):
    DIVERGES.add(("a", TUNING_SEED))
    measurement = run_to_end(STUDY.against("a", "b")(run_in(tmp_path)))
    assert measurement.setting["tuned"]["validation score"]["variant A"] == {"0.01": None, "0.03": None, "0.1": None}
    assert measurement.setting["lr"]["variant A"] == 0.01


def test_of_several_systems_the_worst_counts(tmp_path):
    measurement = run_to_end(STUDY.against(("a", "b"), "b")(run_in(tmp_path)))
    assert measurement.values == measurement.baselines and measurement.sides[0] == "worst of variant A, variant B"


def of_three(tmp_path, task, *sides):
    class Scored(type(task)):
        def evaluate(self, model, dataset, batch_size=256):
            return {"score": THREE[model.part][model.seed % 3]}

        def dummy_baseline(self, data):
            return 0.1 if self.higher_is_better else 2.0

    variants = {part: (f"variant {part.upper()}", part) for part in THREE}
    study = replace(STUDY, task=Scored(), variants=variants, probes={})
    return run_to_end(study.against(*sides)(run_in(tmp_path, seeds=(0, 1, 2))))


def test_of_several_baselines_the_best_of_each_seed_counts(tmp_path):
    measurement = of_three(tmp_path, Guessing(), "a", ("b", "c"))
    assert measurement.values == [0.9, 0.9, 0.9] and measurement.baselines == [0.7, 0.9, 0.6]
    assert measurement.sides == ("variant A", "best of variant B, variant C")
    assert {skill.variant for skill in measurement.skills} == {"variant A", "variant B", "variant C"}
    assert [row[0] for row in measurement.tables[0].rows] == ["variant A", "variant B", "variant C"]


def test_of_errors_the_best_is_the_least(tmp_path):
    class Errors(Guessing):
        higher_is_better = False

    measurement = of_three(tmp_path, Errors(), ("b", "c"), ("a", "c"))
    assert measurement.values == [0.7, 0.9, 0.6] and measurement.baselines == [0.6, 0.9, 0.5]


def test_several_baselines_count_in_the_digest_as_what_they_are():
    study = replace(STUDY, variants={**STUDY.variants, "c": ("variant C", "c")})
    both, turned = study.against("a", ("b", "c")), study.against(("a", "b"), "c")
    assert len({digest(each) for each in (both, turned, study.against("a", "b"))}) == 3
    with pytest.raises(ValueError, match="no variant 'd'"):
        study.against("a", ("b", "d"))


def test_probes_and_single_variants(tmp_path):
    assert run_to_end(STUDY.against("a", "b", metric="depth")(run_in(tmp_path))).values == [3.0] * 5
    figure = run_to_end(STUDY.figure("a")(run_in(tmp_path)))
    assert figure.effect == pytest.approx(0.904) and figure.estimator == "mean" and figure.sides is None


def test_a_smoke_run_neither_tunes_nor_trains_in_full(tmp_path):
    run_to_end(STUDY.against("a", "b")(run_in(tmp_path, budget="smoke", seeds=(0,))))
    assert len(CALLS) == 2 and all(call["recipe"].max_steps == 2 for call in CALLS)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: STUDY.against("a", "c"), "no variant 'c'; it has: a, b"),
        (lambda: STUDY.against("a", "b", metric="depht"), "no metric 'depht'"),
        (lambda: STUDY.figure("c"), "no variant 'c'"),
        (lambda: replace(STUDY, lrs=(0.1,)), "at least 3"),
        (lambda: replace(STUDY, variants={"a": ("x", 1), "b": ("x", 2)}), "share a label"),
    ],
)
def test_mistakes_are_told_when_experiments_are_read(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_one_rate_for_all_variants_is_tuned_for_none(tmp_path):
    CALLS.clear()
    changed = with_overrides(STUDY.against("a", "b"), {"lr": 0.01, "epochs": 2})
    measured = run_to_end(changed(Run("p", tmp_path, seeds=(0, 1, 2))))
    assert {call["recipe"].lr for call in CALLS} == {0.01} and {call["recipe"].epochs for call in CALLS} == {2}
    assert TUNING_SEED not in {call["seed"] for call in CALLS}
    assert measured.setting["lr"] == {"variant A": 0.01, "variant B": 0.01} and "tuned" not in measured.setting


def test_what_follows_from_the_data_cannot_be_set(tmp_path):
    def sized(seed: int, smoke: bool) -> TaskData:
        return replace(data(seed, smoke), options={"classes": 3})

    def with_classes(part: str, classes: int = 2, width: int = 4) -> nn.Module:
        return Answer(part)

    experiment = replace(STUDY, data=sized, build=with_classes).figure("a")
    assert {"classes", "width", "epochs", "lrs"} <= parameters_of(experiment).keys()
    run = Run("p", tmp_path, seeds=(0, 1, 2))
    run_to_end(with_overrides(experiment, {"width": 8})(run))
    with pytest.raises(UserError, match="classes follows from the data, where it is 3, got 5"):
        run_to_end(with_overrides(experiment, {"classes": 5})(run))


def test_recorded_rates_are_taken_without_choosing_again(tmp_path):
    CALLS.clear()
    run = Run("paper", tmp_path, seeds=(4,))
    run.rates = {"variant A": 0.0100000001, "variant B": 0.333}  # a record rounds; the grid had grown
    run_to_end(STUDY.against("a", "b")(run))
    rates = {(call["part"], call["seed"]): call["recipe"].lr for call in CALLS}
    assert rates == {("a", 4): 0.01, ("b", 4): 0.333}


def test_the_dummy_baseline_is_asked_for_as_many_examples_as_a_training_sees(tmp_path):
    asked = []

    class Counting(type(STUDY.of_task)):
        def seen(self, data, examples, seed):
            asked.append((examples, seed))
            return data

    study = replace(STUDY, task=Counting(), recipe=replace(STUDY.recipe, batch_size=4, accumulate=2, max_steps=5))
    run_to_end(study.dummy_baseline(run_in(tmp_path)))
    assert asked == [(40, seed) for seed in run_in(tmp_path).seeds]
    asked.clear()
    run_to_end(replace(study, recipe=replace(study.recipe, max_steps=None)).dummy_baseline(run_in(tmp_path)))
    train = len(study.data(0, False).train)
    assert asked[0][0] == study.recipe.epochs * max(1, train // 8) * 8


def test_of_a_study_what_decides_the_compared_values_counts_in_the_digest_and_nothing_else():
    experiment = STUDY.against("a", "b")
    same = [
        replace(STUDY, variants={**STUDY.variants, "c": ("variant C", "c")}),
        replace(STUDY, variants={"a": ("another name", "a"), "b": ("variant B", "b")}),
        replace(STUDY, about="something", note="a note", columns={"part": len}, setting={"more": 1}),
        replace(STUDY, smoke=Recipe(max_steps=1)),
    ]
    other = [
        replace(STUDY, variants={"a": ("variant A", "b"), "b": ("variant B", "b")}),
        replace(STUDY, recipe=Recipe(epochs=3, batch_size=4)),
        replace(STUDY, lrs=(0.01, 0.03, 0.2)),
        replace(STUDY, data=lambda seed, smoke: data(seed + 1, smoke)),
        replace(STUDY, build=lambda part: Answer(part * 2)),
        replace(STUDY, probes={}),
        replace(STUDY, task="recall"),
    ]
    assert {digest(study.against("a", "b")) for study in same} == {digest(experiment)}
    assert len({digest(experiment), *(digest(study.against("a", "b")) for study in other)}) == 1 + len(other)
    assert digest(experiment) != digest(STUDY.against("b", "a")) != digest(STUDY.against("b", "a", ratio=True))
    assert digest(STUDY.figure("a")) != digest(STUDY.figure("b")) != digest(STUDY.figure("b", metric="depth"))
    assert digest(replace(STUDY, variants={**STUDY.variants, "c": ("variant C", "c")})) != digest(STUDY)


@pytest.mark.parametrize("method", ["trials", "rate", "validation", "best_rate", "further_rates", "_fit", "_examples"])
def test_how_a_study_trains_and_tunes_counts_in_the_digest(method):
    assert getattr(Study, method) in STUDY.deciding(("a",))


def test_what_a_task_shows_its_users_decides_no_value():
    class Speaking(Guessing):
        def predict(self, model, meta, inputs, output):
            return "words"

    class Judging(Guessing):
        def evaluate(self, model, dataset, batch_size=256):
            return {"score": 0.0}

    of = [digest(replace(STUDY, task=task()).against("a", "b")) for task in (Guessing, Speaking, Judging)]
    assert of[0] == of[1] != of[2]

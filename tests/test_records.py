"""The evidence that ships belongs to the experiments as they stand, and everything in it follows from its raw
values.
"""

import math
import re

import pytest

from provenn import catalog
from provenn.evidence import Evidence, Record
from provenn.evidence.interval import estimate
from provenn.evidence.record import EVIDENCE, Ledger
from provenn.evidence.study import TUNING_SEED

PAPERS = [slug for slug, card in catalog.cards().items() if card.package.startswith("provenn.")]
LARGEST = 60_000  # bytes


@pytest.fixture(params=PAPERS)
def paper(request) -> tuple[catalog.Card, Evidence]:
    card = catalog.card(request.param)
    return card, Evidence.read(card.folder / EVIDENCE)


def test_every_experiment_has_a_record_and_every_record_a_experiment(paper):
    card, evidence = paper
    assert {experiment.id for experiment in card.experiments} == {record.experiment for record in evidence.records}


def test_effects_and_intervals_follow_from_the_values(paper):
    _, evidence = paper
    for record in evidence.records:
        measured = record.measurement
        if measured.estimator is None:
            continue
        again = estimate(measured.estimator, measured.values, measured.baselines)
        assert measured.effect == pytest.approx(again.effect, rel=1e-9, abs=1e-12), record.experiment
        assert measured.confidence == pytest.approx(again.confidence) and measured.method == again.method
        assert (measured.interval is None) == (again.interval is None)
        if again.interval is not None:
            assert measured.interval == pytest.approx(again.interval, rel=1e-9, abs=1e-12), record.experiment


def test_verdicts_follow_from_the_numbers_and_the_facts_of_today(paper):
    card, evidence = paper
    for record in evidence.records:
        budget = evidence.runs[record.run].budget
        again = Record.of(card.experiment(record.experiment), record.measurement, budget=budget)
        for fact in ("verdict", "reason", "expects"):
            assert getattr(record, fact) == getattr(again, fact), f"{record.experiment}: {fact}"


def test_quality_and_cost_are_measured_values_and_not_typed_in(paper):
    """What compares two sides holds the values of both; only an exact experiment may be a bare figure."""
    card, evidence = paper
    for record in evidence.records:
        experiment, measured = card.experiment(record.experiment), record.measurement
        if experiment.kind == "exact" or measured.effect is None:
            continue
        counted = measured.method == "exact" and measured.seeds  # how many of so many trainings, say
        whence = measured.estimator is not None or measured.kind_of_effect == "truth" or counted
        assert whence, f"{record.experiment}: whence?"
        if experiment.sides is not None:
            assert measured.sides == experiment.sides and len(measured.values) == len(measured.baselines) > 0, (
                record.experiment
            )


def test_measurements_were_made_in_full(paper):
    card, evidence = paper
    assert {run.budget for run in evidence.runs} <= {"small", "paper"}
    for record in evidence.records:
        measured = record.measurement
        if card.experiment(record.experiment).kind != "quality" or measured.effect is None:
            continue
        assert len(set(measured.seeds)) >= 5, f"{record.experiment}: seeds {measured.seeds}"
        assert TUNING_SEED not in measured.seeds
        if measured.skills or "recipe" in measured.setting:  # else nothing was trained
            assert measured.skills, f"{record.experiment}: did its variants beat the dummy baseline?"
            assert measured.data, record.experiment
            for key in ("recipe", "train", "test", "lr"):
                assert key in measured.setting, f"{record.experiment} does not say its {key}"


def test_every_variant_took_its_best_rate(paper):
    """A worse rate for one side, or fewer tries, is seen in the record itself."""
    _, evidence = paper
    for record in evidence.records:
        setting = record.measurement.setting
        for variants in (value for key, value in setting.get("tuned", {}).items() if key.startswith("validation")):
            higher = next(skill.higher_is_better for skill in record.measurement.skills)
            assert len({tuple(rates) for rates in variants.values()}) == 1, f"{record.experiment}: unequal tuning"
            for variant, rates in variants.items():
                reached = {float(lr): value for lr, value in rates.items() if value is not None}
                if reached:
                    best = (max if higher else min)(reached.values())
                    chosen = setting["lr"][variant]
                    assert math.isclose(reached[chosen], best), f"{record.experiment}: {variant} took {chosen}"


def test_a_record_is_small_and_its_pictures_lie_beside_it(paper):
    card, evidence = paper
    assert (card.folder / EVIDENCE).stat().st_size <= LARGEST
    pictures = {picture.file for record in evidence.records for picture in record.measurement.pictures}
    assert all((card.folder / name).is_file() for name in pictures)
    assert {f"pictures/{file.name}" for file in card.folder.glob("pictures/*")} == pictures


def test_a_record_names_its_commit_and_no_path_of_a_machine(paper):
    card, evidence = paper
    assert all(re.fullmatch(r"[0-9a-f]{12}\+?", run.environment.commit) for run in evidence.runs)
    text = (card.folder / EVIDENCE).read_text()
    assert "/tmp/" not in text and "/home/" not in text and "/root/" not in text and "/work/" not in text


def test_a_ledger_is_no_evidence():
    assert not list(catalog.card(PAPERS[0]).folder.parent.glob("*/ledger.json")), Ledger.__doc__

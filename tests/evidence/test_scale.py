"""The scale phrase says what a verdict rests on; an inconclusive experiment says what its seeds could have shown."""

import math
import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provenn import catalog
from provenn.catalog import Experiment, Region
from provenn.evidence import view
from provenn.evidence.measurement import Measurement
from provenn.evidence.record import Environment, Finding, Record, RecordedRun
from provenn.evidence.scale import scale_of, what_seeds_could_show
from provenn.evidence.units import region_in, unit_of
from provenn.evidence.verdict import Verdict


def finding(measurement: Measurement, **facts) -> Finding:
    given = {"id": "better", "kind": "quality", "says": "It is.", "scale": "digits · 3 k parameters", "why": "so"}
    asked = Experiment(**{"expects": Region(above=0.0), **given, **facts})
    return Finding("a_paper", asked, Record.of(asked, measurement, budget="small"))


def paired(differences: list[float]) -> Measurement:
    return Measurement.paired(differences, [0.0] * len(differences), seeds=range(len(differences)))


def test_a_study_s_phrase_has_data_size_and_seeds():
    assert scale_of(finding(paired([0.1, 0.2, 0.3]))) == "digits · 3 k parameters · 3 seeds"
    assert scale_of(Finding("a_paper", finding(paired([1, 2, 3])).experiment)) == ""


def test_a_timing_s_phrase_has_the_size_and_the_width():
    setting = {"tokens": [512, 32768], "quantity": "flops", "dim": 16, "at": 32768}
    counted = Measurement.of("exact ratio", [1.0, 2.0], [2.0, 4.0], setting=setting)
    assert scale_of(finding(counted, kind="cost", scale="")) == "counted at 32,768 tokens · width 16"
    grows = Measurement.of("growth", [1.0, 2.0, 4.0], [1, 2, 4], setting={"tokens": [1, 2, 4], "quantity": "memory"})
    assert scale_of(finding(grows, kind="cost", scale="")) == "counted at 1 to 4 tokens"


def test_what_is_exact_says_so_and_the_paper_s_own_setting_is_named():
    assert scale_of(finding(Measurement.exact(3), kind="exact", scale="")) == "counted or computed exactly"
    own = paired([0.1, 0.2, 0.3]).model_copy(update={"at_paper_setting": True})
    assert scale_of(finding(own)).startswith("the paper's own setting")


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=8))
def test_as_many_seeds_as_are_named_would_decide(differences):
    """Copies of the same scatter: an interval over `enough` seeds lies on one side of the edge, one fewer does not."""
    asked = finding(paired(differences))
    words = what_seeds_could_show(asked)
    if asked.verdict is not Verdict.INCONCLUSIVE:
        assert words == ""
        return
    enough = re.search(r"would take (\d+) seeds", words)
    if enough is None:
        assert "more than 1,000" in words
        return
    from scipy.stats import t

    mean, n, seeds = sum(differences) / len(differences), int(enough[1]), len(differences)
    low, high = asked.measurement.interval
    spread = (high - low) / 2 * math.sqrt(seeds) / t.ppf(0.975, seeds - 1)
    assert t.ppf(0.975, n - 1) * spread / math.sqrt(n) < abs(mean) * (1 + 1e-9)
    if n > 2:
        assert t.ppf(0.975, n - 2) * spread / math.sqrt(n - 1) >= abs(mean) * (1 - 1e-9)


def test_shares_are_written_in_points_with_the_region_in_the_same_unit():
    gain = finding(paired([0.02, 0.021, 0.022]).model_copy(update={"unit": "accuracy"}), expects=Region(above=0.01))
    assert view.shortly(gain) == "+2.1 [1.85, 2.35] points of accuracy"
    assert view.asked(gain) == "above 1 points of accuracy: so"
    assert view.ours(gain.measurement) == "+2.1 [1.85, 2.35] points of accuracy (2.1 against 0 % accuracy)"


@pytest.mark.parametrize("region", [Region(above=0.07), Region(below=-0.3), Region(within=(-0.03, 0.03))])
def test_a_region_in_another_unit_comes_back(region):
    assert region_in(region_in(region, 100.0), 0.01) == region


def test_no_unit_of_a_record_is_a_word_of_code():
    """What readers see of the committed records: no underscore, no camel case."""
    for card in catalog.cards().values():
        for each in (view.committed(card, print) or view.Evidence(paper=card.slug)).findings(card.experiments):
            assert "_" not in unit_of(each.measurement.unit, each.measurement.kind_of_effect).name


def test_every_verdict_of_a_claim_that_was_measured_has_its_scale():
    for card in catalog.cards().values():
        for each in view.judged(card, view.committed(card, print)):
            if each.judgement.verdict != "not measured":
                assert each.scale and len(each.scale) < 220, each.claim.says


@pytest.mark.parametrize(
    "kind, name", [("difference", "points of accuracy"), ("value", "% accuracy"), ("ratio", "% accuracy")]
)
def test_only_a_difference_of_shares_is_in_points(kind, name):
    assert unit_of("accuracy", kind) == (100.0, name)
    assert unit_of("bits per byte", kind) == (1.0, "bits a byte")


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=8), st.floats(0.01, 1), st.floats(0.01, 1))
def test_the_nearest_of_two_edges_is_what_seeds_could_reach(differences, low, high):
    seen = what_seeds_could_show(finding(paired(differences), expects=Region(within=(-low, high))))
    turned = paired([-difference for difference in differences])
    assert what_seeds_could_show(finding(turned, expects=Region(within=(-high, low)))) == seen


@pytest.mark.parametrize("device, word", [("cpu: AMD EPYC", "CPU"), ("cuda: NVIDIA H100", "NVIDIA H100")])
def test_a_clock_names_what_it_was_read_on(device, word):
    setting = {"tokens": [512], "quantity": "time"}
    timed = finding(Measurement.of("exact ratio", [1.0, 2.0], [2.0, 4.0], setting=setting), kind="cost", scale="")
    facts = {"provenn": "0", "torch": "2", "python": "3", "threads": 1, "system": "Linux"}
    run = RecordedRun(
        budget="small", environment=Environment(device=device, **facts), date=datetime(2026, 1, 2, tzinfo=UTC)
    )
    assert scale_of(replace(timed, run=run)) == f"timed at 512 tokens · {word}"

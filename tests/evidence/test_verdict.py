from math import inf, nan

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from provenn.catalog import Experiment, Figure, Region
from provenn.evidence import Measurement, Skill, Verdict, decide
from provenn.evidence.verdict import beats_dummy, locate

numbers = st.floats(-1e6, 1e6)
intervals = st.tuples(numbers, numbers).map(lambda pair: (min(pair), max(pair)))
regions = st.one_of(
    numbers.map(lambda bound: Region(above=bound)),
    numbers.map(lambda bound: Region(below=bound)),
    intervals.map(lambda pair: Region(within=pair)),
)
seeds = st.lists(st.integers(0, 5), max_size=6)
BETTER = (Verdict.CONTRADICTED, Verdict.INCONCLUSIVE, Verdict.SUPPORTED)


def experiment(kind: str = "quality", **more) -> Experiment:
    return Experiment(id="c", kind=kind, says="It is so.", **more)


def measured(interval, **more) -> Measurement:
    middle = sum(interval) / 2
    return Measurement(**{"effect": middle, "value": middle, "interval": interval, "seeds": [0, 1, 2], **more})


def mirrored(region: Region) -> Region:
    if region.within is not None:
        return Region(within=(-region.within[1], -region.within[0]))
    return Region(below=-region.above) if region.above is not None else Region(above=-region.below)


@given(intervals, regions)
def test_what_is_said_of_an_effect_is_said_of_its_mirror_image(interval, region):
    assert locate(interval, region) == locate((-interval[1], -interval[0]), mirrored(region))


@given(intervals, numbers, st.floats(0, 1e6))
def test_a_larger_effect_never_proves_less_of_an_experiment_that_it_is_large(interval, bound, more):
    larger = (interval[0] + more, interval[1] + more)
    above = Region(above=bound)
    assert BETTER.index(locate(larger, above)) >= BETTER.index(locate(interval, above))
    below = Region(below=bound)
    assert BETTER.index(locate(larger, below)) <= BETTER.index(locate(interval, below))


@given(intervals, regions, st.floats(0, 1e3))
def test_a_wider_interval_never_turns_a_verdict_round(interval, region, more):
    wide, narrow = locate((interval[0] - more, interval[1] + more), region), locate(interval, region)
    assert wide in (narrow, Verdict.INCONCLUSIVE)


@given(intervals, numbers)
def test_an_experiment_and_its_opposite_are_never_both_proven(interval, bound):
    verdicts = [locate(interval, Region(above=bound)), locate(interval, Region(below=bound))]
    assert verdicts.count(Verdict.SUPPORTED) <= 1
    assert (verdicts[0] is Verdict.SUPPORTED) == (verdicts[1] is Verdict.CONTRADICTED and interval[0] > bound)


@given(numbers)
def test_an_effect_of_exactly_the_bound_proves_nothing(bound):
    assert locate((bound, bound), Region(above=bound)) is Verdict.INCONCLUSIVE
    assert locate((bound, bound), Region(below=bound)) is Verdict.INCONCLUSIVE
    assert locate((bound, bound), Region(within=(bound, bound))) is Verdict.SUPPORTED


@given(regions)
def test_what_is_not_a_number_proves_nothing(region):
    assert locate((nan, nan), region) is Verdict.INCONCLUSIVE
    assert locate((-inf, inf), region) is Verdict.INCONCLUSIVE


@given(intervals, regions, seeds, st.booleans())
def test_quality_needs_several_seeds(interval, region, given_seeds, at_paper_setting):
    assume(len(set(given_seeds)) < 3)
    measurement = measured(interval, seeds=given_seeds, at_paper_setting=at_paper_setting)
    verdict, reason = decide(experiment(expects=region), measurement)
    assert verdict is Verdict.NOT_MEASURED
    assert f"at least 3 seeds, got {len(set(given_seeds))}" in reason


@given(numbers, regions, st.sampled_from(["cost", "quality"]), st.booleans())
def test_one_value_gives_no_verdict(value, region, kind, at_paper_setting):
    measurement = Measurement(effect=value, value=value, seeds=[0, 1, 2], at_paper_setting=at_paper_setting)
    assert decide(experiment(kind, expects=region), measurement)[0] is Verdict.NOT_MEASURED


@given(intervals, regions, st.sampled_from(["cost", "quality"]))
def test_a_smoke_run_gives_no_verdict(interval, region, kind):
    assert decide(experiment(kind, expects=region), measured(interval), budget="smoke")[0] is Verdict.NOT_MEASURED


@given(intervals, regions, st.sampled_from(["exact", "cost", "quality"]))
def test_reproduced_is_for_the_paper_s_own_setting_alone(interval, region, kind):
    smaller, _ = decide(experiment(kind, expects=region), measured(interval))
    if kind != "exact":
        assert smaller is locate(interval, region)
    full = decide(
        experiment(kind, expects=region, published=Figure(value=sum(interval) / 2, source="Table 1")),
        measured(interval, at_paper_setting=True),
    )[0]
    met = Verdict.VERIFIED if kind == "exact" else Verdict.REPRODUCED
    assert (full is met) == (locate(interval, region) is Verdict.SUPPORTED)


@given(numbers, st.floats(0.01, 1e3), st.floats(-3, 3))
def test_the_published_figure_is_met_within_its_tolerance_or_not(figure, tolerance, away):
    assume(abs(abs(away) - 1) > 1e-3)
    value = figure + away * tolerance
    said = experiment(published=Figure(value=figure, source="Table 1"), tolerance=tolerance, expects=Region(above=-1e9))
    verdict, _ = decide(said, measured((value, value), at_paper_setting=True))
    assert verdict is (Verdict.REPRODUCED if abs(away) < 1 else Verdict.SUPPORTED)


def test_a_figure_that_is_met_at_a_smaller_setting_is_supported():
    said = experiment(published=Figure(value=2.0, source="t"), expects=Region(above=0))
    verdicts = [decide(said, measured((1.9, 2.1), at_paper_setting=at_paper))[0] for at_paper in (False, True)]
    assert verdicts == [Verdict.SUPPORTED, Verdict.REPRODUCED]


def test_a_published_difference_or_ratio_is_held_against_the_effect_and_a_figure_against_the_system():
    measurement = measured((1.9, 2.1), value=77.5, at_paper_setting=True)
    both = {"tolerance": 0.2, "expects": Region(above=0)}
    difference = experiment(published=Figure(value=2.0, source="t", what="difference"), **both)
    own = experiment(published=Figure(value=77.4, source="t"), **both)
    ratio = experiment(published=Figure(value=2.0, source="t", what="ratio"), **both)
    assert decide(ratio, measurement)[0] is Verdict.REPRODUCED
    assert decide(difference, measurement)[0] is Verdict.REPRODUCED
    assert decide(own, measurement)[0] is Verdict.REPRODUCED
    assert decide(own, measured((1.9, 2.1), value=2.0, at_paper_setting=True))[0] is Verdict.SUPPORTED


@given(st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_an_exact_experiment_holds_or_is_false(value, figure):
    verdict, reason = decide(experiment("exact", published=Figure(value=figure, source="t")), Measurement.exact(value))
    assert verdict is (Verdict.VERIFIED if value == figure else Verdict.CONTRADICTED)
    assert reason == ""


@given(numbers, st.sampled_from(["above", "below"]))
def test_an_exact_value_on_an_open_bound_is_outside(bound, side):
    verdict, _ = decide(experiment("exact", expects=Region(**{side: bound})), Measurement.exact(bound))
    assert verdict is Verdict.CONTRADICTED


@given(intervals, regions, st.floats(0.5, 0.9499))
def test_nothing_is_decided_from_an_interval_under_95_percent(interval, region, confidence):
    verdict, reason = decide(experiment("cost", expects=region), measured(interval, confidence=confidence))
    assert verdict is Verdict.NOT_MEASURED and "needs an interval of 95 %" in reason


def skill(values, dummy_baseline, higher=True, **more) -> Skill:
    return Skill(variant="variant", values=values, dummy_baseline=dummy_baseline, higher_is_better=higher, **more)


def test_variants_that_guess_show_nothing_be_they_ahead_behind_or_equal():
    guesses = skill([0.50, 0.52, 0.48, 0.51, 0.49], [0.5] * 5)
    for interval in ((0.1, 0.2), (-0.2, -0.1), (-0.001, 0.001)):
        for region in (Region(above=0), Region(within=(-0.05, 0.05))):
            verdict, reason = decide(experiment(expects=region), measured(interval, skills=[guesses]))
            assert verdict is Verdict.NOT_MEASURED
            assert reason == "below the dummy baseline: variant reaches 0.5, the dummy baseline 0.5"


@pytest.mark.parametrize("higher", [True, False])
def test_a_variant_that_beats_dummy_predictor_has_learned_and_one_that_it_beats_has_not(higher):
    better, worse = [0.9, 0.91, 0.92], [0.1, 0.11, 0.12]
    learned = skill(better, worse, higher) if higher else skill(worse, better, higher)
    failed = skill(worse, better, higher) if higher else skill(better, worse, higher)
    assert beats_dummy(learned) and not beats_dummy(failed)
    said = experiment(expects=Region(above=0))
    assert decide(said, measured((0.1, 0.2), skills=[learned]))[0] is Verdict.SUPPORTED
    assert decide(said, measured((0.1, 0.2), skills=[learned, failed]))[0] is Verdict.NOT_MEASURED
    excused = failed.model_copy(update={"may_guess": "it cannot see the answer"})
    assert decide(said, measured((0.1, 0.2), skills=[learned, excused]))[0] is Verdict.SUPPORTED


@pytest.mark.parametrize(
    "interval, verdict",
    [((0.1, 0.2), Verdict.INCONCLUSIVE), ((-0.1, 0.1), Verdict.INCONCLUSIVE), ((-0.2, -0.1), Verdict.CONTRADICTED)],
)
def test_nothing_is_supported_by_a_variant_whose_best_rate_is_at_an_end_of_its_grid(interval, verdict):
    unsettled = skill([0.9, 0.91, 0.92], [0.5] * 3, unsettled=True)
    given, reason = decide(experiment(expects=Region(above=0)), measured(interval, skills=[unsettled]))
    assert given is verdict
    assert ("at an end of its grid: variant" in reason) == (interval == (0.1, 0.2))


def test_exchanged_sides_give_no_verdict():
    said = experiment("cost", expects=Region(below=1.0), sides=("ours", "theirs"))
    assert decide(said, measured((0.4, 0.5), sides=("ours", "theirs")))[0] is Verdict.SUPPORTED
    verdict, reason = decide(said, measured((0.4, 0.5), sides=("theirs", "ours")))
    assert verdict is Verdict.NOT_MEASURED and "theirs against ours" in reason


@pytest.mark.parametrize("truth, verdict", [(True, Verdict.VERIFIED), (False, Verdict.CONTRADICTED)])
def test_a_claim_is_true_or_false(truth, verdict):
    assert decide(experiment("exact"), Measurement.holds(truth))[0] is verdict


@pytest.mark.parametrize(
    "measurement, reason",
    [
        (Measurement.not_measured("a GPU"), "needs a GPU"),
        (Measurement.failure(ValueError("no\nluck")), "the measurement failed: ValueError: no luck"),
        (measured((0.0, 1.0)), "needs a region in paper.toml"),
    ],
)
def test_without_a_measurement_there_is_a_reason(measurement, reason):
    assert decide(experiment(), measurement) == (Verdict.NOT_MEASURED, reason)


def test_a_published_figure_says_nothing_of_another_setting():
    figure = experiment("exact", published=Figure(value=80, unit="parameters", source="abstract"))
    assert decide(figure, Measurement.exact(80))[0] is Verdict.VERIFIED
    assert decide(figure, Measurement.exact(80), changed=True) == (
        Verdict.NOT_MEASURED,
        "the published figure is of another setting",
    )
    assert decide(experiment("exact"), Measurement.holds(False), changed=True)[0] is Verdict.CONTRADICTED

"""One function decides, from the numbers alone."""

from enum import StrEnum
from math import inf, isnan

from provenn.catalog import Experiment, Region
from provenn.evidence.interval import CONFIDENCE, Interval, student
from provenn.evidence.measurement import Measurement, Skill

FEWEST_SEEDS = 3
ROUNDING = 1e-9


class Verdict(StrEnum):
    """What a measurement says of an experiment, from its numbers alone."""

    VERIFIED = "verified"
    REPRODUCED = "reproduced"
    SUPPORTED = "supported"
    INCONCLUSIVE = "inconclusive"
    CONTRADICTED = "contradicted"
    NOT_MEASURED = "not measured"
    UNSUPPORTED = "unsupported"
    OUT_OF_MEMORY = "out of memory"


NO_VERDICT = {
    Verdict.NOT_MEASURED,
    Verdict.UNSUPPORTED,
    Verdict.OUT_OF_MEMORY,
}  # on the experiment: there are no numbers


def locate(interval: Interval, region: Region) -> Verdict:
    """Where an interval lies: inside the region, outside, or across its edge.

    A region above or below a bound is open, so an effect of exactly the bound is across; one within two is closed.
    """
    low, high = interval
    if isnan(low) or isnan(high):
        return Verdict.INCONCLUSIVE
    if region.within is not None:
        first, last = region.within
        inside = first <= low and high <= last
    else:
        first = region.above if region.above is not None else -inf
        last = region.below if region.below is not None else inf
        inside = first < low and high < last
    if inside:
        return Verdict.SUPPORTED
    return Verdict.CONTRADICTED if high < first or low > last else Verdict.INCONCLUSIVE


def region_of(experiment: Experiment, measurement: Measurement) -> Region | None:
    """What the experiment asks for: its own region, a true claim, or the published figure within the tolerance."""
    if experiment.expects is not None:
        return experiment.expects
    if measurement.kind_of_effect == "truth":
        return Region(within=(1.0, 1.0))
    if experiment.published is not None:
        figure = experiment.published.value
        return Region(within=(figure - experiment.tolerance, figure + experiment.tolerance))
    return None


def decide(
    experiment: Experiment, measurement: Measurement, *, budget: str = "small", changed: bool = False
) -> tuple[Verdict, str]:
    """The verdict and, where there is none, the reason.

    - verified: an identity or a count is exactly so.
    - reproduced: the published figure is met within its tolerance at the paper's own setting.
    - supported: at a smaller setting, the interval lies wholly where the experiment asks.
    - contradicted: it lies wholly elsewhere.
    - inconclusive: it crosses the edge; or what would be supported rests on a variant whose best learning rate is still
      at an end of its grid.

    Nothing is decided from an interval of less than 95 %, nor from variants below the dummy baseline. What device and
    build cannot do (unsupported), or hold (out of memory), says nothing of the experiment. No published figure is
    compared with a setting that is not the experiment's own (`changed`).
    """
    if measurement.unsupported:
        return Verdict.UNSUPPORTED, measurement.unsupported
    if measurement.out_of_memory:
        return Verdict.OUT_OF_MEMORY, measurement.out_of_memory
    if measurement.failed:
        return Verdict.NOT_MEASURED, f"the measurement failed: {measurement.failed}"
    if measurement.needs:
        return Verdict.NOT_MEASURED, f"needs {measurement.needs}"
    if experiment.kind != "exact" and budget == "smoke":
        return Verdict.NOT_MEASURED, "a smoke run only shows that the path works; needs the budget small"
    drawn = measurement.estimator != "test set"  # given weights on a given test set give one figure
    if experiment.kind == "quality" and drawn and len(set(measurement.seeds)) < FEWEST_SEEDS:
        return Verdict.NOT_MEASURED, f"needs at least {FEWEST_SEEDS} seeds, got {len(set(measurement.seeds))}"
    if changed and experiment.expects is None and measurement.kind_of_effect != "truth":
        return Verdict.NOT_MEASURED, "the published figure is of another setting"
    region = region_of(experiment, measurement)
    if region is None or measurement.interval is None:
        missing = "a region in paper.toml" if region is None else "more than one value"
        return Verdict.NOT_MEASURED, f"needs {missing}"
    if measurement.confidence < CONFIDENCE - ROUNDING:
        return Verdict.NOT_MEASURED, f"needs an interval of 95 %, this one has {100 * measurement.confidence:.1f} %"
    if experiment.sides is not None and measurement.sides is not None and experiment.sides != measurement.sides:
        both = " against ".join(measurement.sides)
        return Verdict.NOT_MEASURED, f"needs {' against '.join(experiment.sides)}; what was measured is {both}"
    guessing = [skill for skill in measurement.skills if not skill.may_guess and not beats_dummy(skill)]
    if guessing:
        return Verdict.NOT_MEASURED, f"below the dummy baseline: {'; '.join(map(_beside_the_dummy, guessing))}"
    verdict = locate(measurement.interval, region)
    if (
        experiment.kind == "exact"
        and verdict is Verdict.INCONCLUSIVE
        and measurement.interval[0] == measurement.interval[1]
    ):
        verdict = Verdict.CONTRADICTED  # on the bound of an open region: without uncertainty that is outside
    if verdict is not Verdict.SUPPORTED:
        return verdict, ""
    if experiment.kind == "exact":
        return Verdict.VERIFIED, ""
    if unsettled := [skill.variant for skill in measurement.skills if skill.unsettled]:
        return Verdict.INCONCLUSIVE, f"the best learning rate is still at an end of its grid: {', '.join(unsettled)}"
    met = measurement.at_paper_setting and meets_figure(experiment, measurement)
    return (Verdict.REPRODUCED if met else verdict), ""


def beats_dummy(skill: Skill) -> bool:
    """Does the variant's lead over the dummy baseline, seed by seed, lie above zero with its whole interval?"""
    sign = 1 if skill.higher_is_better else -1
    interval, _ = student(
        [sign * (ours - guess) for ours, guess in zip(skill.values, skill.dummy_baseline, strict=True)]
    )
    return interval is not None and interval[0] > 0


def _beside_the_dummy(skill: Skill) -> str:
    reached, guessed = (sum(side) / len(side) for side in (skill.values, skill.dummy_baseline))
    return f"{skill.variant} reaches {reached:.4g}, the dummy baseline {guessed:.4g}"


def meets_figure(experiment: Experiment, measurement: Measurement) -> bool:
    """Is the published figure met? It is the system's own, unless it is said to be a difference or a ratio."""
    figure = experiment.published
    if figure is None:
        return False
    measured = measurement.effect if figure.what in ("difference", "ratio") else measurement.value
    return measured is not None and abs(measured - figure.value) <= experiment.tolerance

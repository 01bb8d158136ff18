"""One function decides, from the numbers alone."""

from enum import StrEnum
from math import inf, isnan

from provenn.catalog import Claim, Region
from provenn.evidence.interval import Interval
from provenn.evidence.measurement import Measurement

FEWEST_SEEDS = 3


class Verdict(StrEnum):
    REPRODUCED = "reproduced"
    DIRECTION_HOLDS = "direction holds"
    INCONCLUSIVE = "inconclusive"
    NOT_REPRODUCED = "not reproduced"
    NOT_MEASURED = "not measured"


def place(interval: Interval, region: Region) -> Verdict:
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
        return Verdict.DIRECTION_HOLDS
    return Verdict.NOT_REPRODUCED if high < first or low > last else Verdict.INCONCLUSIVE


def region_of(claim: Claim, measurement: Measurement) -> Region | None:
    """What the claim asks for: its own region, a true statement, or the published figure within the tolerance."""
    if claim.expects is not None:
        return claim.expects
    if measurement.kind_of_effect == "truth":
        return Region(within=(1.0, 1.0))
    if claim.published is not None:
        figure = claim.published.value
        return Region(within=(figure - claim.tolerance, figure + claim.tolerance))
    return None


def decide(claim: Claim, measurement: Measurement, *, budget: str = "small") -> tuple[Verdict, str]:
    """The verdict and, where there is none, the reason.

    reproduced: an exact claim holds, or the claim holds at the paper's setting and the published figure is met;
    direction holds: the interval lies wholly where the claim says; not reproduced: wholly elsewhere;
    inconclusive: across the edge.
    """
    if measurement.failed:
        return Verdict.NOT_MEASURED, f"the measurement failed: {measurement.failed}"
    if measurement.needs:
        return Verdict.NOT_MEASURED, f"needs {measurement.needs}"
    if claim.kind != "exact" and budget == "smoke":
        return Verdict.NOT_MEASURED, "a smoke run only shows that the path works; needs the budget small"
    if claim.kind == "quality" and len(set(measurement.seeds)) < FEWEST_SEEDS:
        return Verdict.NOT_MEASURED, f"needs at least {FEWEST_SEEDS} seeds, got {len(set(measurement.seeds))}"
    region = region_of(claim, measurement)
    if region is None or measurement.interval is None:
        missing = "a region in paper.toml" if region is None else "more than one value"
        return Verdict.NOT_MEASURED, f"needs {missing}"
    verdict = place(measurement.interval, region)
    if claim.kind == "exact" and verdict is Verdict.INCONCLUSIVE and measurement.interval[0] == measurement.interval[1]:
        verdict = Verdict.NOT_REPRODUCED  # on the bound of an open region: without uncertainty that is outside
    if verdict is not Verdict.DIRECTION_HOLDS:
        return verdict, ""
    if claim.kind == "exact" or (measurement.at_paper_setting and _met(claim, measurement)):
        return Verdict.REPRODUCED, ""
    return verdict, ""


def _met(claim: Claim, measurement: Measurement) -> bool:
    """Is the published figure met? It is the system's own, unless it is said to be a difference or a ratio."""
    figure = claim.published
    if figure is None:
        return False
    measured = measurement.effect if figure.what in ("difference", "ratio") else measurement.value
    return measured is not None and abs(measured - figure.value) <= claim.tolerance

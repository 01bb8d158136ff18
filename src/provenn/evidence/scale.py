"""At what scale something was measured, in one phrase, and what its seeds could have shown."""

import math
from typing import Any

from provenn.catalog import Region
from provenn.evidence.interval import CONFIDENCE
from provenn.evidence.measurement import Measurement
from provenn.evidence.record import Finding
from provenn.evidence.verdict import Verdict, region_of

MOST_SEEDS = 1000  # beyond these nobody measures: the answer is then "more than"
WIDTHS = ("dim", "width")


def scale_of(finding: Finding) -> str:
    """Data, size of the models and seeds of what was measured; "" where nothing was.

    Such as "32×32 patches of 16 photographs · 30 k parameters · 5 seeds" or "timed at 32,768 tokens · width 16 · CPU".
    """
    measurement, experiment = finding.measurement, finding.experiment
    if finding.record is None or measurement.effect is None:
        return ""
    if experiment.kind == "exact":
        words = [experiment.scale or "counted or computed exactly"]
    else:
        own = "the paper's own setting" if measurement.at_paper_setting else ""
        words = [own, experiment.scale, *_of_a_timing(measurement), _device(finding)]
    seeds = len(set(measurement.seeds))
    words.append(f"{seeds} seeds" if seeds > 1 else "")
    return " · ".join(word for word in words if word)


def _of_a_timing(measurement: Measurement) -> list[str]:
    """What was counted or timed at which size; [] of what is no timing."""
    setting: dict[str, Any] = measurement.setting
    quantity, axis = setting.get("quantity"), next(iter(setting), "")
    sizes = setting.get(axis)
    if quantity is None or not isinstance(sizes, list) or not sizes:
        return []
    verb = "timed" if quantity == "time" else "counted"
    at = setting.get("at")
    reach = f"{sizes[0]:,} to {sizes[-1]:,}" if at is None and len(sizes) > 1 else f"{at or sizes[-1]:,}"
    width = next((f"width {setting[name]:,}" for name in WIDTHS if isinstance(setting.get(name), int)), "")
    return [f"{verb} at {reach} {axis}", width]


def _device(finding: Finding) -> str:
    """What a clock was read on."""
    if finding.run is None or finding.measurement.setting.get("quantity") != "time":
        return ""
    device, _, name = finding.run.environment.device.partition(": ")
    return "CPU" if device == "cpu" else name or device


def what_seeds_could_show(finding: Finding) -> str:
    """Of an inconclusive experiment, what its seeds would have decided, and how many this effect takes; else "".

    An interval decides where it does not touch an edge of the region, so its half-width is the smallest distance from
    the edge that is decided. At the scatter s of the seeds, n of them decide the distance d where t(n − 1) s/√n < d.
    """
    measurement = finding.measurement
    region = region_of(finding.experiment, measurement) if finding.verdict is Verdict.INCONCLUSIVE else None
    seeds = len(measurement.seeds)
    if region is None or measurement.interval is None or measurement.effect is None or seeds < 2:
        return ""
    if measurement.estimator not in ("mean", "difference"):
        return ""
    half = (measurement.interval[1] - measurement.interval[0]) / 2
    distance = _distance(measurement.effect, region)
    spread = half * math.sqrt(seeds) / _quantile(seeds)
    enough = next((n for n in range(2, MOST_SEEDS + 1) if _quantile(n) * spread / math.sqrt(n) < distance), None)
    takes = f"{enough} seeds" if enough is not None else f"more than {MOST_SEEDS:,} seeds"
    return f"{seeds} seeds decide effects {half:.2g} or more from the edge; this one would take {takes}"


def _quantile(seeds: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, seeds - 1))


def _distance(effect: float, region: Region) -> float:
    """How far an effect is from the nearest edge of a region."""
    edges = region.within or tuple(edge for edge in (region.above, region.below) if edge is not None)
    return min(abs(effect - edge) for edge in edges)

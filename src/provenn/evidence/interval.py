"""Intervals of 95 % or more: Student's t for means and paired differences, the bootstrap for ratios of values, order
statistics for ratios of clocks, least squares for exponents. `estimate` gives each from the raw values alone, so that
every committed interval can be computed again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

CONFIDENCE = 0.95
SMALLEST_BOOTSTRAP = 8  # below this many pairs, resampling cannot show the tails
MOST_UNDEFINED = 0.05  # share of draws that do not define a metric which still has an interval

Number = float | int
Interval = tuple[float, float]
Estimator = Literal["mean", "difference", "ratio", "clock ratio", "growth", "exact ratio", "test set"]


class Estimate(NamedTuple):
    """An effect with its interval, how it was computed, and how sure it is (0.95 and more)."""

    effect: float
    interval: Interval | None
    method: str
    confidence: float = CONFIDENCE


def estimate(estimator: Estimator, values: Sequence[Number], baselines: Sequence[Number]) -> Estimate:
    """The effect of `values` against `baselines`, from the numbers alone.

    - mean: of the values.
    - difference, ratio: paired.
    - clock ratio: the median of paired times, by order statistics.
    - growth: the exponent of values over sizes (the baselines).
    - exact ratio: of two counts, which have no uncertainty.
    - test set: one value of given weights on the very examples of which a figure was published; nothing is drawn.
    """
    return ESTIMATORS[estimator](values, baselines)


def _mean(values: Sequence[Number], baselines: Sequence[Number]) -> Estimate:
    return Estimate(float(np.mean(values)), *student(values))


def _difference(values: Sequence[Number], baselines: Sequence[Number]) -> Estimate:
    interval, method = paired_difference(values, baselines)
    return Estimate(sum(values) / len(values) - sum(baselines) / len(baselines), interval, method)


def _clock_ratio(values: Sequence[Number], baselines: Sequence[Number]) -> Estimate:
    from provenn.core.cost import Comparison  # imports torch, which reading records does not need

    compared = Comparison.of(values, baselines)
    return Estimate(compared.ratio, compared.interval, compared.method, compared.confidence)


def _growth(values: Sequence[Number], sizes: Sequence[Number]) -> Estimate:
    from provenn.core.cost import growth

    fitted = growth(sizes, values)
    return Estimate(fitted.exponent, fitted.interval, fitted.method)


def _exact_ratio(values: Sequence[Number], baselines: Sequence[Number]) -> Estimate:
    if baselines[-1] == 0:
        raise ValueError("a ratio needs a baseline other than 0")
    ratio = values[-1] / baselines[-1]
    return Estimate(ratio, (ratio, ratio), "counted", 1.0)


def _test_set(values: Sequence[Number], baselines: Sequence[Number]) -> Estimate:
    (value,) = values
    return Estimate(float(value), (float(value), float(value)), "the published test set, whole", 1.0)


def student(values: Sequence[Number]) -> tuple[Interval | None, str]:
    """The interval of a mean over independent values; none for a single value."""
    if len(values) < 2:
        return None, "one value has no interval"
    interval = _around(float(np.mean(values)), float(np.std(values, ddof=1)), len(values))
    return interval, f"Student's t over {len(values)} values, 95 %"


def _around(mean: float, spread: float, n: int) -> Interval:
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread / math.sqrt(n)
    return mean - half, mean + half


def paired_difference(system: Sequence[Number], baseline: Sequence[Number]) -> tuple[Interval | None, str]:
    """The interval of the mean of `system - baseline`, pair by pair.

    Where all pairs differ by the same amount, that amount is the metric's resolution (one image of the test set, say),
    no certainty: it then stands for the spread.
    """
    _same_length(system, baseline)
    differences = [a - b for a, b in zip(system, baseline)]
    interval, _ = student(differences)
    method = f"Student's t, paired over {len(system)} seeds, 95 %"
    step = abs(differences[0])
    if interval is not None and step > 0 and max(differences) - min(differences) < 1e-9 * step:
        return _around(differences[0], step, len(differences)), f"{method}; all pairs tie, their step is the spread"
    return interval, method


def paired_ratio(system: Sequence[Number], baseline: Sequence[Number]) -> tuple[float, Interval | None, str]:
    """The median of `system / baseline` pair by pair, and its interval.

    The bootstrap of the median where there are at least 8 pairs, Student's t on the logarithms below that. Both
    respect inversion: swapping the two sides inverts ratio and interval.
    """
    _same_length(system, baseline)
    if min(*system, *baseline) <= 0:
        raise ValueError(f"a ratio needs positive values, got {min(*system, *baseline)}")
    logs = np.log(np.asarray(system, dtype=float)) - np.log(np.asarray(baseline, dtype=float))
    if len(logs) < SMALLEST_BOOTSTRAP:
        interval, _ = student(logs.tolist())
        bounds = None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
        return math.exp(float(np.mean(logs))), bounds, f"Student's t on log ratios, {len(logs)} pairs, 95 %"
    # Always the same draws: a record's interval can be computed again from its values.
    draws = np.random.default_rng(0).choice(logs, size=(2000, len(logs)))
    tail = _expanded_tail(len(logs))
    low, high = np.quantile(np.median(draws, axis=1), [tail, 1 - tail])
    centre = math.exp(float(np.median(logs)))
    return centre, (math.exp(low), math.exp(high)), f"expanded bootstrap of the median ratio, {len(logs)} pairs, 95 %"


def _expanded_tail(n: int) -> float:
    """The share that a percentile bootstrap cuts off at each end so that few values are covered as often as many.

    Φ(√(n/(n−1)) · t_{n−1}(2.5 %)): what Student's t asks of a normal distribution (Hesterberg, 2015, section 4.2).
    """
    from scipy.stats import norm, t

    return float(norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1 - CONFIDENCE) / 2, n - 1)))


def resampled(
    scores: Mapping[str, np.ndarray],
    summary: Callable[[dict[str, np.ndarray]], dict[str, float]],
    *,
    overlap: int = 1,
    draws: int = 2000,
    advance: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Interval | None], str]:
    """The interval of each metric over the examples that it follows from, and the method.

    The expanded bootstrap; of fewer than 8 blocks Student's t on the jackknife, which for a mean is Student's t on the
    examples. Both take the examples as drawn from many, and block by block where neighbours are predicted alike.

    Args:
        scores: a number an example, by name.
        summary: metrics from scores of any choice of examples. What a choice does not define, such as the error of a
            kind that it has no example of, may be left out; what one in twenty draws does not define has no interval.
        overlap: how many in a row may be predicted alike. Blocks of four times as many stay together, which takes less
            than a tenth off the variance (Künsch, 1989; circular, so that all are drawn equally often).
        draws: of the bootstrap.
        advance: is called after each.
    """
    count = len(next(iter(scores.values())))
    block = 1 if overlap == 1 else 4 * overlap
    blocks = count // block
    whole = summary(dict(scores))
    kind = "" if block == 1 else f" in blocks of {block}"

    def metrics_of(rows: np.ndarray) -> dict[str, float]:
        found = summary({name: column[rows] for name, column in scores.items()})
        return {name: found.get(name, math.nan) for name in whole}

    if blocks < 2:
        return dict.fromkeys(whole), f"{count} example{'s' * (count != 1)}{kind}: too few for an interval"
    intervals: dict[str, Interval | None] = {}
    if blocks < SMALLEST_BOOTSTRAP:
        parts = np.array_split(np.arange(count), blocks)
        others = [metrics_of(np.concatenate([part for part in parts if part is not left_out])) for left_out in parts]
        for name, value in whole.items():
            pseudo = [blocks * value - (blocks - 1) * other[name] for other in others]
            spread = float(np.std(pseudo, ddof=1))
            intervals[name] = _around(value, spread, blocks) if math.isfinite(spread) else None
        return intervals, f"Student's t on the jackknife over {count} examples{kind}, 95 %"
    rng, drawn = np.random.default_rng(0), []
    for _ in range(draws):
        starts = rng.integers(count, size=math.ceil(count / block))
        rows = (starts[:, None] + np.arange(block)).ravel()[:count] % count
        drawn.append(metrics_of(rows))
        advance()
    tail = _expanded_tail(blocks)
    for name in whole:
        values = np.array([each[name] for each in drawn])
        defined = values[~np.isnan(values)]
        if len(defined) < (1 - MOST_UNDEFINED) * draws:
            intervals[name] = None
            continue
        low, high = np.quantile(defined, [tail, 1 - tail])
        intervals[name] = (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None
    return intervals, f"expanded bootstrap over {count:,} examples{kind}, {draws:,} draws, 95 %"


def _same_length(system: Sequence[Number], baseline: Sequence[Number]) -> None:
    if len(system) != len(baseline) or not system:
        raise ValueError(f"pairs need as many values on both sides, got {len(system)} and {len(baseline)}")


ESTIMATORS: dict[str, Callable[[Sequence[Number], Sequence[Number]], Estimate]] = {
    "mean": _mean,
    "difference": _difference,
    "ratio": lambda values, baselines: Estimate(*paired_ratio(values, baselines)),
    "clock ratio": _clock_ratio,
    "growth": _growth,
    "exact ratio": _exact_ratio,
    "test set": _test_set,
}

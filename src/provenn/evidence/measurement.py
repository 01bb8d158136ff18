"""What a measuring function returns: an effect with its interval, and what the report draws."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from provenn.errors import UserError
from provenn.evidence.interval import Interval, Number, paired_difference, paired_ratio


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Series(Part):
    """One line of a plot; lines with the same `plot` share one picture.

    `low` and `high` draw a band (the spread over seeds). `log` names the logarithmic axes: "", "x", "y" or "xy".
    """

    name: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    plot: str = ""
    x_label: str = ""
    y_label: str = ""
    log: Literal["", "x", "y", "xy"] = ""

    @classmethod
    def over_seeds(cls, name: str, x: Sequence[Number], rows: Sequence[Sequence[Number]], **axes: Any) -> "Series":
        """One row a seed, a number a point: the mean over seeds, in the range that they span.

        >>> line = Series.over_seeds("loss", [1, 2], [[4, 2], [2, 1]])
        >>> line.y, line.low, line.high
        ([3.0, 1.5], [2.0, 1.0], [4.0, 2.0])
        """
        points = list(zip(*rows, strict=True))
        return cls(
            name=name,
            x=[float(value) for value in x],
            y=[sum(values) / len(values) for values in points],
            low=[float(min(values)) for values in points],
            high=[float(max(values)) for values in points],
            **axes,
        )


class Table(Part):
    """Rows of text or numbers under a caption."""

    caption: str
    columns: list[str]
    rows: list[list[str | float | int | None]]


class Picture(Part):
    """An image file beside the record, with words for those who cannot see it."""

    file: str
    caption: str


class Measurement(Part):
    """An effect, its interval, and all that is needed to repeat it. Build it with one of the class methods.

    The effect is what a claim's region is about: a difference, a ratio or a value. A missing interval means that the
    data cannot give one, and then there is no verdict.
    """

    effect: float | None = None
    kind_of_effect: Literal["value", "difference", "ratio", "truth"] = "value"
    interval: Interval | None = None
    method: str = ""
    value: float | None = None
    baseline: float | None = None
    unit: str = ""
    seeds: list[int] = []
    values: list[float] = []
    baselines: list[float] = []
    setting: dict[str, Any] = {}
    data: str = ""
    fingerprint: str = ""
    at_paper_setting: bool = False
    needs: str | None = None
    failed: str | None = None
    note: str = ""
    series: list[Series] = []
    tables: list[Table] = []
    pictures: list[Picture] = []

    @classmethod
    def exact(cls, value: Number, unit: str = "", **more: Any) -> "Measurement":
        """A count or an identity's error: no uncertainty."""
        number = float(value)
        method = "exact"
        return cls(
            effect=number,
            interval=(number, number),
            method=method,
            value=number,
            unit=unit,
            **{"at_paper_setting": True, **more},
        )

    @classmethod
    def holds(cls, truth: bool, detail: str = "", **more: Any) -> "Measurement":
        """A statement that was checked and is true or false."""
        number = float(bool(truth))
        more = {"at_paper_setting": True, "note": detail, **more}
        return cls(
            effect=number, kind_of_effect="truth", interval=(number, number), method="exact", value=number, **more
        )

    @classmethod
    def paired(
        cls, system: Sequence[Number], baseline: Sequence[Number], *, seeds: Sequence[int], unit: str = "", **more: Any
    ) -> "Measurement":
        """System against baseline over seeds: the mean difference."""
        interval, method = paired_difference(system, baseline)
        value, base = sum(system) / len(system), sum(baseline) / len(baseline)
        return cls(
            effect=value - base,
            kind_of_effect="difference",
            interval=interval,
            method=method,
            value=value,
            baseline=base,
            unit=unit,
            seeds=list(seeds),
            values=list(system),
            baselines=list(baseline),
            **more,
        )

    @classmethod
    def ratio(
        cls,
        system: Sequence[Number],
        baseline: Sequence[Number],
        *,
        unit: str = "",
        seeds: Sequence[int] = (),
        **more: Any,
    ) -> "Measurement":
        """System against baseline, pair by pair: the median ratio."""
        effect, interval, method = paired_ratio(system, baseline)
        return cls(
            effect=effect,
            kind_of_effect="ratio",
            interval=interval,
            method=method,
            value=sum(system) / len(system),
            baseline=sum(baseline) / len(baseline),
            unit=unit,
            seeds=list(seeds),
            values=list(system),
            baselines=list(baseline),
            **more,
        )

    @classmethod
    def figure(
        cls, value: Number, interval: Interval | None, *, method: str, unit: str = "", **more: Any
    ) -> "Measurement":
        """A figure with an interval of its own, such as a fitted exponent."""
        return cls(effect=float(value), interval=interval, method=method, value=float(value), unit=unit, **more)

    @classmethod
    def not_measured(cls, needs: str) -> "Measurement":
        """Could not be measured here; says what it needs."""
        return cls(needs=needs)

    @classmethod
    def failure(cls, error: Exception) -> "Measurement":
        """The measuring function raised; says what, in one line."""
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return cls(failed=" ".join(words.split())[:300])

"""What a measuring function returns: an effect with its interval, and what the report draws."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from provenn.core.errors import UserError
from provenn.evidence.interval import CONFIDENCE, Estimator, Interval, Number, estimate

MOST_POINTS = 50  # of a curve in a record
MOST_WORDS = 300  # characters of what an error says


class Part(BaseModel):
    """What a record is made of: no unknown keys, no changes, and infinities and NaN as JSON constants."""

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

    def thinned(self, most: int = MOST_POINTS) -> "Series":
        """At most so many of its points, the first and the last among them."""
        count = len(self.x)
        if count <= most:
            return self
        indices = sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
        kept = {
            name: [values[i] for i in indices]
            for name in ("x", "y", "low", "high")
            if (values := getattr(self, name)) is not None
        }
        return self.model_copy(update=kept)


class Table(Part):
    """Rows of text or numbers under a caption."""

    caption: str
    columns: list[str]
    rows: list[list[str | float | int | None]]

    def markdown(self) -> str:
        """The caption, and the table under it."""
        rows = "".join(f"| {' | '.join(str(cell) for cell in row)} |\n" for row in self.rows)
        return f"{self.caption}\n\n| {' | '.join(self.columns)} |\n|{' --- |' * len(self.columns)}\n{rows}"


class Picture(Part):
    """An image file beside the record, with words for those who cannot see it."""

    file: str
    caption: str


class Skill(Part):
    """What a variant reached, seed by seed, beside what the dummy baseline reaches on the same data.

    `may_guess` is the paper's reason why this variant cannot learn the task; without one, a variant that does not
    beat the dummy baseline shows nothing. Of an `unsettled` variant the best learning rate is at an end of the rates
    that were tried, though their grid has grown: more may be in it.
    """

    variant: str
    values: list[float]
    dummy_baseline: list[float]
    higher_is_better: bool
    may_guess: str = ""
    unsettled: bool = False


class Measurement(Part):
    """An effect, its interval, and all that is needed to repeat it. Build it with one of the class methods.

    The effect is what an experiment's region is about: a difference, a ratio or a value. A missing interval means
    that the
    data cannot give one, and then there is no verdict. `estimator` names how effect and interval follow from `values`
    and `baselines`, so that both can be computed again; `sides` are the labels of the two.
    """

    effect: float | None = None
    kind_of_effect: Literal["value", "difference", "ratio", "truth"] = "value"
    estimator: Estimator | None = None
    interval: Interval | None = None
    confidence: float = 1.0
    method: str = ""
    value: float | None = None
    baseline: float | None = None
    sides: tuple[str, str] | None = None
    skills: list[Skill] = []
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
    unsupported: str | None = None
    out_of_memory: str | None = None
    note: str = ""
    series: list[Series] = []
    tables: list[Table] = []
    pictures: list[Picture] = []

    @property
    def missed(self) -> bool:
        """Whether nothing was measured, for a reason that another time or machine may not have."""
        return any((self.needs, self.failed, self.unsupported, self.out_of_memory))

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
        """A claim that was checked and is true or false."""
        number = float(bool(truth))
        more = {"at_paper_setting": True, "note": detail, **more}
        return cls(
            effect=number, kind_of_effect="truth", interval=(number, number), method="exact", value=number, **more
        )

    @classmethod
    def of(
        cls,
        estimator: Estimator,
        values: Sequence[Number],
        baselines: Sequence[Number] = (),
        *,
        seeds: Sequence[int] = (),
        **more: Any,
    ) -> "Measurement":
        """The effect that `estimate` computes from the raw values."""
        effect, interval, method, confidence = estimate(estimator, values, baselines)
        kinds = {"difference": "difference", "ratio": "ratio", "clock ratio": "ratio", "exact ratio": "ratio"}
        if estimator in ("mean", "growth", "test set"):
            value, baseline = effect, None
        elif estimator == "clock ratio":
            value, baseline = median(values), median(baselines)
        else:
            value, baseline = sum(values) / len(values), sum(baselines) / len(baselines)
        facts: dict[str, Any] = {
            "effect": effect,
            "kind_of_effect": kinds.get(estimator, "value"),
            "estimator": estimator,
            "interval": interval,
            "confidence": confidence,
            "method": method,
            "value": value,
            "baseline": baseline,
            "seeds": list(seeds),
            "values": list(values),
            "baselines": list(baselines),
        }
        return cls(**{**facts, **more})

    @classmethod
    def paired(
        cls, system: Sequence[Number], baseline: Sequence[Number], *, seeds: Sequence[int], **more: Any
    ) -> "Measurement":
        """System against baseline over seeds: the mean difference."""
        return cls.of("difference", system, baseline, seeds=seeds, **more)

    @classmethod
    def ratio(cls, system: Sequence[Number], baseline: Sequence[Number], **more: Any) -> "Measurement":
        """System against baseline, pair by pair: the median ratio. Of clocks see `Timing`."""
        return cls.of("ratio", system, baseline, **more)

    @classmethod
    def mean(cls, values: Sequence[Number], *, seeds: Sequence[int], **more: Any) -> "Measurement":
        """One side alone: the mean over seeds."""
        return cls.of("mean", values, seeds=seeds, **more)

    @classmethod
    def figure(
        cls, value: Number, interval: Interval | None, *, method: str, confidence: float = CONFIDENCE, **more: Any
    ) -> "Measurement":
        """A figure with an interval of its own. It cannot be computed again from a record: prefer `of`."""
        facts = {"effect": float(value), "interval": interval, "confidence": confidence, "method": method}
        return cls(value=float(value), **{**facts, **more})

    @classmethod
    def not_measured(cls, needs: str) -> "Measurement":
        """Could not be measured here; says what it needs."""
        return cls(needs=needs)

    @classmethod
    def failure(cls, error: BaseException, device: str = "") -> "Measurement":
        """The measuring function raised; says what, in one line, and whether the device or the build is to blame.

        Args:
            error: what was raised; what it was raised from counts too.
            device: where it was measured.
        """
        where = f"on {device}: " if device else ""
        for cause in _causes(error):
            if lacks_memory(cause):
                return cls(out_of_memory=where + _in_a_line(cause))
            if lacks_operation(cause):
                return cls(unsupported=where + _in_a_line(cause))
        return cls(failed=_in_a_line(error) if isinstance(error, UserError) else _in_a_line(error, named=True))


# As torch words it: there is a class of its own only for GPUs and for what no kernel was ever registered for.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
NO_OPERATION = (
    "not implemented for",
    "not currently implemented",
    "not supported on",
    "no kernel image is available",
    "not compiled with",
    "arguments from the '",
)
STUB = 'missing the required "forward" function'  # of a module: what its author left out, no device has


def lacks_memory(error: BaseException) -> bool:
    """Whether the device or the machine has too little memory for what was asked.

    >>> lacks_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    True
    """
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def lacks_operation(error: BaseException) -> bool:
    """Whether the device, or this build of torch, has no such operation.

    >>> lacks_operation(RuntimeError('"sort" not implemented for "Half"')), lacks_operation(RuntimeError("no"))
    (True, False)
    """
    if isinstance(error, NotImplementedError):
        return bool(str(error)) and STUB not in str(error)
    return isinstance(error, (RuntimeError, AssertionError)) and any(words in str(error) for words in NO_OPERATION)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _in_a_line(error: BaseException, named: bool = False) -> str:
    words = " ".join((f"{type(error).__name__}: {error}" if named else str(error)).split())
    words = words.rpartition("] err == 0. ")[2].partition(". This could be because")[0]  # where torch's own code failed
    return (words or type(error).__name__)[:MOST_WORDS]

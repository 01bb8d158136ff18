"""What things cost at growing sizes, side by side: times in turns, operations and bytes as counts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

from provenn.core.cost import flops, interleaved, peak_activation_bytes
from provenn.core.digest import digest
from provenn.core.errors import UserError
from provenn.evidence.measurement import Measurement, Series, Table
from provenn.evidence.run import Run

FEWEST_ROUNDS = 6  # pairs, below which no order-statistic interval has 95 %
SECONDS = 0.02  # that one measurement of a clock lasts at least
Quantity = Literal["time", "flops", "memory", "count"]
UNITS = {"time": "milliseconds", "flops": "operations", "memory": "bytes", "count": ""}


@dataclass(frozen=True)
class Timing:
    """Calls that do the same work at each size: `runners[label](size, device)` makes what is measured.

    Args:
        name: of the trials and of the plot.
        runners: by label; each makes a function without arguments.
        sizes: growing.
        quantity: time (CPU time of one thread, or the wall clock of a GPU), flops (elementwise operators included),
            memory
            (the most bytes that a call holds at any moment), or count (what the function returns).
        unit: of the sizes.
        of: the unit of a count.
        rounds: of a clock.
        setting: what else a reader needs to repeat it.
        note: goes with every measurement.
        gpu: the GPU that it needs, where it is not to run on anything else, such as "a CUDA GPU with 16 GB".
        at_paper_setting: whether sizes and device are those of the paper's figure.

    Raises:
        ValueError: fewer rounds than an interval of 95 % needs.
    """

    name: str
    runners: Mapping[str, Callable[[int, str], Callable[[], Any]]]
    sizes: Sequence[int]
    quantity: Quantity = "time"
    unit: str = "tokens"
    of: str = ""
    rounds: int = 11
    setting: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    gpu: str = ""
    at_paper_setting: bool = False

    def __post_init__(self) -> None:
        if self.rounds < FEWEST_ROUNDS:
            raise ValueError(f"{self.name}: {self.rounds} rounds give no 95 % interval, at least {FEWEST_ROUNDS} do")

    def against(self, system: str, baseline: str, *, at: int | None = None) -> "Ratio":
        """The ratio of the two at the largest size, or at that one; the table has every size and runner.

        Raises:
            ValueError: a runner or a size that does not exist.
        """
        self._known(system, baseline)
        if at is not None and at not in self.sizes:
            raise ValueError(f"{self.name} has no size {at}; it has: {', '.join(map(str, self.sizes))}")
        return Ratio(self, system, baseline, at)

    def grows(self, system: str) -> "Exponent":
        """The exponent of the quantity over size; of a clock, of each size's quickest round."""
        self._known(system)
        if len(self.sizes) < 3:
            raise ValueError(f"{self.name}: growth needs at least three sizes, got {len(self.sizes)}")
        return Exponent(self, system)

    def __digest__(self) -> tuple[Any, ...]:
        return self.deciding(*self.runners)

    def deciding(self, *runners: str) -> tuple[Any, ...]:
        """All that decides the values of these runners, for a digest; the others, labels and tables do not."""
        measured = [self.runners[label] for label in runners]
        return measured, tuple(self.sizes), self.quantity, self.rounds, self.gpu, Timing.measure, Timing._count

    def parameters(self) -> dict[str, Any]:
        """What `--set` may change, and its type."""
        return {"sizes": tuple[int, ...], **({"rounds": int} if self.quantity == "time" else {})}

    def with_overrides(self, **overrides: Any) -> "Timing":
        """The same timing at another setting.

        Raises:
            UserError: sizes that do not grow from 1 on, or fewer rounds than an interval takes.
        """
        sizes = overrides.get("sizes", self.sizes)
        if not sizes or min(sizes) < 1 or sorted(set(sizes)) != list(sizes):
            raise UserError(f"sizes must be whole numbers of at least 1 that grow, got {list(sizes)}")
        if overrides.get("rounds", FEWEST_ROUNDS) < FEWEST_ROUNDS:
            raise UserError(f"rounds must be at least {FEWEST_ROUNDS}, got {overrides['rounds']}")
        return replace(self, **overrides)

    def _known(self, *names: str) -> None:
        for name in names:
            if name not in self.runners:
                raise ValueError(f"{self.name} has no runner {name!r}; it has: {', '.join(self.runners)}")

    def lacking(self, run: Run) -> str:
        """What it needs and this run does not have, or ""."""
        return f"{self.gpu}: --device cuda" if self.gpu and not run.device.startswith("cuda") else ""

    def facts(self, run: Run) -> dict[str, Any]:
        """All that decides what is measured: the trial's key, and the record's setting."""
        sizes, rounds = (self.sizes[:3], 2) if run.smoke else (self.sizes, self.rounds)
        clock = {"rounds": rounds} if self.quantity == "time" else {}
        return {
            self.unit: list(sizes),
            "quantity": self.quantity,
            **clock,
            **self.setting,
            "code": digest(self.runners),
        }

    async def measure(self, run: Run) -> dict[str, list[list[float]]]:
        """By runner, one list a size: its rounds, or its count."""
        facts = self.facts(run)
        sizes = facts[self.unit]

        def measure() -> dict[str, list[list[float]]]:
            if self.quantity == "time":
                calls = {(label, n): make(n, run.device) for label, make in self.runners.items() for n in sizes}
                seconds = interleaved(
                    calls, rounds=facts["rounds"], device=run.device, min_time=0.0 if run.smoke else SECONDS
                )
                return {label: [[1e3 * s for s in seconds[label, n]] for n in sizes] for label in self.runners}
            return {label: [[self._count(make(n, run.device))] for n in sizes] for label, make in self.runners.items()}

        return await run.trial(self.name, measure, alone=self.quantity == "time", **facts)

    def _count(self, function: Callable[[], Any]) -> float:
        if self.quantity == "flops":
            return float(flops(function, elementwise=True))
        if self.quantity == "memory":
            return float(peak_activation_bytes(function))
        return float(function())

    def shown(self, run: Run, measured: Mapping[str, list[list[float]]]) -> dict[str, Any]:
        """What goes with every measurement of the timing."""
        facts = self.facts(run)
        sizes = facts[self.unit]
        rows: list[list[Any]] = [[n, *(median(measured[label][i]) for label in measured)] for i, n in enumerate(sizes)]
        unit = self.of or UNITS[self.quantity]
        series = [
            Series(
                name=label,
                x=list(sizes),
                y=[median(rounds) for rounds in rows_of],
                plot=self.name,
                x_label=self.unit,
                y_label=unit,
                log="xy",
                low=[min(rounds) for rounds in rows_of],
                high=[max(rounds) for rounds in rows_of],
            )
            for label, rows_of in measured.items()
            if all(min(rounds) > 0 for rounds in rows_of)
        ]
        caption = f"{self.name[:1].upper()}{self.name[1:]}, {unit}"
        return {
            "setting": facts,
            "tables": [Table(caption=caption, columns=[self.unit, *measured], rows=rows)],
            "series": series if len(sizes) > 2 else [],
            "note": self.note,
        }


@dataclass(frozen=True)
class Ratio:
    """An experiment read off a timing: one runner against another at one size."""

    timing: Timing
    system: str
    baseline: str
    at: int | None = None

    @property
    def sides(self) -> tuple[str, str]:
        """What readers call the system and the baseline."""
        return self.system, self.baseline

    def __digest__(self) -> tuple[Any, ...]:
        return *self.timing.deciding(self.system, self.baseline), self.at

    def parameters(self) -> dict[str, Any]:
        """As `Timing.settable`."""
        return self.timing.parameters()

    def with_overrides(self, **overrides: Any) -> "Ratio":
        """As `Timing.varied`."""
        return replace(self, timing=self.timing.with_overrides(**overrides))

    async def __call__(self, run: Run) -> Measurement:
        if lacking := self.timing.lacking(run):
            return Measurement.not_measured(lacking)
        timing, measured = self.timing, await self.timing.measure(run)
        sizes = timing.facts(run)[timing.unit]
        index = sizes.index(self.at) if self.at in sizes else len(sizes) - 1
        values, baselines = measured[self.system][index], measured[self.baseline][index]
        estimator: Literal["clock ratio", "exact ratio"] = "clock ratio" if timing.quantity == "time" else "exact ratio"
        shown = timing.shown(run, measured)
        shown["setting"] = {**shown["setting"], "at": sizes[index]}
        unit = timing.of or UNITS[timing.quantity]
        shown["at_paper_setting"] = timing.at_paper_setting
        return Measurement.of(estimator, values, baselines, sides=self.sides, unit=unit, **shown)


@dataclass(frozen=True)
class Exponent:
    """An experiment read off a timing: how one runner's quantity grows with the size."""

    timing: Timing
    system: str

    sides = None

    def __digest__(self) -> tuple[Any, ...]:
        return *self.timing.deciding(self.system), "grows"

    def parameters(self) -> dict[str, Any]:
        """As `Timing.settable`."""
        return self.timing.parameters()

    def with_overrides(self, **overrides: Any) -> "Exponent":
        """As `Timing.varied`."""
        timing = self.timing.with_overrides(**overrides)
        if len(timing.sizes) < 3:
            raise UserError(f"sizes: growth needs at least three, got {len(timing.sizes)}")
        return replace(self, timing=timing)

    async def __call__(self, run: Run) -> Measurement:
        if lacking := self.timing.lacking(run):
            return Measurement.not_measured(lacking)
        timing, measured = self.timing, await self.timing.measure(run)
        least = [min(rounds) for rounds in measured[self.system]]
        unit = f"exponent of {timing.of or UNITS[timing.quantity]} over {timing.unit}"
        return Measurement.of("growth", least, timing.facts(run)[timing.unit], unit=unit, **timing.shown(run, measured))

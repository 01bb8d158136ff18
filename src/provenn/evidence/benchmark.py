"""Speed as `provenn bench` prints it: a timing's runner beside what it is to keep up with, at every size."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from types import ModuleType

from provenn.catalog import installed
from provenn.core.cost import Comparison, interleaved
from provenn.core.errors import UserError
from provenn.evidence.timing import SECONDS, Timing


@dataclass(frozen=True)
class Benchmark:
    """One runner's time over another's, at every size of a timing; no experiment, and nothing is recorded.

    Args:
        timing: of quantity "time".
        system: the label of the runner that is looked at.
        baseline: the label of the runner that it is held against; of several, the quickest at each size.
        within: the ratio that is asked for, at most; None where none is.
        package: somebody else's, that the baseline imports, as pip names it; without it nothing is timed.

    Raises:
        ValueError: a timing of another quantity, a runner that does not exist, or `within` not above 0.
    """

    timing: Timing
    system: str
    baseline: str | tuple[str, ...]
    within: float | None = None
    package: str | None = None

    def __post_init__(self) -> None:
        if self.timing.quantity != "time":
            raise ValueError(f"{self.timing.name}: a benchmark is of time, got a timing of {self.timing.quantity}")
        for label in self.baselines:
            self.timing.against(self.system, label)  # which refuses a label that no runner has
        if self.within is not None and not self.within > 0:
            raise ValueError(f"{self.timing.name}: within must be above 0, got {self.within}")

    @property
    def baselines(self) -> tuple[str, ...]:
        """Those that the system is compared with; of several the quickest counts at each size."""
        return (self.baseline,) if isinstance(self.baseline, str) else tuple(self.baseline)

    @property
    def lacks(self) -> str | None:
        """The package that has to be installed first, if any."""
        return self.package if self.package is not None and installed(self.package) is None else None


@dataclass(frozen=True)
class Speed:
    """What a benchmark gave at one size.

    Args:
        size: of the timing; None where nothing could be timed at any.
        baseline: the runner that it was held against there.
        comparison: the system's time over the baseline's; None where there is none.
        trouble: why there is none.
    """

    benchmark: Benchmark
    size: int | None
    baseline: str
    comparison: Comparison | None
    trouble: str = ""

    @property
    def met(self) -> bool | None:
        """Whether what is asked for was met; None where nothing is, or the interval decides nothing."""
        within = self.benchmark.within
        if within is None or self.comparison is None or self.comparison.confidence < 0.95:
            return None
        low, high = self.comparison.interval
        return True if high <= within else False if low > within else None


def benchmarks(module: ModuleType) -> tuple[Benchmark, ...]:
    """The `BENCHMARKS` of a paper's `experiments.py`; none where it has no such list.

    Raises:
        UserError: something else stands among them.
    """
    listed = tuple(getattr(module, "BENCHMARKS", ()))
    for each in listed:
        if not isinstance(each, Benchmark):
            raise UserError(f"{module.__name__}: BENCHMARKS holds Benchmark(…) alone, got {each!r}")
    return listed


def time_benchmarks(chosen: Sequence[Benchmark], *, device: str = "cpu", smoke: bool = False) -> Iterator[Speed]:
    """Time benchmarks, timing by timing and size by size: in CPU time of one thread, or by the clock of a GPU.

    The runners of a timing take turns, and each runs once for all benchmarks that name it. One that fails ends those
    that name it, and no others.

    Args:
        chosen: what to time; one whose package is not installed gives a single speed that says so.
        device: where.
        smoke: two rounds of the first size: the path works, and nothing is decided.
    """
    for timing in {id(each.timing): each.timing for each in chosen}.values():
        waiting = [each for each in chosen if each.timing is timing]
        for each in [each for each in waiting if each.lacks is not None]:
            words = f"{each.lacks} is not installed: pip install {each.lacks}"
            yield Speed(each, None, " or ".join(each.baselines), None, words)
            waiting.remove(each)
        for size in timing.sizes[:1] if smoke else timing.sizes:
            calls: dict[str, Callable[[], object]] = {}
            for each in list(waiting):
                for label in (each.system, *each.baselines):
                    try:
                        if label not in calls:
                            call = timing.runners[label](size, device)
                            call()
                            calls[label] = call
                    except Exception as error:  # of somebody else's package, as a rule
                        words = f"{label} failed: {type(error).__name__}: {' '.join(str(error).split())}"
                        yield Speed(each, size, " or ".join(each.baselines), None, words)
                        waiting.remove(each)
                        break
            if not calls:
                break
            rounds, shortest = (2, 0.0) if smoke else (timing.rounds, SECONDS)
            seconds = interleaved(calls, rounds=rounds, device=device, min_time=shortest)
            for each in waiting:
                quickest = min(each.baselines, key=lambda label: median(seconds[label]))
                yield Speed(each, size, quickest, Comparison.of(seconds[each.system], seconds[quickest]))

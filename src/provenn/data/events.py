"""Events in time: two processes whose true likelihood is known, and the user's own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from provenn.core.errors import UserError
from provenn.data.tables import read_table


@dataclass(frozen=True)
class Hawkes:
    """Events of several marks that set off one another: λ_m(t) = μ_m + Σ_{t_i < t} α_{m,k_i} β exp(−β (t − t_i)).

    Args:
        base: μ, the rate of each mark by itself.
        excitation: α[m][k], the mean number of events of mark m that one of mark k sets off.
        decay: β, how fast that wears off.
    """

    base: tuple[float, ...]
    excitation: tuple[tuple[float, ...], ...]
    decay: float

    def rates(self, trace: Float64[np.ndarray, "*n marks"]) -> Float64[np.ndarray, "*n marks"]:
        """λ of each mark from the trace Σ exp(−β (t − t_i)) of each mark's past events."""
        return np.asarray(self.base) + self.decay * trace @ np.asarray(self.excitation).T

    def simulate(
        self, sequences: int, events: int, rng: np.random.Generator
    ) -> tuple[Float64[np.ndarray, "sequences events"], Int64[np.ndarray, "sequences events"]]:
        """Times and marks of the first events from an empty past, by thinning (Ogata, 1981), all sequences at once."""
        times, marks = np.zeros((sequences, events)), np.zeros((sequences, events), dtype=np.int64)
        now, trace = np.zeros(sequences), np.zeros((sequences, len(self.base)))
        count = np.zeros(sequences, dtype=np.int64)
        while (count < events).any():
            bound = self.rates(trace).sum(1)  # between events the rate only falls
            gap = rng.exponential(size=sequences) / bound
            now, trace = now + gap, trace * np.exp(-self.decay * gap)[:, None]
            rate = self.rates(trace).cumsum(1)
            threshold = rng.random(sequences) * bound
            happens = (threshold < rate[:, -1]) & (count < events)
            rows = np.flatnonzero(happens)
            mark = (threshold[rows, None] >= rate[rows]).sum(1)
            times[rows, count[rows]], marks[rows, count[rows]] = now[rows], mark
            trace[rows, mark] += 1
            count[rows] += 1
        return times, marks

    def nll(
        self, times: Float64[np.ndarray, "sequences events"], marks: Int64[np.ndarray, "sequences events"]
    ) -> tuple[Float64[np.ndarray, "sequences events"], Float64[np.ndarray, "sequences events"]]:
        """−log p of each gap, and of each mark given the gap, under the truth."""
        rows = np.arange(len(times))
        trace, before = np.zeros((len(times), len(self.base))), np.zeros(len(times))
        gap_nll, mark_nll = np.zeros(times.shape), np.zeros(times.shape)
        for i in range(times.shape[1]):
            gap = times[:, i] - before
            fall = np.exp(-self.decay * gap)[:, None]
            expected = sum(self.base) * gap + (trace * (1 - fall)) @ np.asarray(self.excitation).sum(0)
            trace = trace * fall
            rate = self.rates(trace)
            gap_nll[:, i] = expected - np.log(rate.sum(1))
            mark_nll[:, i] = np.log(rate.sum(1)) - np.log(rate[rows, marks[:, i]])
            trace[rows, marks[:, i]] += 1
            before = times[:, i]
        return gap_nll, mark_nll

    def intensity(
        self, times: Float64[np.ndarray, " events"], marks: Int64[np.ndarray, " events"], at: Float64[np.ndarray, " at"]
    ) -> Float64[np.ndarray, " at"]:
        """Σ_m λ_m at some moments of one sequence."""
        age = at[:, None] - times
        weight = np.where(age > 0, np.exp(-self.decay * np.maximum(age, 0)), 0)
        return self.rates(weight @ np.eye(len(self.base))[marks]).sum(1)


@dataclass(frozen=True)
class SinePoisson:
    """One mark at the rate λ(t) = rate · (1 + depth · sin(2π t / period)), whatever came before."""

    rate: float
    depth: float
    period: float

    def simulate(
        self, sequences: int, events: int, rng: np.random.Generator
    ) -> tuple[Float64[np.ndarray, "sequences events"], Int64[np.ndarray, "sequences events"]]:
        """Times and marks of the first events, by thinning, all sequences at once."""
        # Moments are drawn at the highest rate, and each is kept with the share that its own rate has of it.
        bound = self.rate * (1 + self.depth)
        times, now = np.zeros((sequences, events)), np.zeros(sequences)
        count = np.zeros(sequences, dtype=np.int64)
        while (count < events).any():
            now = now + rng.exponential(size=sequences) / bound
            happens = rng.random(sequences) * bound < self._at(now)
            rows = np.flatnonzero(happens & (count < events))
            times[rows, count[rows]] = now[rows]
            count[rows] += 1
        return times, np.zeros(times.shape, dtype=np.int64)

    def nll(
        self, times: Float64[np.ndarray, "sequences events"], marks: Int64[np.ndarray, "sequences events"]
    ) -> tuple[Float64[np.ndarray, "sequences events"], Float64[np.ndarray, "sequences events"]]:
        """−log p of each gap under the truth; the one mark is certain."""
        turn = 2 * np.pi / self.period
        # ∫λ up to each event: its differences are how many events were to be expected in each gap.
        expected = self.rate * (times - self.depth / turn * np.cos(turn * times))
        start = -self.rate * self.depth / turn
        return np.diff(expected, axis=1, prepend=start) - np.log(self._at(times)), np.zeros(times.shape)

    def intensity(
        self, times: Float64[np.ndarray, " events"], marks: Int64[np.ndarray, " events"], at: Float64[np.ndarray, " at"]
    ) -> Float64[np.ndarray, " at"]:
        """λ at some moments."""
        return self._at(at)

    def _at(self, times: np.ndarray) -> np.ndarray:
        return self.rate * (1 + self.depth * np.sin(2 * np.pi * times / self.period))


PROCESSES: dict[str, Hawkes | SinePoisson] = {
    # Each mark sets off the other: about two marks of three can be predicted from the last.
    "hawkes": Hawkes(base=(0.1, 0.05), excitation=((0.0, 0.8), (0.8, 0.0)), decay=2.0),
    "sine": SinePoisson(rate=0.64, depth=0.9, period=4 * np.pi),
}


@dataclass(frozen=True)
class History:
    """One sequence of events: rising times and the name of each event's mark."""

    name: str
    times: Float64[np.ndarray, " events"]
    marks: list[str]


def read_histories(file: Path) -> list[History]:
    """A CSV with the columns `sequence,time,mark`, a row an event.

    Raises:
        UserError: another header, a hole, a time that is no number, or two events of a sequence at one time.
    """
    table = read_table(file)
    wanted = ("sequence", "time", "mark")
    if sorted(table.columns) != sorted(wanted):
        raise UserError(f"{file} has the columns {', '.join(table.columns)}: expected {','.join(wanted)}")
    times, marks = table.numbers(["time"])[:, 0], table.column("mark")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(table.column("sequence")):
        rows.setdefault(name, []).append(row)
    histories = []
    for name, members in rows.items():
        order = np.asarray(members)[np.argsort(times[members], kind="stable")]
        same = np.flatnonzero(np.diff(times[order]) == 0)
        if len(same):
            first, second = order[same[0]] + 2, order[same[0] + 1] + 2
            raise UserError(
                f"{file}, rows {first} and {second}: two events of the sequence {name!r} at the time "
                f"{times[order[same[0]]]:g}; gaps must be positive, set them apart or join them"
            )
        histories.append(History(name, times[order], [marks[row] for row in order]))
    return histories

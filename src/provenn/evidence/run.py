"""What a measuring function is given: budget, seeds, device, and a memory of the trials that have ended.

A trial runs here and now, or elsewhere: in other processes, or on the machines of a cluster. Then the measuring
function is broken off where it asks for a value that is not there yet (`Waiting`), and called again once it is.
"""

import io
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from provenn.core import progress
from provenn.core.files import atomic_write
from provenn.evidence.measurement import Picture
from provenn.evidence.record import EVIDENCE, LEDGER, PICTURES, Ledger, Trial, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Budget = Literal["smoke", "small", "paper"]


class Waiting(BaseException):
    """A trial was asked for elsewhere, and what measures is called again when it has ended.

    No `Exception`, since what measures may catch those.

    Args:
        keys: the trials that it needs.
    """

    def __init__(self, keys: set[str]):
        self.keys = keys


class Elsewhere(ABC):
    """Where trials run that do not run here."""

    @abstractmethod
    def ask(self, run: "Run", key: str, function: Callable[[], Any], alone: bool) -> None:
        """Have `function()` called on another process or machine, and its outcome given to `run.keep`."""


class Run:
    """One run of one paper's experiments.

    Args:
        paper: the slug.
        out: the folder of the run; the paper's files lie in `out/<slug>`.
        budget: smoke (seconds, no verdict), small (minutes on two cores), paper (the paper's own setting).
        seeds: one trial each.
        device: a torch device.
        ledger: the trials that have ended.
        reuse: take the trials of the ledger for this run's own; else only those that this run has made.
        elsewhere: what runs the trials; by default they run here.
    """

    def __init__(
        self,
        paper: str,
        out: Path,
        *,
        budget: Budget = "small",
        seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
        device: str = "cpu",
        ledger: Ledger | None = None,
        reuse: bool = False,
        elsewhere: Elsewhere | None = None,
    ):
        self.paper, self.budget, self.seeds, self.device = paper, budget, tuple(seeds), device
        self.reuse = reuse
        self.folder = Path(out) / paper
        self.ledger = ledger or Ledger(paper=paper)
        self._known = {trial.key: trial for trial in self.ledger.trials} if reuse else {}
        self.overrides: dict[
            str, Any
        ] = {}  # what `--set` changes of the experiment that is measured now: of every trial's key
        self.rates: dict[str, float] = {}  # learning rates of variants by label, where none is to be chosen
        self.memory: dict[Any, Any] = {}  # for what several experiments of this run would compute alike
        self.spared = 0.0  # seconds that known trials took when they were run
        self.elsewhere = elsewhere
        self.pending: set[str] = set()  # keys of trials that run elsewhere
        self._failed: dict[str, Exception] = {}
        self.machines: set[str] = set()  # other than this one, on which trials that were asked for had run
        self.peak = 0  # bytes of memory that a trial has taken elsewhere
        self.drawn: dict[str, bytes] | None = None  # in a trial that runs elsewhere: its pictures by name

    def __getstate__(self) -> dict[str, Any]:
        """What a trial elsewhere needs of its run: neither what has ended nor what was computed on the way."""
        none = {"ledger": Ledger(paper=self.paper), "_known": {}, "_failed": {}, "memory": {}, "pending": set()}
        return {**vars(self), **none, "elsewhere": None, "machines": set(), "drawn": {}}

    @property
    def smoke(self) -> bool:
        """Only show that the path works: the shortest run that touches all the code."""
        return self.budget == "smoke"

    @property
    def file(self) -> Path:
        """Where the records go."""
        return self.folder / EVIDENCE

    def trials(self, name: str, function: Callable[[int], Any], **setting: Any) -> list[Any]:
        """`function(seed)` for each seed, each result saved as it ends; what is known already is not run again.

        The same name and setting in another experiment give the same results. So the setting must hold all that decides
        the value; a `Study` and a `Timing` see to that, digest of the code included. `function` returns plain JSON.
        """
        calls = [partial(self.trial, name, partial(function, seed), seed=seed, **setting) for seed in self.seeds]
        with progress.bar(name, len(calls)) as advance:

            def one(call: Callable[[], Any]) -> Any:
                value = call()
                advance()
                return value

            return self.together(partial(one, call) for call in calls)

    def together(self, calls: Iterable[Callable[[], Any]]) -> list[Any]:
        """The results of calls that need nothing of each other: elsewhere, the trials of all run side by side."""
        results, needed = [], set[str]()
        for call in calls:
            try:
                results.append(call())
            except Waiting as wait:
                needed |= wait.keys
        if needed:
            raise Waiting(needed)
        return results

    def trial(
        self, name: str, function: Callable[[], Any], *, seed: int | None = None, alone: bool = False, **setting: Any
    ) -> Any:
        """`function()` once, its result saved.

        Args:
            name, seed, setting: what it is known by: all that decides the value.
            function: returns plain JSON; it may run on another machine.
            alone: share no machine with other trials: for clocks.

        Raises:
            Waiting: it runs elsewhere and has not ended. What ended it there is raised as it is.
        """
        setting = {**setting, "set": self.overrides} if self.overrides else setting
        key = Trial.key_of(name, seed, f"{self.budget} on {self.device}", plain(setting))
        if (known := self._known.get(key)) is not None:
            self.spared += known.seconds
            self.machines |= {known.machine} - {""}
            return known.value
        if key in self._failed:
            raise self._failed[key]
        if self.elsewhere is not None:
            if key not in self.pending:
                self.elsewhere.ask(self, key, function, alone)
                self.pending.add(key)
            raise Waiting({key})
        start = time.perf_counter()
        value = plain(function())
        self.keep(key, value, time.perf_counter() - start)
        return value

    def keep(self, key: str, value: Any, seconds: float, machine: str = "") -> None:
        """Save a trial's value; `machine` is named where it was not this one."""
        trial = Trial(key=key, value=value, seconds=round(seconds, 3), machine=machine)
        self._known[key] = trial
        self.pending.discard(key)
        self.ledger.trials = [t for t in self.ledger.trials if t.key != key] + [trial]
        if self.drawn is None:
            self.ledger.write(self.folder / LEDGER)

    def keep_failure(self, key: str, error: Exception) -> None:
        """Let whoever asks for a trial again get the error that ended it."""
        self._failed[key] = error
        self.pending.discard(key)

    def picture(self, name: str, figure: "Figure", caption: str) -> Picture:
        """Save a matplotlib figure as a PNG beside the evidence; the caption says what is to be seen."""
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=80, bbox_inches="tight")
        if self.drawn is None:
            self.keep_picture(name, image.getvalue())
        else:
            self.drawn[name] = image.getvalue()
        return Picture(file=f"{PICTURES}/{name}.png", caption=caption)

    def keep_picture(self, name: str, content: bytes) -> None:
        """Write a PNG beside the evidence."""
        with atomic_write(self.folder / PICTURES / f"{name}.png") as path:
            path.write_bytes(content)

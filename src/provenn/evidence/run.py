"""What a measuring function is given: budget, seeds, device, and a memory of the trials that have ended.

A trial runs here and now, or elsewhere: in other processes, or on the machines of a cluster. A measuring function
awaits its trials (`await run.trials(...)`): it rests where a value is not there yet, and goes on from there once it is.
No event loop is needed. `measure_all` of `provenn.experiments.side_by_side` lets each go on whose trials have ended.
"""

import io
import math
import time
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from provenn.core import progress
from provenn.core.files import atomic_write
from provenn.evidence.measurement import Picture
from provenn.evidence.record import EVIDENCE, LEDGER, PICTURES, Ledger, Trial, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Budget = Literal["smoke", "small", "paper"]
T = TypeVar("T")


@types.coroutine
def one_has_ended(keys: set[str]) -> Generator[set[str], None, None]:
    """Rest until one of these trials, which run elsewhere, has ended."""
    yield keys


def run_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """The outcome of what awaits trials, where all of them run in this process.

    Raises:
        RuntimeError: one of them runs elsewhere.
    """
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    coroutine.close()
    raise RuntimeError("a trial runs elsewhere: only `measure_all` can wait for it")


class Elsewhere(ABC):
    """Where trials run that do not run here."""

    @abstractmethod
    def ask(self, run: "Run", key: str, function: Callable[[], Any], alone: bool) -> None:
        """Have `function()` called on another process or machine, and its outcome given to `run.keep`."""

    @abstractmethod
    def wait(self) -> None:
        """Until a trial has ended."""


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
        self.elsewhere = elsewhere
        self.pending: set[str] = set()  # keys of trials that run elsewhere
        self._failed: dict[str, Exception] = {}
        self.peaks: set[int] = set()  # bytes of memory that trials have taken elsewhere
        self.spared = 0.0  # seconds that known trials took when they were run
        self.waited = 0.0  # seconds that passed here while trials ran elsewhere
        self.machines: set[str] = set()  # other than this one, on which trials that were asked for had run
        self.broken = False  # whether a trial that was asked for has raised an error
        self.drawn: dict[str, bytes] | None = None  # in a trial that runs elsewhere: its pictures by name

    def __getstate__(self) -> dict[str, Any]:
        """What a trial elsewhere needs of its run: neither what has ended nor what was computed on the way."""
        none = {"ledger": Ledger(paper=self.paper), "_known": {}, "_failed": {}, "memory": {}, "pending": set()}
        return {**vars(self), **none, "elsewhere": None, "peaks": set(), "machines": set(), "drawn": {}}

    def of_experiment(self, **changes: Any) -> "Run":
        """This run for one experiment: all experiments share the trials, and each counts its own seconds and machines.

        Args:
            changes: what is the experiment's own, by attribute: `overrides`, `seeds`, `rates` or `device`.
        """
        run = Run.__new__(Run)  # a copy would leave out what `__getstate__` does
        vars(run).update({**vars(self), "spared": 0.0, "waited": 0.0, "machines": set(), "broken": False, **changes})
        return run

    @property
    def smoke(self) -> bool:
        """Only show that the path works: the shortest run that touches all the code."""
        return self.budget == "smoke"

    @property
    def file(self) -> Path:
        """Where the records go."""
        return self.folder / EVIDENCE

    async def trials(self, name: str, function: Callable[[int], Any], **setting: Any) -> list[Any]:
        """`function(seed)` for each seed, each result saved as it ends; what is known already is not run again.

        The same name and setting in another experiment give the same results. So the setting must hold all that decides
        the value; a `Study` and a `Timing` see to that, digest of the code included. `function` returns plain JSON.
        """
        bar = progress.bar(name, len(self.seeds)) if self.elsewhere is None else nullcontext(lambda: None)
        with bar as advance:

            async def one(seed: int) -> Any:
                value = await self.trial(name, partial(function, seed), seed=seed, **setting)
                advance()
                return value

            return await self.together(one(seed) for seed in self.seeds)

    @staticmethod
    async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """The results of coroutines that need nothing of each other: the trials of all run side by side elsewhere.

        Raises:
            Exception: that of the first in order that fails, as if each had been awaited in turn.
        """
        resting = dict(enumerate(coroutines))
        results, errors = dict[int, T](), dict[int, Exception]()
        try:
            while resting:
                keys = set[str]()
                for index, coroutine in list(resting.items()):
                    try:
                        keys |= coroutine.send(None)
                        continue
                    except StopIteration as ended:
                        results[index] = ended.value
                    except Exception as error:
                        errors[index] = error
                    del resting[index]
                    if errors and min(errors) < min(resting, default=math.inf):
                        raise errors[min(errors)]
                if resting:
                    await one_has_ended(keys)
        finally:
            errors.clear()  # an error holds this frame, which would hold it: what it took of memory goes at once
            for coroutine in resting.values():
                coroutine.close()
        return [results[index] for index in sorted(results)]

    async def trial(
        self, name: str, function: Callable[[], Any], *, seed: int | None = None, alone: bool = False, **setting: Any
    ) -> Any:
        """`function()` once, its result saved.

        Args:
            name, seed, setting: what it is known by: all that decides the value.
            function: returns plain JSON; it may run on another machine.
            alone: share no machine with other trials: for clocks.

        Raises:
            Exception: what ended it, here or elsewhere, as it is.
        """
        setting = {**setting, "set": self.overrides} if self.overrides else setting
        key = Trial.key_of(name, seed, f"{self.budget} on {self.device}", plain(setting))
        asked = key in self._known or key in self._failed or key in self.pending
        if self.elsewhere is not None and not asked:
            self.elsewhere.ask(self, key, function, alone)
            self.pending.add(key)
        while key in self.pending:
            await one_has_ended({key})
        if (known := self._known.get(key)) is not None:
            self.spared += known.seconds
            self.machines |= {known.machine} - {""}
            return known.value
        start = time.perf_counter()
        try:
            if key in self._failed:
                raise self._failed[key]
            value = plain(function())
        except Exception:
            self.broken = True
            raise
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

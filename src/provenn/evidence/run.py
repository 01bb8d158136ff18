"""What a measuring function is given: budget, seeds, device, and a memory of the trials that have ended."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from provenn import progress
from provenn.evidence.measurement import Picture
from provenn.evidence.record import EVIDENCE, LEDGER, PICTURES, Ledger, Trial, plain
from provenn.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Budget = Literal["smoke", "small", "paper"]


class Run:
    """One run of one paper's claims.

    Args:
        paper: the slug.
        out: the folder of the run; the paper's files lie in `out/<slug>`.
        budget: smoke (seconds, no verdict), small (minutes on two cores), paper (the paper's own setting).
        seeds: one trial each.
        device: a torch device.
        ledger: the trials that have ended.
        reuse: take the trials of the ledger for this run's own; else only those that this run has made.
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
    ):
        self.paper, self.budget, self.seeds, self.device = paper, budget, tuple(seeds), device
        self.reuse = reuse
        self.folder = Path(out) / paper
        self.ledger = ledger or Ledger(paper=paper)
        self._known = {trial.key: trial for trial in self.ledger.trials} if reuse else {}
        self.changes: dict[
            str, Any
        ] = {}  # what `--set` changes of the claim that is measured now: of every trial's key
        self.memory: dict[Any, Any] = {}  # for what several claims of this run would compute alike
        self.spared = 0.0  # seconds that known trials took when they were run

    @property
    def smoke(self) -> bool:
        """Only show that the path works: the shortest run that touches all the code."""
        return self.budget == "smoke"

    @property
    def file(self) -> Path:
        return self.folder / EVIDENCE

    def trials(self, name: str, function: Callable[[int], Any], **setting: Any) -> list[Any]:
        """`function(seed)` for each seed, each result saved as it ends; what is known already is not run again.

        The same name and setting in another claim give the same results, so the setting is to hold all that decides the
        value; a `Study` and a `Race` see to that, checksum of the code included. `function` returns plain JSON.
        """
        with progress.bar(name, len(self.seeds)) as advance:
            results = []
            for seed in self.seeds:
                results.append(self.trial(name, partial(function, seed), seed=seed, **setting))
                advance()
        return results

    def trial(self, name: str, function: Callable[[], Any], *, seed: int | None = None, **setting: Any) -> Any:
        """`function()` once, its result saved."""
        setting = {**setting, "set": self.changes} if self.changes else setting
        question = Trial.question(name, seed, f"{self.budget} on {self.device}", plain(setting))
        if (known := self._known.get(question)) is not None:
            self.spared += known.seconds
            return known.value
        start = time.perf_counter()
        value = plain(function())
        trial = Trial(key=question, value=value, seconds=round(time.perf_counter() - start, 3))
        self._known[question] = trial
        self.ledger.trials = [t for t in self.ledger.trials if t.key != question] + [trial]
        self.ledger.write(self.folder / LEDGER)
        return value

    def picture(self, name: str, figure: "Figure", caption: str) -> Picture:
        """Save a matplotlib figure as a PNG beside the evidence; the caption says what is to be seen."""
        file = self.folder / PICTURES / f"{name}.png"
        with whole(file) as place:
            figure.savefig(place, dpi=80, bbox_inches="tight")
        return Picture(file=f"{PICTURES}/{name}.png", caption=caption)

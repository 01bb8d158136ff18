"""One walk: each measurement begins once, rests for its trials, and goes on, whichever way and order they end in."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from provenn import catalog
from provenn.catalog import Card, Experiment
from provenn.evidence import Measurement, Run
from provenn.evidence.experiment import Measure
from provenn.evidence.record import LEDGER, Ledger
from provenn.evidence.run import run_to_end
from provenn.experiments import reproduce as reproducing
from provenn.experiments.side_by_side import measure_all, measurement_of
from provenn.experiments.workers import Job, Outcome, Workers


class Later(Workers):
    """Runs trials in this process once somebody waits for them, those that were asked for last first.

    Args:
        seconds: that each trial lets the others wait; it says that it took one.
    """

    def __init__(self, seconds: float = 0.0):
        super().__init__(threads=1)
        self.functions: dict[str, Callable[[], Any]] = {}
        self.seconds = seconds

    def ask(self, run: Run, key: str, function: Callable[[], Any], alone: bool) -> None:
        self.functions[key] = function
        if alone:
            self.clocks.append(Job(run, key, b""))
        else:
            self.running[key] = Job(run, key, b"")

    def begin(self, job: Job) -> str:
        raise NotImplementedError

    def begin_alone(self, jobs: list[Job]) -> list[Job]:
        self.running |= {job.key: job for job in jobs[:1]}
        return jobs[1:]

    def ended(self, patience: float) -> list[str]:
        return list(self.running)[-1:] if patience else []

    def outcome(self, handle: str, job: Job) -> Outcome:
        time.sleep(self.seconds)
        try:
            return Outcome(value=self.functions[handle](), seconds=1.0)
        except Exception as error:
            return Outcome(error=error)


@dataclass
class Works:
    """A paper with a function for each experiment, and seeds of their own for some of them."""

    run: Run
    functions: dict[str, Measure]
    seeds: dict[str, tuple[int, ...]] = field(default_factory=dict)
    card: Card = field(default_factory=lambda: catalog.card("eca_net"))

    @property
    def wanted(self) -> list[Experiment]:
        return [Experiment(id=name, kind="quality", says="It is.", expects={"above": 0.0}) for name in self.functions]

    async def measure(self, experiment: Experiment) -> tuple[str, Measurement]:
        run = self.run.of_experiment(seeds=self.seeds.get(experiment.id, self.run.seeds))
        return experiment.id, await measurement_of(self.functions[experiment.id], run)


def measured(
    folder: Path, functions: dict[str, Measure], later: Later | None, seeds: Any = None, **options: Any
) -> tuple[Run, dict[str, Measurement]]:
    run = Run("p", folder, seeds=(5, 3, 4), elsewhere=later, **options)
    found: list[tuple[str, Measurement]] = []
    measure_all([Works(run, functions, seeds or {})], later, found.append)
    return run, dict(found)


def trials_of(run: Run) -> dict[str, Any]:
    return {trial.key: trial.value for trial in Ledger.read(run.folder / LEDGER).trials}


def test_a_function_is_entered_once_and_gets_its_values_in_the_order_of_its_seeds(tmp_path):
    entered: list[str] = []

    async def two_stages(run: Run) -> Measurement:
        entered.append("two_stages")
        gate, plain = await run.together([run.trials("gate", lambda seed: seed / 7), run.trials("plain", float)])
        best = await run.trial("at the best", lambda: max(gate))  # of a second stage
        return Measurement.paired(gate, [best - value for value in plain], seeds=run.seeds)

    async def alone(run: Run) -> Measurement:
        entered.append("alone")
        return Measurement.mean(await run.trials("gate", lambda seed: seed / 7), seeds=run.seeds)

    def nothing(run: Run) -> Measurement:
        entered.append("nothing")
        return Measurement.exact(4)

    functions: dict[str, Measure] = {"two_stages": two_stages, "alone": alone, "nothing": nothing}
    seeds = {"alone": (3, 4)}
    here, expected = measured(tmp_path / "here", functions, None, seeds)
    assert entered == ["two_stages", "alone", "nothing"]
    there, found = measured(tmp_path / "there", functions, Later(), seeds)
    assert entered == 2 * ["two_stages", "alone", "nothing"]
    assert found == expected and list(found) == ["nothing", "alone", "two_stages"]  # as each is there
    assert found["two_stages"].seeds == [5, 3, 4] and found["alone"].seeds == [3, 4], "each has a run of its own"
    assert trials_of(there) == trials_of(here) and len(trials_of(here)) == 7


def test_what_was_measured_elsewhere_is_taken_up_again(tmp_path):
    calls: list[int] = []

    async def function(run: Run) -> Measurement:
        return Measurement.mean(await run.trials("a", lambda seed: calls.append(seed) or float(seed)), seeds=run.seeds)

    class Killed(Later):
        def wait(self) -> None:
            if len(calls) == 2:
                raise KeyboardInterrupt
            super().wait()

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, {"all": function}, Killed())
    assert calls == [4, 3]
    ledger = Ledger.read(tmp_path / "p" / LEDGER)
    _, found = measured(tmp_path, {"all": function}, Later(), ledger=ledger, reuse=True)
    assert calls == [4, 3, 5] and found["all"].values == [5.0, 3.0, 4.0]


def test_a_stage_begins_when_its_own_needs_have_ended(tmp_path):
    """The last variant's seeds do not wait until the first has chosen its rate."""
    calls: list[str] = []

    async def variant(run: Run, name: str) -> float:
        rate = await run.trial(f"{name} tuning", lambda: calls.append(f"{name} tuning") or 2.0)
        return await run.trial(f"{name} training", lambda: calls.append(f"{name} training") or rate)

    async def both(run: Run) -> Measurement:
        values = await run.together(variant(run, name) for name in ("first", "last"))
        return Measurement.exact(sum(values))

    _, found = measured(tmp_path, {"both": both}, Later())
    assert found["both"].value == 4.0
    assert calls == ["last tuning", "last training", "first tuning", "first training"]


def fails(words: str) -> Callable[[], Any]:
    def trial() -> Any:
        raise ValueError(words)

    return trial


@pytest.mark.parametrize("elsewhere", [False, True])
def test_of_several_errors_the_first_in_order_is_raised(tmp_path, elsewhere):
    said: list[str] = []
    begun: list[str] = []

    async def function(run: Run) -> Measurement:
        good = run.trial("good", lambda: begun.append("good") or 1.0)
        bad = [run.trial(words, fails(words)) for words in ("no data", "no memory")]
        late = run.trial("late", lambda: begun.append("late") or 1.0)
        try:
            await run.together([good, *bad, late])
        except ValueError as error:
            said.append(str(error))
        assert run.broken
        return Measurement.exact(1)

    measured(tmp_path, {"one": function}, Later() if elsewhere else None)
    assert said == ["no data"]
    assert begun == (["late", "good"] if elsewhere else ["good"]), "here nothing begins after what fails"


class Early(Later):
    """Ends trials as soon as it is asked, so that nobody has to wait but for clocks."""

    def ended(self, patience: float) -> list[str]:
        return list(self.running)[-1:]

    def wait(self) -> None:
        assert not self.running, "who can go on was kept waiting"
        super().wait()


@pytest.mark.parametrize("kind", [Later, Early])
def test_a_clock_runs_when_nothing_else_can_go_on(tmp_path, kind):
    order: list[str] = []

    async def clock(run: Run) -> Measurement:
        return Measurement.exact(await run.trial("clock", lambda: order.append("clock") or 1.0, alone=True))

    async def stages(run: Run) -> Measurement:
        for name in ("first", "second", "third"):
            await run.trial(name, lambda name=name: order.append(name) or 1.0)
        return Measurement.exact(1)

    measured(tmp_path, {"clock": clock, "stages": stages}, kind())
    assert order == ["first", "second", "third", "clock"]


def test_random_numbers_go_on_where_they_rested(tmp_path):
    """What other experiments draw is nothing to them, and the caller's numbers stay as they were."""

    async def drawing(run: Run) -> Measurement:
        values = []
        for stage in ("a", "b", "c"):
            values.append(torch.rand(1).item())
            await run.trial(stage, lambda: 1.0)
        return Measurement.mean(values, seeds=range(3))

    def other(run: Run) -> Measurement:
        return Measurement.exact(torch.rand(1).item())

    torch.manual_seed(5)
    state = torch.get_rng_state()
    drawn = torch.rand(3).tolist()
    for later in (None, Later()):
        torch.set_rng_state(state)
        _, found = measured(tmp_path / str(later is None), {"drawing": drawing, "other": other}, later)
        assert found["drawing"].values == drawn and found["other"].value == drawn[0]
        assert torch.equal(torch.get_rng_state(), state)


def test_a_record_counts_what_its_trials_took_and_not_what_it_waited(tmp_path):
    async def function(run: Run) -> Measurement:
        return Measurement.mean(await run.trials("a", float), seeds=run.seeds)

    experiment = Experiment(id="one", kind="quality", says="It is.", expects={"above": 0.0})
    later = Later(seconds=0.4)
    run = Run("p", tmp_path, seeds=(0, 1), elsewhere=later)
    measuring = reproducing._measure(run, lambda: function, experiment)
    with pytest.raises(StopIteration) as ended:
        while True:
            measuring.send(None)
            later.wait()
    assert 2.0 <= ended.value.value.wall_seconds < 2.0 + 0.4  # two trials of a second each, as `Later` says


def test_a_trial_elsewhere_cannot_be_run_to_its_end_here(tmp_path):
    with pytest.raises(RuntimeError, match="runs elsewhere"):
        run_to_end(Run("p", tmp_path, elsewhere=Later()).trial("a", lambda: 1.0))

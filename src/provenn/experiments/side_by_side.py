"""Measures the experiments of several papers, with the trials of all of them side by side where there are workers.

There is one walk. Each measurement is a coroutine that begins once, asks for the trials that it needs, and rests until
they have ended. It then reads their values and asks for what these make it need. In the end it writes its record. Where
there are no workers, a trial that is asked for runs at once, and nothing rests.
"""

import time
import types
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from provenn.catalog import Card, Experiment
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.evidence.experiment import Measure
from provenn.evidence.measurement import Measurement
from provenn.evidence.run import Run
from provenn.experiments import workers

MOST_JOBS = 4096  # processes of one machine
T = TypeVar("T", covariant=True)
R = TypeVar("R")


@runtime_checkable
class Work(Protocol[T]):
    """A paper whose experiments are measured."""

    @property
    def card(self) -> Card: ...

    @property
    def wanted(self) -> list[Experiment]: ...

    @property
    def run(self) -> Run: ...

    async def measure(self, experiment: Experiment) -> T: ...


def check_jobs(jobs: int, cluster: str | None) -> None:
    """Raises: UserError: no processes, too many, or processes and a cluster."""
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    if jobs > MOST_JOBS:
        raise UserError(f"--jobs must be at most {MOST_JOBS:,}, got {jobs}")
    if jobs > 1 and cluster is not None:
        raise UserError(f"give --jobs {jobs} or --cluster {cluster}, not both: a cluster counts its machines' CPUs")


@contextmanager
def where_trials_run(
    jobs: int, cluster: str | None, cards: Sequence[Card], device: str, log: Callable[[str], None]
) -> Iterator[workers.Workers | None]:
    """Processes of this machine, or machines of a cluster; None where trials run in this process."""
    check_jobs(jobs, cluster)
    if cluster is not None:
        packages = {"provenn", *(card.package.partition(".")[0] for card in cards)}
        with workers.cluster(cluster, packages=sorted(packages), device=device, log=log) as machines:
            yield machines
    elif jobs > 1:
        with workers.processes(jobs) as machines:
            yield machines
    else:
        yield None


def measure_all(works: Sequence[Work[T]], machines: workers.Workers | None, done: Callable[[T], None]) -> None:
    """Measure every experiment, each as far as it comes, and on from there as the trials that it awaits end."""
    ready: Iterable[_Measuring[T]]
    ready = (_Measuring(work, experiment, work.measure(experiment)) for work in works for experiment in work.wanted)
    resting: list[_Measuring[T]] = []
    with ExitStack() as bars:
        advance = {w.card.slug: bars.enter_context(progress.bar(w.card.slug, len(w.wanted))) for w in works}
        while True:
            for one in ready:
                slug = one.work.card.slug
                advance[slug](0, f"{slug}: {one.experiment.id}")
                try:
                    one.needs = one.coroutine.send(None)
                    resting.append(one)
                except StopIteration as ended:
                    done(ended.value)
                    advance[slug]()
                if machines is not None:
                    machines.keep_ended()
            ready = [one for one in resting if not one.needs <= one.work.run.pending]
            resting = [one for one in resting if one.needs <= one.work.run.pending]
            if machines is not None and resting and not ready:
                machines.wait()
            elif not ready:
                return


@dataclass
class _Measuring(Generic[R]):
    """An experiment whose measurement has begun."""

    work: "Work[R]"
    experiment: Experiment
    coroutine: Coroutine[Any, Any, R]
    needs: set[str] = field(default_factory=set)  # the trials of which one has to end before it can go on


@types.coroutine
def measurement_of(measure: Measure, run: Run) -> Generator[set[str], None, Measurement]:
    """What a measuring function gives.

    It draws random numbers as if nobody else drew any: the caller's are as they were wherever it rests or ends, and its
    own go on where it rested.
    """
    import torch

    devices = [run.device] if run.device.startswith("cuda") else []
    coroutine, numbers = _awaited(measure, run), None
    while True:
        with torch.random.fork_rng(devices=devices):
            if numbers is not None:
                torch.set_rng_state(numbers)  # of a GPU only trials draw any
            try:
                keys = coroutine.send(None)
            except StopIteration as ended:
                return ended.value
            numbers = torch.get_rng_state()
        start = time.perf_counter()
        yield keys
        run.waited += time.perf_counter() - start


async def _awaited(measure: Measure, run: Run) -> Measurement:
    outcome = measure(run)
    return await outcome if isinstance(outcome, Coroutine) else outcome

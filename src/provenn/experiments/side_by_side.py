"""Measures the experiments of several papers, with the trials of all of them side by side where there are workers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol, TypeVar, runtime_checkable

from provenn.catalog import Card, Experiment
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.evidence.run import Run, Waiting
from provenn.experiments import workers

MOST_JOBS = 4096  # processes of one machine
T = TypeVar("T", covariant=True)


@runtime_checkable
class Work(Protocol[T]):
    """A paper whose experiments are measured.

    `measure` raises `Waiting` for trials that run elsewhere, and is called again when these have ended.
    """

    @property
    def card(self) -> Card: ...

    @property
    def wanted(self) -> list[Experiment]: ...

    @property
    def run(self) -> Run: ...

    def measure(self, experiment: Experiment) -> T: ...


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
    """Measure every experiment, coming back to those that wait for trials once these have ended."""
    ready = [(work, experiment) for work in works for experiment in work.wanted]
    waiting: list[tuple[Work[T], Experiment, set[str]]] = []
    with ExitStack() as bars:
        advance = {w.card.slug: bars.enter_context(progress.bar(w.card.slug, len(w.wanted))) for w in works}
        while ready or waiting:
            for work, experiment in ready:
                try:
                    advance[work.card.slug](0, f"{work.card.slug}: {experiment.id}")
                    done(work.measure(experiment))
                    advance[work.card.slug]()
                except Waiting as wait:
                    waiting.append((work, experiment, wait.keys))
                if machines is not None:
                    machines.keep_ended()
            if waiting and machines is not None:
                machines.wait()
            ready = [(work, experiment) for work, experiment, needs in waiting if not needs & work.run.pending]
            waiting = [entry for entry in waiting if entry[2] & entry[0].run.pending]

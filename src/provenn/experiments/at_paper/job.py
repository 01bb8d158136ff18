"""What all ways to measure at the paper's scale share: the job, what decides its value, and names of options."""

import hashlib
import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from provenn.catalog import AtPaper, Card, Experiment
from provenn.core.digest import digest
from provenn.core.errors import UserError
from provenn.evidence.run import Run
from provenn.experiments.at_paper.options import TrainingOptions
from provenn.tasks import Task, get_task
from provenn.training import fit
from provenn.training import weights as files

TRAININGS = "trainings"  # the folder of those that have not ended


@dataclass(frozen=True)
class Job:
    """An experiment whose data and weights are here.

    Args:
        run: at the budget paper.
        card, experiment: of the paper.
        how: its `at_paper`, with what was overridden.
        where: the data sets, by name.
        training: how what is trained runs.
    """

    run: Run
    card: Card
    experiment: Experiment
    how: AtPaper
    where: Mapping[str, Path]
    training: TrainingOptions = field(default_factory=TrainingOptions)

    @property
    def task(self) -> Task:
        """The task of the preset."""
        return get_task(self.card.task_of(self.card.preset(self.how.preset)))

    @property
    def scale(self) -> float:
        """What a share is multiplied by, where figures are published in per cent."""
        published = self.experiment.published
        return 100.0 if published is not None and published.unit.startswith("%") else 1.0


@contextmanager
def folder_of_training(run: Run, *names: str) -> Iterator[Path]:
    """Where a training keeps its checkpoints until it has ended, so that one that was killed goes on."""
    folder = run.folder / TRAININGS / checksum(*names)
    if not run.reuse:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def setting_of(job: Job, *others: Path, **more: str) -> dict[str, Any]:
    """All that decides the value, but for seed, device and versions; `others` are data beside those of the job."""
    return {
        "at_paper": job.how.model_dump(exclude_defaults=True),
        "data": checksum(*(listing(path) for path in dict.fromkeys((*job.where.values(), *others)))),
        "code": digest(job.card.resolve(job.card.preset(job.how.preset).build), job.task, fit, files.read_official),
        **more,
    }


def listing(path: Path) -> str:
    """Names and sizes of a data set's files: to read all of ImageNet would take an hour."""
    every = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return "\n".join(f"{file.relative_to(path.parent)} {file.stat().st_size}" for file in every)


def checksum_of_file(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def checksum(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def check_metric(name: str, metrics: Mapping[str, Any], kind: Task) -> None:
    if name not in metrics:
        there = ", ".join(key for key, value in metrics.items() if not isinstance(value, str))
        raise UserError(f"at_paper asks for {name!r}; {kind.name} measures {there}")


def spoken(name: str, metrics: Mapping[str, Any]) -> str:
    values = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if not isinstance(value, str))
    return f"{name}: {values}"


def changed_name(name: str, overrides: Mapping[str, Any]) -> str:
    """What the baseline is called."""
    return f"{name}, {', '.join(f'{key}={value}' for key, value in overrides.items())}"


def divided(overrides: Mapping[str, Any], reads: Callable, build: Callable | None = None) -> list[dict[str, Any]]:
    """Changes to how data are read and to the system: by the names that `reads` takes, or that `build` does not."""
    takes = inspect.signature(reads).parameters
    open_to_all = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    built = set() if build is None else set(inspect.signature(build).parameters)
    of_data = {name for name in overrides if name in takes or (open_to_all and build is not None and name not in built)}
    return [
        {name: value for name, value in overrides.items() if name in of_data},
        {name: value for name, value in overrides.items() if name not in of_data},
    ]

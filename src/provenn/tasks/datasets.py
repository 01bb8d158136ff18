"""The data sets that the papers name: where each is expected, whether it is there, and what it unlocks.

Each task declares those that it reads in its TOML file, under `[datasets.NAME]`; see `DataSet`.
Nothing is downloaded. A set is looked for where it is said to lie, then in the folders of the environment variable
PROVENN_DATA, by its name. So are the authors' checkpoints, in `weights/SLUG/PRESET.pth` there. Imports no torch.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from provenn import catalog
from provenn.catalog import Card, Experiment
from provenn.core.errors import UserError
from provenn.core.names import meant
from provenn.tasks.discovery import SHARED, task_names
from provenn.tasks.faces import DataSet, face_of

VARIABLE = "PROVENN_DATA"
WEIGHTS = "weights"  # the folder of the authors' checkpoints
ENDINGS = (".safetensors", ".pth", ".pth.tar", ".pt", ".ckpt", ".tar", ".bin")
DataPaths = Mapping[str, str | Path]


@dataclass(frozen=True)
class Found:
    """Where a data set was looked for, and what was there.

    Args:
        name: of the set, or `SLUG:PRESET` of a checkpoint.
        path: where it lies, or would have to lie.
        missing: of what it should hold; all of it where there is no such path.
        needs: what to do about it, where something is missing.
    """

    name: str
    path: Path
    missing: tuple[str, ...] = ()
    needs: str = ""

    @property
    def there(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing


@dataclass(frozen=True)
class Source:
    """Data as a task reads them: a path, or an embedded name, and how it is read."""

    data: str | Path
    options: dict[str, Any]


@cache
def known() -> dict[str, DataSet]:
    """Every data set by name, from the files of all tasks; of a name that two declare, the first task's."""
    sets: dict[str, DataSet] = {}
    for task in task_names():
        try:
            declared = face_of(task).datasets
        except UserError:
            if task in SHARED:
                raise
            continue  # a file of another package costs its own sets alone; `doctor` says what is wrong with it
        for name, entry in declared.items():
            sets.setdefault(name, entry.model_copy(update={"name": name, "task": task if entry.read else None}))
    return sets


def get(name: str) -> DataSet:
    """The data set of that name; `NAME/FILE` is one of its files."""
    plain = name.partition("/")[0]
    if plain not in known():
        raise UserError(f"no data set is called {plain!r}{meant(plain, known())}; `provenn data` lists them")
    return known()[plain]


def given_paths(texts: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` as given on the command line.

    Raises:
        UserError: another form, an unknown name, or no such path.
    """
    paths: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise UserError(f"--data takes NAME=PATH, such as set5=photos/Set5, got {text!r}")
        if ":" in name:
            slug, _, preset = name.partition(":")
            card = catalog.card(slug)
            named = {
                experiment.at_paper.checkpoint for experiment in card.experiments if experiment.at_paper is not None
            }
            name = f"{card.slug}:{preset if preset in named else card.preset(preset).name}"
        else:
            get(name)
        if not Path(path).exists():
            raise UserError(f"--data {name}: nothing at {path}")
        paths[name] = Path(path)
    return paths


def roots() -> list[Path]:
    """The folders of PROVENN_DATA, which are separated as those of PATH are."""
    return [Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]


def find(name: str, paths: DataPaths | None = None) -> Found:
    """Where a data set lies: said outright, or below the folders of PROVENN_DATA; `NAME/FILE` is one of its files."""
    entry, member = get(name), name.partition("/")[2]
    said = (paths or {}).get(entry.name)
    candidates = [Path(said)] if said is not None else list(_below_roots(entry))
    expected = Path(said) if said is not None else (roots() or [Path(f"${VARIABLE}")])[0] / entry.name
    checked = [Found(name, path, _missing(path, entry, member)) for path in candidates]
    best = min(checked, key=lambda candidate: len(candidate.missing), default=Found(name, expected, ("everything",)))
    if not best.there:
        lacking = "" if best.missing == ("everything",) else f" lacks {', '.join(best.missing)};"
        needs = (
            f"{entry.title} at {best.path}:{lacking} expected {entry.layout} (--data {entry.name}=PATH, or {VARIABLE})"
        )
        return Found(name, best.path, best.missing, needs)
    inside = next((best.path / sub for sub in entry.inside if (best.path / sub).is_dir()), best.path)
    return Found(name, inside / member if member else inside)


def in_layout_of(task: str, path: Path) -> str | None:
    """The known data set of a task whose layout a folder has, by its name; None of another folder."""
    sets = face_of(task).datasets.items()
    return next((name for name, entry in sets if path.is_dir() and not _missing(path, entry, "")), None)


def _below_roots(entry: DataSet) -> Iterator[Path]:
    for root in roots():
        yield from (root / name for name in (entry.name, *entry.also) if (root / name).is_dir())


def _missing(path: Path, entry: DataSet, member: str) -> tuple[str, ...]:
    if not path.exists():
        return ("everything",)
    wanted = [member] if member else entry.holds
    return tuple(pattern for pattern in wanted if next(path.glob(pattern), None) is None)


def find_weights(card: Card, preset: str, paths: DataPaths | None = None) -> Found:
    """Where the authors' checkpoint of a preset lies: `--data SLUG:PRESET=FILE`, or below PROVENN_DATA.

    Of a pretrained model that is converted, its folder: `--data SLUG:HOST=FOLDER`.
    """
    name = f"{card.slug}:{preset}"
    said = (paths or {}).get(name)
    folders = [root / WEIGHTS / card.slug for root in roots()]
    host = any(
        experiment.at_paper is not None and experiment.at_paper.host == preset for experiment in card.experiments
    )
    expected = (folders or [Path(f"${VARIABLE}") / WEIGHTS / card.slug])[0] / (preset if host else f"{preset}.pth")
    if said is not None:
        candidates = [Path(said)]
    else:
        candidates = [folder / f"{preset}{ending}" for folder in folders for ending in (("",) if host else ENDINGS)]
    path = next((file for file in candidates if (file.is_dir() if host else file.is_file())), None)
    if path is not None:
        return Found(name, path)
    whose, kind = ("the folder of the pretrained model", "FOLDER") if host else ("the authors' weights of", "FILE")
    needs = f"{whose} {preset} at {expected} (--data {name}={kind}, or {VARIABLE})"
    return Found(name, expected, ("everything",), needs)


def resolve(data: str | Path, paths: DataPaths | None = None) -> Source:
    """What a user calls data: a path or an embedded name as it is, a known set's name as the path where it lies.

    `NAME=PATH` says where a known set lies.

    Raises:
        UserError: a known set that is not there, with where it is expected and what it looks like.
    """
    text = str(data)
    name, equals, path = text.partition("=")
    if isinstance(data, Path) or name.partition("/")[0] not in known() or (not equals and Path(text).exists()):
        return Source(data, {})
    located = find(name, {**(paths or {}), **({get(name).name: path} if equals else {})})
    if not located.there:
        raise UserError(f"no {name}: needs {located.needs}")
    return Source(located.path, get(name).options_of(name.partition("/")[2]))


def unlocked_by(name: str) -> list[tuple[Card, Experiment]]:
    """The experiments that are measured on a data set, or with a checkpoint, at the budget paper."""
    return [
        (card, experiment)
        for card in catalog.cards().values()
        for experiment in card.experiments
        if experiment.at_paper is not None and name in needed_by(card, experiment)
    ]


def needed_by(card: Card, experiment: Experiment) -> list[str]:
    """Names of the sets, and of the checkpoint, that an experiment needs at the budget paper."""
    if experiment.at_paper is None:
        return []
    how = experiment.at_paper
    names = [data.partition("/")[0] for data in (*how.sets, *how.tests)]
    weights = [f"{card.slug}:{how.checkpoint}"] if how.checkpoint else []
    return list(dict.fromkeys([*names, *weights]))


def checkpoints() -> list[str]:
    """Every checkpoint of authors that some experiment is measured with, as `SLUG:PRESET`."""
    named = (
        name
        for card in catalog.cards().values()
        for experiment in card.experiments
        for name in needed_by(card, experiment)
    )
    return list(dict.fromkeys(name for name in named if ":" in name))

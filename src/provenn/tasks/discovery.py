"""Finds tasks by name: the shared ones, a paper's own, and those that another package brings by an entry point."""

import importlib
import importlib.util
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from provenn import catalog
from provenn.core.digest import looks_up
from provenn.core.errors import UserError
from provenn.core.names import in_a_line, meant

if TYPE_CHECKING:
    from provenn.tasks.base import Task

ENTRY_POINT_GROUP = "provenn.tasks"
# A module of this folder holds a task where a TOML file of the same name lies beside it, which has the task's faces.
SHARED = tuple(sorted(file.stem.replace("_", "-") for file in Path(__file__).parent.glob("*.toml")))
ATTRIBUTES = ("name", "metric", "higher_is_better", "embedded", "reads")


def task_names() -> list[str]:
    """Every task that papers or packages name, the shared ones first; none is imported."""
    return [*SHARED, *_bringers()]


@looks_up(task_names)
def get_task(name: str) -> "Task":
    """The task of that name, such as `image-classification`.

    First come the shared tasks, then the `TASK` in the `task.py` of a paper whose `paper.toml` names it. Last comes
    what an entry point of the group `provenn.tasks` calls so: an object, or a module that holds one as `TASK`.

    Raises:
        UserError: no such task, one that cannot be used, or several of this name.
    """
    if name in SHARED:
        return importlib.import_module(f"provenn.tasks.{name.replace('-', '_')}").TASK
    bringers = _bringers().get(name, [])
    if not bringers:
        known = task_names()
        raise UserError(f"no task is called {name!r}{meant(name, known)}; there are: {', '.join(known)}")
    usable: dict[str, Task] = {}
    troubles: list[UserError] = []
    for bringer in bringers:
        source = f"task.py of {bringer.slug}" if isinstance(bringer, catalog.Card) else f"entry point {bringer.value}"
        try:
            usable[source] = _load(bringer, name, source)
        except UserError as error:
            troubles.append(error)
    if not usable:
        raise troubles[0]
    if len({id(task) for task in usable.values()}) > 1:
        raise UserError(f"several tasks are called {name!r}: {', '.join(usable)}; one of them needs another name")
    return next(iter(usable.values()))


def sources_of(name: str) -> Iterator[tuple[str, Path]]:
    """Modules that hold the task of that name, and for each the place of its faces; no task is imported."""
    if name in SHARED:
        module = name.replace("-", "_")
        yield f"{__package__}.{module}", Path(__file__).with_name(f"{module}.toml")
    for bringer in _bringers().get(name, []):
        if isinstance(bringer, catalog.Card):
            yield f"{bringer.package}.task", bringer.folder / "task.toml"
            continue
        try:
            found = importlib.util.find_spec(bringer.module)
        except (Exception, SystemExit):  # parents are imported, which are somebody else's; `get_task` reports it
            continue
        if found is not None and found.origin is not None:
            yield bringer.module, Path(found.origin).with_suffix(".toml")


def shadowed() -> dict[str, str]:
    """Tasks of other packages that are left out since one of this package's has their name, by source; and why."""
    owners = _owners()
    sources = [(entry.name, entry.value) for entry in entry_points(group=ENTRY_POINT_GROUP)]
    sources += [(n, f"{c.package}.task") for c in _with_tasks() if not c.built_in for n in c.tasks if n in owners]
    whose = {name: f"a task of {slug}" for name, slug in owners.items()} | dict.fromkeys(SHARED, "a shared task")
    return {f"{name} ({value})": f"left out: {whose[name]} has this name" for name, value in sources if name in whose}


def _with_tasks() -> list[catalog.Card]:
    return [card for card in catalog.cards().values() if card.has("task")]


def _owners() -> dict[str, str]:
    """The tasks that this package's own papers bring, and whose they are: no other package takes their names."""
    return {name: card.slug for card in _with_tasks() if card.built_in for name in card.tasks if name not in SHARED}


def _bringers() -> dict[str, list[catalog.Card | EntryPoint]]:
    """Who may bring a task, by its name: nobody a shared one, and no other package one of a paper's of ours."""
    owners = _owners()
    bringers: dict[str, list[catalog.Card | EntryPoint]] = {}
    for card in _with_tasks():
        for name in card.tasks:
            if card.built_in or name not in owners:
                bringers.setdefault(name, []).append(card)
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: (entry.name, entry.value)):
        if entry.name not in owners:
            bringers.setdefault(entry.name, []).append(entry)
    return {name: brought_by for name, brought_by in bringers.items() if name not in SHARED}


def _load(bringer: catalog.Card | EntryPoint, name: str, source: str) -> "Task":
    from provenn.tasks.base import Task

    if isinstance(bringer, catalog.Card):
        task = bringer.resolve("task:TASK")
    else:
        try:
            task = bringer.load()
        except (Exception, SystemExit) as error:
            raise UserError(f"the task {name!r}: {source} cannot be imported: {in_a_line(error)}") from error
        task = getattr(task, "TASK", task)
    if not isinstance(task, Task):
        raise UserError(f"{source}: a task is an object of a subclass of provenn.tasks.Task, got {task!r}")
    missing = [attribute for attribute in ATTRIBUTES if not hasattr(task, attribute)]
    if missing:
        raise UserError(f"{source}: the task {name!r} does not say its {', '.join(missing)}")
    if task.name != name:
        raise UserError(f"{source}: its task is called {task.name!r}, and {name!r} was asked for")
    return task

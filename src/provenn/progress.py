"""Progress bars on stderr, none when it is not a terminal.

One display is shared by whoever is working: bars of claims, seeds and epochs stack below each other.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_display: Any = None


@contextmanager
def shown() -> Iterator[None]:
    """Show the bars of everything that runs inside, where stderr is a terminal."""
    global _display
    if _display is not None or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    _display = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    try:
        with _display:
            yield
    finally:
        _display = None


@contextmanager
def bar(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar of `total` steps; yields `advance(steps=1, description=None)`."""
    if _display is None:
        yield lambda steps=1, description=None: None
        return
    display, task = _display, _display.add_task(description, total=total)

    def advance(steps: int = 1, description: str | None = None) -> None:
        display.update(task, advance=steps, description=description)

    try:
        yield advance
    finally:
        display.remove_task(task)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(description, total) as advance:
        for item in items:
            yield item
            advance()

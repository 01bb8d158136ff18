"""Progress on stderr: bars on a terminal, and elsewhere (a log file) a line now and then.

One display is shared by whoever is working: bars of experiments, seeds and epochs stack below each other.
"""

import logging
import os
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
EVERY = 30.0  # seconds between two lines of a log
_display: Any = None
_log: float | None = None  # when the log got its last line, where there is one
_silent = False  # the first of several processes says it all


@contextmanager
def shown() -> Iterator[None]:
    """Show how far everything is that runs inside."""
    global _display, _log, _silent
    if not first_process():
        _silent = True
        yield
        return
    if _display is not None or _log is not None:
        yield
        return
    if not sys.stderr.isatty():
        _log = time.monotonic()
        try:
            yield
        finally:
            _log = None
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

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
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
        yield _lines(description, total)
        return
    display, task = _display, _display.add_task(description, total=total)

    def advance(steps: int = 1, description: str | None = None) -> None:
        display.update(task, advance=steps, description=description)

    try:
        yield advance
    finally:
        display.remove_task(task)


def _lines(description: str, total: int | None) -> Callable[..., None]:
    done, of = 0, "" if total is None else f" of {total}"
    began, before, words = time.monotonic(), 0, description

    def advance(steps: int = 1, description: str | None = None) -> None:
        global _log
        nonlocal done, before, words
        words = description or words
        before = steps if done == 0 else before  # of a run that is resumed: no work of ours
        done += steps
        if _log is not None and time.monotonic() - _log >= EVERY:
            _log = time.monotonic()
            left = 0.0 if total is None or done == before else (total - done) * (_log - began) / (done - before)
            time_left = f", {timedelta(seconds=round(left))} left" if left >= 1 else ""
            print(without_controls(f"{words}: {done}{of}{time_left}"), file=sys.stderr, flush=True)

    return advance


@contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Keep warnings, and what these loggers say below an error, from a user who can act on none of it."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def first_process() -> bool:
    """Whether this is the first of the processes that train together, each of which runs the same program."""
    if (rank := os.environ.get("RANK", os.environ.get("SLURM_PROCID"))) is not None:
        return rank == "0"
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return (node, os.environ.get("LOCAL_RANK", "0")) == ("0", "0")


def without_controls(text: str) -> str:
    r"""Text that moves no cursor and colours nothing: names may come from a stranger's files.

    >>> without_controls("a\x1b[31mred\x1b[0m\nb\x07")
    'a\\x1b[31mred\\x1b[0m\nb\\x07'
    """
    text = text.replace("\r\n", "\n")
    return "".join(c if c in "\n\t" or not _commands(c) else repr(c)[1:-1] for c in text)


def _commands(character: str) -> bool:
    """Controls, halves of characters, and what turns the direction of writing."""
    return unicodedata.category(character) in ("Cc", "Cs") or "\u202a" <= character <= "\u202e"


@contextmanager
def unsaid() -> Iterator[None]:
    """Keep back what `say` would print: of data that are read a second time."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def say(message: str) -> None:
    """A line that the user should read, above the bars; who calls from Python and shows none gets it as a warning."""
    message = without_controls(message)
    if _silent:
        return
    if _display is not None:
        _display.console.print(message, markup=False, highlight=False, soft_wrap=True)
    elif _log is not None:
        print(message, file=sys.stderr, flush=True)
    else:
        warnings.warn(message, stacklevel=2)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(description, total) as advance:
        for item in items:
            yield item
            advance()

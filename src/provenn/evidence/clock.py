"""Own measurements of what is the machine's."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def clock(function: F) -> F:
    """Mark a function that measures time or a process's memory: `provenn verify` does not repeat it.

    >>> of_a_machine(clock(lambda: 1.0)), of_a_machine(len)
    (True, False)
    """
    function.of_a_machine = True  # type: ignore[attr-defined]
    return function


def of_a_machine(function: object) -> bool:
    """Whether a measurement is so marked."""
    return getattr(function, "of_a_machine", False)

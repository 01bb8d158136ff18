"""Own measurements of what is the machine's."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def clock(function: F) -> F:
    """Mark a function that measures time or a process's memory: `provenn verify` does not repeat it.

    >>> of_a_machine(clock(print)), of_a_machine(len)
    (True, False)
    """
    CLOCKS.append(function)
    return function


CLOCKS: list[Callable[..., Any]] = []


def of_a_machine(function: object) -> bool:
    """Whether a measurement is so marked."""
    return any(function is one for one in CLOCKS)  # a measurement that is read off a study has no hash

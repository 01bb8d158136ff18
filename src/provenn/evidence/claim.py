"""Ties a function in a paper's `claims.py` to the claim in its `paper.toml`."""

from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def measures(claim: str) -> Callable[[F], F]:
    """Mark a function `(run: Run) -> Measurement` as the one that measures `claim`."""

    def mark(function: F) -> F:
        function.measures = claim  # type: ignore[attr-defined]
        return function

    return mark


def measuring_functions(module: ModuleType) -> dict[str, Callable]:
    """The marked functions of a module by claim, in the order of the file."""
    found: dict[str, Callable] = {}
    for function in vars(module).values():
        claim = getattr(function, "measures", None)
        if not isinstance(claim, str) or function.__module__ != module.__name__:
            continue
        if claim in found:
            raise ValueError(f"{module.__name__}: the claim {claim!r} is measured by two functions")
        found[claim] = function
    return found

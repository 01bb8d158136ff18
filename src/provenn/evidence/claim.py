"""Ties what measures, in a paper's `claims.py`, to the claims in its `paper.toml`."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from provenn.settings import defaults_of

if TYPE_CHECKING:
    from provenn.evidence.measurement import Measurement
    from provenn.evidence.run import Run

Measure = Callable[["Run"], "Measurement"]
F = TypeVar("F", bound=Callable)


def measures(claim: str) -> Callable[[F], F]:
    """Mark a function `(run: Run) -> Measurement` as the one that measures `claim`."""

    def mark(function: F) -> F:
        function.measures = claim  # type: ignore[attr-defined]  # functions take attributes, their type does not say so
        return function

    return mark


def measuring_functions(module: ModuleType) -> dict[str, Measure]:
    """What measures each claim: the module's `CLAIMS`, read off studies and races, and its marked functions."""
    functions: dict[str, Measure] = dict(getattr(module, "CLAIMS", {}))
    for function in vars(module).values():
        claim = getattr(function, "measures", None)
        if not isinstance(claim, str) or getattr(function, "__module__", None) != module.__name__:
            continue
        if claim in functions:
            raise ValueError(f"{module.__name__}: the claim {claim!r} is measured by two functions")
        functions[claim] = function
    return functions


def settable(measure: Measure) -> dict[str, Any]:
    """What `provenn reproduce --set` may change of what measures a claim, by name, and its type.

    Of a function these are its arguments that have a default; a claim that is read off an experiment asks that.
    """
    ask_experiment: Callable[[], dict[str, Any]] | None = getattr(measure, "settable", None)
    return defaults_of(measure) if ask_experiment is None else ask_experiment()


def varied(measure: Measure, changes: dict[str, Any]) -> Measure:
    """The same measurement at another setting."""
    vary_experiment: Callable[..., Measure] | None = getattr(measure, "varied", None)
    return partial(measure, **changes) if vary_experiment is None else vary_experiment(**changes)

"""Ties what measures, in a paper's `experiments.py`, to the experiments in its `paper.toml`."""

from collections.abc import Callable, Coroutine
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from provenn.core.settings import defaults_of

if TYPE_CHECKING:
    from provenn.evidence.measurement import Measurement
    from provenn.evidence.run import Run

# One that asks the run for trials is an `async def`, and awaits them.
Measure = Callable[["Run"], "Measurement | Coroutine[Any, Any, Measurement]"]
F = TypeVar("F", bound=Callable)


def measures(experiment: str) -> Callable[[F], F]:
    """Mark a function `(run: Run) -> Measurement`, `async` or not, as the one that measures `experiment`."""

    def mark(function: F) -> F:
        function.measures = experiment  # type: ignore[attr-defined]  # functions take attributes, their type does not say so
        return function

    return mark


def measuring_functions(module: ModuleType) -> dict[str, Measure]:
    """What measures each experiment: the module's `EXPERIMENTS`, read off studies and timings, and its marked
    functions.
    """
    functions: dict[str, Measure] = dict(getattr(module, "EXPERIMENTS", {}))
    for function in vars(module).values():
        experiment = getattr(function, "measures", None)
        if not isinstance(experiment, str) or getattr(function, "__module__", None) != module.__name__:
            continue
        if experiment in functions:
            raise ValueError(f"{module.__name__}: the experiment {experiment!r} is measured by two functions")
        functions[experiment] = function
    return functions


def parameters_of(measure: Measure) -> dict[str, Any]:
    """What `provenn reproduce --set` may change of what measures an experiment, by name, and its type.

    Of a function these are its arguments that have a default; an experiment that is read off a study or a timing asks
    that.
    """
    listed: Callable[[], dict[str, Any]] | None = getattr(measure, "parameters", None)
    return defaults_of(measure) if listed is None else listed()


def with_overrides(measure: Measure, overrides: dict[str, Any]) -> Measure:
    """The same measurement at another setting."""
    override: Callable[..., Measure] | None = getattr(measure, "with_overrides", None)
    return partial(measure, **overrides) if override is None else override(**overrides)

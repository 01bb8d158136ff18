"""Which of the options that a user sets goes to which function."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from provenn import catalog
from provenn.core.errors import UserError
from provenn.core.names import meant
from provenn.core.settings import arguments_of, typed

if TYPE_CHECKING:
    from pathlib import Path

    from provenn.inference.paper import Paper


def divided(overrides: dict[str, Any], *takers: Callable) -> list[dict[str, Any]]:
    """The overrides that each of the functions takes; one that both take goes to the first, which informs the other."""
    known = [arguments_of(taker, but=("source", "seed")) for taker in takers]
    there = {name: hint for arguments in reversed(known) for name, hint in arguments.items()}
    for name in overrides:
        if name not in there:
            raise UserError(f"nothing here is called {name!r}{meant(name, there)}; {_what_can_be_set(there)}")
    overrides = {name: typed(name, value, there[name]) for name, value in overrides.items()}
    taken: list[dict[str, Any]] = []
    for position, arguments in enumerate(known):
        before = {name for earlier in known[:position] for name in earlier}
        taken.append({name: v for name, v in overrides.items() if name in arguments and name not in before})
    return taken


def _what_can_be_set(there: dict[str, Any]) -> str:
    return f"what can be set: {', '.join(there)} (`provenn show SLUG --preset NAME` has types and defaults)"


def unasked(card: catalog.Card, overrides: dict[str, Any], method: str = "predict") -> list[str]:
    """Names that no prediction of the paper takes: what is left is said of the system."""
    from provenn.tasks import get_task

    takers = [arguments_of(getattr(get_task(name), method), but=()) for name in card.tasks]
    return [name for name in overrides if not any(name in taker for taker in takers)]


def of_system(
    paper: "Paper",
    overrides: dict[str, Any],
    weights: "str | Path | None",
    preset: str | None = None,
    method: str = "predict",
) -> list[str]:
    """Names among the overrides that `Paper.load` takes.

    Ours say themselves what they were trained with, but for options that may be other ones in use (`Preset.at_use`).
    An author's file, and a preset without parameters, leave the rest open.
    """
    from provenn.training import weights as files

    names = unasked(paper.card, overrides, method)
    if paper.is_parameter_free(preset) if weights is None else files.label_of(weights) is None:
        return names
    free = {name for each in paper.card.presets for name in each.at_use}
    return [name for name in names if name in free]

"""What can be set of a training, an evaluation and a prediction: names, types and defaults, for who types them."""

import inspect
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from provenn.catalog import Card
from provenn.core.settings import arguments_of

if TYPE_CHECKING:
    pass

WORDS: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}


@dataclass(frozen=True)
class Option:
    """One option that a user can set.

    Args:
        of: data, system, prediction (all `--set`) or recipe (`--recipe`); what data and system both take, data decide.
        name: as it is typed.
        type: what it takes, in words.
        default: as it is typed, or "" where it follows from the data or there is none.
    """

    of: str
    name: str
    type: str
    default: str = ""


def options_of(card: Card, preset: str | None = None, task: str | None = None) -> list[Option]:
    """All that `train`, `evaluate` and `predict` take by name for a preset.

    Args:
        card: the paper's.
        preset: its name; by default the paper's first.
        task: the kind of work, where it is not the preset's.
    """
    from provenn.tasks import get_task
    from provenn.training.recipes import Recipe, recipe_of

    facts = card.preset(preset)
    name_of_task = task or card.work_of(facts)
    takers: list[tuple[str, Callable, tuple[str, ...], dict[str, Any]]] = []
    system = ("system", card.resolve(facts.build), (), facts.options)
    if name_of_task is None:  # for Python alone
        takers.append(system)
    else:
        kind, recipe = get_task(name_of_task), asdict(recipe_of(facts.recipe))
        takers.append(("data", kind.load, ("source", "seed", "options", "_"), facts.reads))
        takers.append(system)
        takers.append(("prediction", kind.predict, ("model", "meta", "inputs", "output", "log"), {}))
        takers.append(("recipe", Recipe, (), recipe))
    options: dict[str, Option] = {}
    for part, taker, but, known in takers:
        parameters = inspect.signature(taker).parameters
        for name, hint in arguments_of(taker, but=but).items():
            signature_default = parameters[name].default if name in parameters else inspect.Parameter.empty
            value = known.get(name, signature_default)
            default = "" if value is inspect.Parameter.empty else _typed_so(value)
            if name not in options:
                options[name] = Option(part, name, in_words(hint), default)
            elif part == "prediction":
                options[name] = replace(options[name], of=f"{options[name].of}, {part}")
    return list(options.values())


def in_words(hint: Any) -> str:
    """A type as a user would say it.

    >>> in_words(int | None), in_words(Literal["a", "b"]), in_words(tuple[float, float])
    ('whole number', 'a or b', '[number, number]')
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint in WORDS:
        return WORDS[hint]
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        names = [in_words(each) for each in inner if each is not type(None)]
        return " or ".join(dict.fromkeys("number" if float in inner and t == "whole number" else t for t in names))
    if origin in (tuple, list) and inner:
        many = origin is list or inner[-1] is Ellipsis
        return f"[{in_words(inner[0])}, …]" if many else f"[{', '.join(map(in_words, inner))}]"
    return "" if hint is Any else getattr(hint, "__name__", str(hint))


def _typed_so(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_typed_so, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)

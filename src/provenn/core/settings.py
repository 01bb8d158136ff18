"""What `--set KEY=VALUE` may name, and the type that a value must have."""

import inspect
import math
from collections.abc import Callable, Collection
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from provenn.core.errors import UserError

LARGEST = 2**63 - 1  # of the whole numbers that torch and numpy have
SHOWN = 60  # characters of a value that cannot be taken


def arguments_of(taker: Callable, but: Collection[str] = ()) -> dict[str, Any]:
    """What can be set of a function by name, and its type; of `**options: Unpack[D]`, what the dictionary D names.

    Args:
        but: arguments that are not for the user to set.
    """
    whole = getattr(taker, "func", taker)  # a preset may be a `partial` of a larger one
    try:
        hints = get_type_hints(whole.__init__ if isinstance(whole, type) else whole)  # type: ignore[misc]  # of the class, not of an instance
    except (TypeError, NameError):  # an object that can be called, or types that are there for a type checker alone
        hints = {}
    taken: dict[str, Any] = {}
    for parameter in inspect.signature(taker).parameters.values():
        hint = hints.get(parameter.name, Any)
        if parameter.kind is not parameter.VAR_KEYWORD:
            taken[parameter.name] = hint
        elif get_origin(hint) is Unpack:
            taken |= get_type_hints(*get_args(hint))
    return {name: hint for name, hint in taken.items() if name not in but}


def defaults_of(taker: Callable) -> dict[str, Any]:
    """What can be set of a function that goes without: arguments that have a default, and their types."""
    known = arguments_of(taker)
    parameters = inspect.signature(taker).parameters.values()
    return {p.name: known[p.name] for p in parameters if p.name in known and p.default is not p.empty}


class TypedNumber(float):
    """A number as somebody typed it, which an option of text takes as it was typed: of 3.10 the last 0 counts there.

    >>> TypedNumber("3.10"), TypedNumber("3.10").text
    (3.1, '3.10')
    """

    def __new__(cls, text: str) -> "TypedNumber":
        number = super().__new__(cls, text)
        number.text = text  # type: ignore[attr-defined]  # which instances of a subclass take
        return number


def _as_text(value: Any, hint: Any) -> Any:
    """A number where text alone is expected, as it was typed."""
    kinds = {hint, *get_args(hint)}
    if isinstance(value, bool) or not isinstance(value, int | float) or str not in kinds or kinds & {int, float}:
        return float(value) if isinstance(value, TypedNumber) else value
    return getattr(value, "text", str(value))


def typed(name: str, value: Any, hint: Any) -> Any:
    """The value as what is expected there: 24.0 as a whole number, a list as a tuple, 4.2 as text where text is.

    Raises:
        UserError: it is no such value, or a number that is not finite or too long.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    value = _as_text(value, hint)
    if value == "":
        raise UserError(f"{name} is empty: give a value, such as {name}=…")
    try:
        converted = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{name}: {error.errors()[0]['msg']}, got {_shortened(repr(value))}") from None
    check_numbers(name, value, converted)
    return converted


def check_numbers(name: str, value: Any, converted: Any) -> None:
    """Refuse what pydantic takes for a number and nobody means as one, in nested values too.

    Raises:
        UserError: true or false instead of a number; a number that is not finite, or too long for a computer's.
    """
    if isinstance(converted, dict) and isinstance(value, dict):
        value, converted = list(value.values()), list(converted.values())
    if isinstance(converted, list | tuple) and isinstance(value, list | tuple):
        for part, became in zip(value, converted):
            check_numbers(name, part, became)
    if isinstance(converted, bool) or not isinstance(converted, int | float):
        return
    if isinstance(value, bool):
        raise UserError(f"{name} must be a number, got {str(value).lower()}")
    if isinstance(converted, float) and not math.isfinite(converted):
        raise UserError(f"{name} must be a finite number, got {_shortened(repr(value))}")
    if isinstance(converted, int) and not -LARGEST <= converted <= LARGEST:
        raise UserError(f"{name} must be at most {LARGEST} in magnitude, got {_shortened(str(value))}")


def _shortened(words: str) -> str:
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}…, {len(words):,} characters"

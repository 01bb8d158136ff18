"""Values whose types are wider than what they are here: given back as what they are, or refused by name."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None, name: str) -> T:
    """The value, which here is never None.

    >>> present(0, "start")
    0
    """
    if value is None:
        raise ValueError(f"{name} is missing here: got None")
    return value


def of_kind(value: object, kind: type[T], name: str) -> T:
    """The value, which here is always of a class.

    >>> of_kind(True, int, "count")
    True
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of {kind.__name__} here, got {type(value).__name__}")
    return value

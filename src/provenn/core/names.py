"""Names that do not exist, the nearest that do, and errors in a line."""

from collections.abc import Iterable

from provenn.core.errors import UserError


def meant(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist: the nearest that does."""
    import difflib

    close = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def check_options(verb: str, given: Iterable[str], options: type) -> None:
    """Refuse keywords that a function does not take, which are `options`, a typed dictionary.

    Raises:
        UserError: one of them, with the nearest that there is.
    """
    known = list(options.__annotations__)
    for name in given:
        if name not in known:
            raise UserError(f"{verb} has no option {name!r}{meant(name, known)}; it has: {', '.join(known)}")


def in_a_line(error: BaseException) -> str:
    """An error's class and words."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"

"""Who reads a page."""

from dataclasses import dataclass

from fastapi import Request


@dataclass(frozen=True)
class Visitor:
    """Somebody who reads a page.

    Args:
        person: the row of who is signed in; None for anybody.
        csrf: goes with every form; what posts another one is refused.
    """

    person: None = None
    csrf: str = ""


def visitor_of(request: Request) -> Visitor:
    """Who sent a request, by their cookie."""
    return Visitor()

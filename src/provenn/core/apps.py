"""What a unit's own web application is: a function from what was asked to an answer, without any web framework.

A paper that brings one has `app.py` with `create_app(load, home, environment)`. It gives an `App`, which
`provenn web serve --app SLUG` runs in a process of its own. `load` gives the trained model and what prediction needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Asked:
    """A request.

    Args:
        method: GET or POST.
        path: without a query, such as `/people/4`.
        query: of the address.
        form: the fields of a form that are no files.
        files: what was uploaded, by the name of the field; held in memory, and written nowhere.
        cookies: that the browser sent.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    form: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    cookies: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What is sent back.

    Args:
        body: a page, a picture or a file.
        kind: its media type.
        status: of HTTP.
        headers: further ones.
    """

    body: bytes
    kind: str = "text/html; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class App(Protocol):
    """An application."""

    title: str
    path: str  # where a reader begins

    def refuse(self, asked: Asked) -> Answer | None:
        """What is sent back to a reader who is not let in; None for others. Called before a form or file is read."""

    def answer(self, asked: Asked) -> Answer:
        """What is sent back; called from several threads."""


Loaded = tuple[Any, Mapping[str, Any]]  # a model in eval mode, and what its prediction needs
MakeApp = Callable[[Callable[[], Loaded], Path, Mapping[str, str]], App]

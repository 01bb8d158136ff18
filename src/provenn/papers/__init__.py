"""One folder a paper; whoever knows the paper's name knows the room.

Called, it lists them: `provenn.papers()`.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from provenn.inference.paper import Paper


class _Papers(ModuleType):
    """A package that can be called, since `provenn.papers` is both the folder and the question what is in it."""

    def __call__(self) -> "Iterator[Paper]":
        from provenn.inference.paper import papers

        return papers()


sys.modules[__name__].__class__ = _Papers

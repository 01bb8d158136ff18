"""Losses that a layer adds to its task's, such as the balance of a router's load.

A layer says what it would add; whoever trains opens a collection and takes what was said. Outside of one, nothing is
kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_open: list[list[Tensor]] = []


@contextmanager
def collect_auxiliary() -> Iterator[list[Tensor]]:
    """A list of what layers add while the context is open; an inner collection keeps its own.

    >>> import torch
    >>> with collect_auxiliary() as added:
    ...     add_auxiliary(torch.tensor(0.5))
    >>> len(added)
    1
    """
    found: list[Tensor] = []
    _open.append(found)
    try:
        yield found
    finally:
        _open.pop()


def add_auxiliary(loss: Tensor) -> None:
    """Called by a layer in its forward pass, with a scalar that already carries its weight."""
    if _open:
        _open[-1].append(loss)

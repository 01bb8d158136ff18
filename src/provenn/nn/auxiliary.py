"""Losses that a layer adds to its task's, such as the balance of a router's load.

A layer says what it would add; whoever trains opens a collection and takes what was said, as `provenn train` and
`provenn.huggingface.tune` do. In a loop of one's own:

    with collect_auxiliary() as added:
        loss = criterion(model(x), y)
    (loss + torch.stack(added).mean()).backward()

Outside of a collection nothing is kept, and a warning says so.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_collections: list[list[Tensor]] = []


@contextmanager
def collect_auxiliary() -> Iterator[list[Tensor]]:
    """A list of what layers add while the context is open; an inner collection keeps its own.

    >>> import torch
    >>> with collect_auxiliary() as added:
    ...     add_auxiliary(torch.tensor(0.5), "the balance of its router's load", "balance=0")
    >>> len(added)
    1
    """
    losses: list[Tensor] = []
    _collections.append(losses)
    try:
        yield losses
    finally:
        _collections.pop()


def add_auxiliary(loss: Tensor, what: str, off: str) -> None:
    """Called by a layer in its forward pass, with a scalar that already carries its weight.

    Args:
        loss: the scalar.
        what: it is, in a warning's words: "the balance of its router's load".
        off: the argument that turns it off where the layer is built: "balance=0".
    """
    if _collections:
        _collections[-1].append(loss)
    elif loss.requires_grad and not torch.compiler.is_compiling():
        warnings.warn(
            f"a layer adds {what} to the loss while it trains, and nobody takes it: run the model inside `with "
            "provenn.nn.auxiliary.collect_auxiliary() as added:` and add torch.stack(added).mean() to the loss, or "
            f"build the layer with {off}",
            stacklevel=2,
        )

"""What each process holds of a model whose weights are divided, counted before there is a process."""

import math
from typing import NamedTuple

from torch import Tensor, nn


class Held(NamedTuple):
    """Bytes that the first process holds; no other holds more.

    Args:
        weights: its part of them.
        gradients: its part of those of the weights that learn.
        moments: its part of the optimizer's state.
        gathered: all weights, and all gradients before they are divided: a model is gathered whole for each step.
    """

    weights: int
    gradients: int
    moments: int
    gathered: int

    @property
    def most(self) -> int:
        """At once, without activations."""
        return sum(self)


def held_bytes(model: nn.Module, processes: int, *, moments: int = 2) -> Held:
    """What a process holds where FSDP divides a model's weights by rows, ⌈rows / processes⌉ of each.

    Args:
        model: may stand on the meta device.
        processes: that divide it.
        moments: numbers of the optimizer for each weight that learns: 2 of Adam, 1 of SGD with momentum.

    Raises:
        ValueError: no process.

    >>> held_bytes(nn.Linear(4, 6, bias=False), 4)
    Held(weights=32, gradients=32, moments=64, gathered=192)
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    every = list(model.parameters())
    learned = [parameter for parameter in every if parameter.requires_grad]
    gradients = sum(_part(parameter, processes) for parameter in learned)
    whole = sum(parameter.nbytes for parameter in (*every, *learned))
    return Held(sum(_part(parameter, processes) for parameter in every), gradients, moments * gradients, whole)


def _part(parameter: Tensor, processes: int) -> int:
    rows = parameter.shape[0]
    return parameter.nbytes // rows * math.ceil(rows / processes) if rows else 0

"""What each process holds of a model whose weights are divided, counted before there is a process."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from provenn.nn.decoder import Decoder


class Held(NamedTuple):
    """Bytes that the first process holds; no other holds more.

    Args:
        weights: its part of them.
        gradients: its part of those of the weights that learn.
        moments: its part of the optimizer's state.
        gathered: weights that are whole for a while, and their gradients before they are divided: those of two of the
            `blocks`, one at work and the next one, and all that lie in none.
    """

    weights: int
    gradients: int
    moments: int
    gathered: int

    @property
    def most(self) -> int:
        """At once, without activations."""
        return sum(self)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Parts whose weights FSDP gathers for their own turn alone: the blocks of its decoders.

    What lies in none of them is gathered for the whole step.
    """
    return [block for part in model.modules() if isinstance(part, Decoder) for block in part.blocks]


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
    apart = [_whole(block.parameters()) for block in blocks(model)]
    gathered = _whole(every) - sum(apart) + sum(sorted(apart)[-2:])
    return Held(sum(_part(parameter, processes) for parameter in every), gradients, moments * gradients, gathered)


def _whole(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.nbytes * (2 if parameter.requires_grad else 1) for parameter in parameters)


def _part(parameter: Tensor, processes: int) -> int:
    rows = parameter.shape[0]
    return parameter.nbytes // rows * math.ceil(rows / processes) if rows else 0

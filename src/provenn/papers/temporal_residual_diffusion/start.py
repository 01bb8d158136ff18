"""Weights that a training begins with: those of the pre-trained low-frequency module."""

from pathlib import Path

from torch import nn

from provenn.core.errors import UserError
from provenn.core.tensors import read_tensors

SHIPPED = Path(__file__).with_name("weights")


def take_low(low: nn.Module, start: str) -> None:
    """Give the low-frequency module the weights of a file, of a run's folder, or of a preset that ships.

    Raises:
        UserError: there are none, they cannot be read, or are of another network.
    """
    if not start:
        raise UserError(
            "the low-frequency module has not learned anything: train the preset e2vid first, and give its run by "
            "--set low=FOLDER"
        )
    own, state = low.state_dict(), read_tensors(start, SHIPPED, "low")
    other = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if other:
        raise UserError(f"{start} holds another network than the low-frequency module: they differ at {other[0]}")
    low.load_state_dict(state)

"""Weights that a training begins with: those of the pre-trained low-frequency module."""

from pathlib import Path

from torch import nn

from provenn.core.errors import UserError
from provenn.core.inputs import check_file

FILE, SHIPPED = "weights.safetensors", Path(__file__).with_name("weights")


def take_low(low: nn.Module, start: str) -> None:
    """Give the low-frequency module the weights of a file, of a run's folder, or of a preset that ships.

    Raises:
        UserError: there are none, they cannot be read, or are of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not start:
        raise UserError(
            "the low-frequency module has not learned anything: train the preset e2vid first, and give its run by "
            "--set low=FOLDER"
        )
    shipped = SHIPPED / f"{start}.safetensors"
    file = shipped if shipped.is_file() else Path(start)
    file = file / FILE if file.is_dir() else file
    if not file.exists():
        raise UserError(f"no weights at {file}: low takes a .safetensors file or the folder of a run")
    check_file(file)
    try:
        state = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is no safetensors file that can be read: {error}") from None
    own = low.state_dict()
    other = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if other:
        raise UserError(f"{file} holds another network than the low-frequency module: they differ at {other[0]}")
    if broken := [name for name in state if not state[name].isfinite().all()]:
        raise UserError(f"{file}: {broken[0]} holds values that are no finite numbers")
    low.load_state_dict(state)

"""Tensors that a training begins with, from a file of weights."""

from pathlib import Path

from torch import Tensor

from provenn.core.errors import UserError
from provenn.core.inputs import check_file

FILE = "weights.safetensors"  # in the folder of a run


def read_tensors(path: str | Path, shipped: Path, option: str) -> dict[str, Tensor]:
    """The tensors of a weight file that `provenn train` wrote, of the folder of its run, or of a preset that ships.

    Numbers with a point come in single precision.

    Args:
        path: the file, the folder, or the preset.
        shipped: the folder of the paper's own weights.
        option: what the user gave it by, for messages.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    own = shipped / f"{path}.safetensors"
    file = own if own.is_file() else Path(path)
    file = file / FILE if file.is_dir() else file
    if not file.exists():
        raise UserError(f"no weights at {file}: {option} takes a .safetensors file or the folder of a run")
    check_file(file)
    try:
        state = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is no safetensors file that can be read: {error}") from None
    broken = next((name for name, x in state.items() if x.is_floating_point() and not x.isfinite().all()), None)
    if broken is not None:
        raise UserError(f"{file}: {broken} holds values that are no finite numbers")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}

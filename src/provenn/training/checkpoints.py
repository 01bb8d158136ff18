"""Checkpoints that outlive a kill: each is written beside the last, which is kept until the next is whole."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.core.finite import check_type

CHECKPOINT, PREVIOUS = "last.ckpt", "previous.ckpt"


def checkpoint_writer() -> Any:
    """What writes Lightning's checkpoints. Its own writes to the folder for temporary files, and where that is another
    file system the move from there is a copy, which a kill cuts in two.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning.pytorch.plugins.io import TorchCheckpointIO

    class CheckpointWriter(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
            file = Path(path)
            keep = file.with_name(PREVIOUS) if file.name == CHECKPOINT else None
            for stray in file.parent.glob(f".{file.stem}.*.part{file.suffix}"):  # of a run that was killed
                stray.unlink(missing_ok=True)
            with atomic_write(file, keep) as temporary, temporary.open("wb") as handle:
                try:
                    torch.save(checkpoint, handle)
                except RuntimeError as error:  # torch's words for a write that failed
                    raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    return CheckpointWriter()


def best_file(folder: Path, epoch: int) -> Path:
    """Where the model of one of the best epochs lies."""
    return folder / f"best-{epoch}.safetensors"


def clear_best(folder: Path) -> None:
    """Remove the best models of a training that another one replaces."""
    for file in folder.glob("best-*.safetensors"):
        file.unlink(missing_ok=True)


def begun(folder: Path) -> bool:
    """Whether a training has left a checkpoint in the folder."""
    return any((folder / name).exists() for name in (CHECKPOINT, PREVIOUS))


def newest(folder: Path) -> Path | None:
    """The checkpoint to go on from: the last, or the one before where a kill left no whole one.

    Raises:
        UserError: there are checkpoints, and none can be read.
    """
    there = [file for file in (folder / CHECKPOINT, folder / PREVIOUS) if file.exists()]
    readable = next((file for file in there if read(file) is not None), None)
    if there and readable is None:
        raise UserError(f"{there[0]} is damaged: train again without --resume")
    return readable


def read(file: Path) -> dict[str, Any] | None:
    """A checkpoint without the numbers in its tensors; None of what is none."""
    if not file.is_file():  # a FIFO would be waited for
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(file, map_location="meta", weights_only=True)
        return saved if isinstance(saved, dict) and isinstance(saved.get("state_dict"), dict) else None
    except Exception:  # whatever torch makes of damaged bytes
        return None


def check_fits(checkpoint: Path, module: Any, processes: int) -> None:
    """Is this a checkpoint of the module that is to go on from it, trained in the same way?"""
    saved = read(checkpoint) or {"state_dict": {}}
    shapes = {name: getattr(value, "shape", None) for name, value in saved["state_dict"].items()}
    if saved.get("parts", kinds_of_parts(module)) != kinds_of_parts(module) or shapes != {
        name: value.shape for name, value in module.state_dict().items()
    }:
        raise UserError(
            f"{checkpoint} is of another preset or of other data: resume with what it was started with, "
            "or train in another folder"
        )
    for name, value in saved["state_dict"].items():
        check_type(name, value, module.state_dict()[name], str(checkpoint))
    states = [_is_optimizer_state(state) for state in saved.get("optimizer_states") or [None]]
    if not (all(states) and isinstance(saved.get("loops"), dict) and isinstance(saved.get("lr_schedulers"), list)):
        raise UserError(
            f"{checkpoint} is damaged: it lacks the state of the optimizer or of the loop; train again without --resume"
        )
    began, now = saved.get("began", {}), module.began()
    if saved.get("within_epoch"):
        began, now = {**began, "processes": saved["processes"]}, {**now, "processes": processes}
    other = [f"{name} {began[name]!r} (now {now[name]!r})" for name in began if began[name] != now.get(name)]
    if other:
        raise UserError(
            f"{checkpoint} was started with {', '.join(other)}: resume with the same, or train in another folder"
        )


def _is_optimizer_state(state: Any) -> bool:
    """Of one optimizer, or of several joined."""
    if not isinstance(state, dict):
        return False
    parts = state.get("parts")
    return "param_groups" in state or (isinstance(parts, list) and bool(parts) and all(map(_is_optimizer_state, parts)))


def kinds_of_parts(module: nn.Module) -> list[str]:
    """The kinds of a module's parts: two systems may have weights of the same names and shapes."""
    return [type(part).__name__ for part in module.modules()]

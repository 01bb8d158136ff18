"""Weights in files: ours with their preset and task in the metadata, and the authors' own."""

import json
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from provenn.errors import UserError

FILE = "weights.safetensors"
KEY = "provenn"
WRAPPERS = ("state_dict", "model_state_dict", "params_ema", "params", "model", "net", "module", "task")


@dataclass(frozen=True)
class Label:
    """What a weight file says of itself.

    Args:
        paper, preset, task: whose weights they are.
        options: what the preset was built with.
        meta: what prediction needs, such as class names.
        version: the provenn that wrote them.
    """

    paper: str
    preset: str
    task: str
    options: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    version: str = ""


def save(model: nn.Module, file: Path, label: Label) -> None:
    """Write weights and label as safetensors, in one step."""
    import os

    from safetensors.torch import save_model

    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.part")
    save_model(model, str(unfinished), metadata={KEY: json.dumps(asdict(label))})
    os.chmod(unfinished, 0o644)
    os.replace(unfinished, file)


def locate(path: str | Path) -> Path:
    """The weight file at a path: itself, or the one in a run's folder."""
    given = Path(path)
    if given.is_dir():
        inside = given / FILE
        if not inside.exists():
            raise UserError(f"{given} holds no {FILE}: give the folder of a finished `provenn train`, or a weight file")
        return inside
    if not given.exists():
        raise UserError(f"no weights at {given}: give a weight file, or the folder of a finished `provenn train`")
    return given


def read(path: str | Path) -> tuple[dict[str, Tensor], Label | None]:
    """The tensors in a file, and the label where the file has one.

    A `.safetensors` file is read as such; any other as a torch checkpoint with `weights_only=True`, so that no code in
    it runs, and unwrapped to the state dict inside.

    Raises:
        UserError: the file is damaged, no checkpoint, or holds more than tensors.
    """
    file = locate(path)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a file that is refused, or of its age
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if "GLOBAL" in str(error) or _is_pickle(file):
            reason = "it holds objects other than tensors, and loading it could run code"
        else:
            reason = "it is no torch checkpoint, or damaged"
        raise UserError(f"refused {file}: {reason}; give a .safetensors file or a plain state dict") from None
    if isinstance(content, dict) and "pytorch-lightning_version" in content and (file.parent / FILE).exists():
        raise UserError(f"{file} is there to resume a training; its weights are in {file.parent / FILE}")
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"refused {file}: expected a state dict of tensors, got {type(content).__name__}")
    names = list(content)
    shared = "module." if all(name.startswith("module.") for name in names) else ""
    return {name.removeprefix(shared): value for name, value in content.items()}, None


def _is_pickle(file: Path) -> bool:
    with suppress(OSError), file.open("rb") as handle:
        return handle.read(1) == b"\x80"
    return False


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], Label | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as handle:
            label = (handle.metadata() or {}).get(KEY)
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return state, Label(**json.loads(label)) if label else None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no readable safetensors file: {str(error).splitlines()[0]}") from None


def load_into(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict, strictly except for tensors that the model ties to others.

    Raises:
        UserError: names or shapes differ, with the first few of them.
    """
    own = model.state_dict()
    storages = {name: tensor.data_ptr() for name, tensor in own.items()}
    held = {storages[name] for name in state if name in storages}
    missing = [n for n in own if n not in state and (own[n].numel() == 0 or storages[n] not in held)]
    unexpected = [n for n in state if n not in own]
    shapes = [n for n in state if n in own and own[n].shape != state[n].shape]
    if missing or unexpected or shapes:
        problems = []
        if shapes:
            name = shapes[0]
            problems.append(f"{name} is {list(state[name].shape)} where the model has {list(own[name].shape)}")
        problems += [
            f"{what} {', '.join(names[:3])}"
            for what, names in (("lacks", missing), ("has unknown", unexpected))
            if names
        ]
        raise UserError(f"{source} does not fit this model: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)

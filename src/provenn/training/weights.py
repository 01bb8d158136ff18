"""Weights in files: ours with their preset and task in the metadata, and the authors' own."""

import inspect
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from provenn.catalog import Card
from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.core.finite import DAMAGED, check_type, impossible_value
from provenn.core.inputs import check_file, parse_json, read_text
from provenn.nn.folders import CONFIG, PICKLED, WEIGHTS, read_tensors

FILE = "weights.safetensors"
KEY = "provenn"
CONFIGS = ("config", "args", "opt")  # where a trainer notes what the model was built with
HOLDERS = ("easydict.EasyDict", "argparse.Namespace")  # classes of such a config: names and values, nothing else
WRAPPERS = ("state_dict", "model_state_dict", "params_ema", "params", "model", "net", "module", "task")


@dataclass(frozen=True)
class Label:
    """What a weight file says of itself.

    Args:
        paper, preset, task: whose weights they are.
        options: what the preset was built with.
        meta: what prediction needs, such as class names.
        version: the provenn that wrote them.
        trained_on: `data` and their `fingerprint`, the `seed` and `options` with which they were read and split, the
            `recipe`, and the `command` that trains so again.
        metrics: of the test split.
    """

    paper: str
    preset: str
    task: str
    options: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    trained_on: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def label_of(path: str | Path) -> Label | None:
    """The label of a weight file, without its tensors; None where it has none."""
    if is_foreign(path):
        return None
    file = locate(path)
    return _read_safetensors(file, tensors=False)[1] if file.suffix == ".safetensors" else None


class Contents(NamedTuple):
    """What a weight file holds: tensors, our label, and what the authors' trainer noted of the model."""

    state: dict[str, Tensor]
    label: Label | None
    config: dict[str, Any]


def save(model: nn.Module, file: Path, label: Label) -> None:
    """Write weights and label as safetensors, in one step."""
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    with atomic_write(file) as path:
        try:
            save_model(model, str(path), metadata={KEY: json.dumps(asdict(label))})
        except SafetensorError as error:  # which is how it reports a full disk
            raise OSError(str(error)) from None


def locate(path: str | Path) -> Path:
    """The weight file at a path: itself, or the one in a run's folder."""
    location = Path(path)
    if location.is_dir():
        inside = location / FILE
        if not inside.exists():
            raise UserError(
                f"{location} holds no {FILE}: give the folder of a finished `provenn train`, or a weight file"
            )
        check_file(inside)
        return inside
    if not location.exists():
        raise UserError(f"no weights at {location}: give a weight file, or the folder of a finished `provenn train`")
    check_file(location)
    return location


def is_foreign(path: str | Path) -> bool:
    """Whether this is a folder of Hugging Face: it has a config.json, and no training of ours wrote it."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / FILE).exists()


def read_foreign(path: str | Path) -> Contents:
    """What an authors' file or a folder of Hugging Face holds: see `read_contents`.

    Of a folder all shards are read, and its config.json. Of one of its files the config beside it is read too, where
    the file holds none.
    """
    place = Path(path)
    if is_foreign(place):
        return Contents(read_tensors(place), None, _read_config(place / CONFIG))
    contents = read_contents(place)
    if contents.label is None and not contents.config and place.name in (WEIGHTS, PICKLED) and is_foreign(place.parent):
        return contents._replace(config=_read_config(place.parent / CONFIG))
    return contents


def _read_config(file: Path) -> dict[str, Any]:
    values = parse_json(read_text(file), str(file))
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}, expected an object of options")
    return values


def read(path: str | Path) -> tuple[dict[str, Tensor], Label | None]:
    """The tensors in a file, and the label where the file has one; see `read_contents`."""
    return read_contents(path)[:2]


def read_contents(path: str | Path) -> Contents:
    """The tensors in a file, its label, and the config that an authors' trainer put beside them.

    A `.safetensors` file is read as such; any other as a torch checkpoint with `weights_only=True`, so that no code in
    it runs, and unwrapped to the state dict inside. An `EasyDict` or a `Namespace` becomes a plain dictionary: its
    class is neither imported nor called.

    Raises:
        UserError: the file is damaged, no checkpoint, or holds more than tensors and plain values.
    """
    file = locate(path)
    if file.suffix == ".safetensors":
        return Contents(*_read_safetensors(file), {})
    try:
        # An ordered dictionary takes in both what such a class keeps as items and what it keeps as attributes.
        with warnings.catch_warnings(), torch.serialization.safe_globals([(OrderedDict, name) for name in HOLDERS]):
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
    configs = [content[name] for name in CONFIGS if isinstance(content, dict) and isinstance(content.get(name), dict)]
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
        elif isinstance(content, dict) and _are_states(content.get(wrapper)):  # one state dict for each part
            content = {f"{k}.{name}": v for k, part in enumerate(content[wrapper]) for name, v in part.items()}
    if isinstance(content, dict) and len(content) == 1 and isinstance(alone := next(iter(content.values())), dict):
        content = alone  # under a name of its authors' own
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"refused {file}: expected a state dict of tensors, got {type(content).__name__}")
    names = list(content)
    # DistributedDataParallel's prefix.
    shared = "module." if all(name.startswith("module.") for name in names) else ""
    state = {name.removeprefix(shared): value for name, value in content.items()}
    return Contents(state, None, _plain(configs[0]) if configs else {})


def read_official(
    card: Card,
    path: str | Path,
    *,
    preset: str | None = None,
    options: dict[str, Any] | None = None,
    build: Callable[..., nn.Module] | None = None,
) -> tuple[nn.Module, Label]:
    """Our model with the weights of an authors' checkpoint, in eval mode, and what is assumed of it.

    Args:
        card: the paper.
        path: the checkpoint, or a folder of Hugging Face.
        preset, options: what follows from neither its shapes nor its config.
        build: makes a preset of that name with those options; by default the preset's function does.

    Raises:
        UserError: weights of no preset, options that contradict the file, or a file that leaves something open.
    """
    from provenn.tasks import get_task

    options = options or {}
    if not card.has("official"):
        raise UserError(f"{path} carries no provenn label, and {card.slug} has no public checkpoints to compare")
    contents = read_foreign(path)
    convert = card.resolve("official:convert")
    # Of some papers the shapes do not say all: their `convert` asks for what the file and its user know besides.
    takes_config = "config" in inspect.signature(convert).parameters
    arguments = {"config": contents.config, "preset": preset, **options} if takes_config else {}
    name, official_options, converted = convert(contents.state, **arguments)
    if preset not in (None, name):
        raise UserError(f"{path} holds weights of {name}, not of {preset}")
    chosen = card.preset(name)
    built_with = {**official_options, **options}
    model = build(name, **built_with) if build else card.resolve(chosen.build)(**{**chosen.options, **built_with})
    load_into(model, converted, str(path))
    task = card.work_of(chosen)  # none of a part alone, such as a detector's head
    meta = get_task(task).default_meta(built_with) if task else {}
    return model.eval(), Label(card.slug, name, task or "", built_with, meta)


def _plain(value: Any) -> Any:
    """Nested dictionaries without the attributes that an ordered one may carry."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in {**getattr(value, "__dict__", {}), **value}.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _are_states(value: Any) -> bool:
    """Whether this is a list of dictionaries, such as the parts of a system that its trainer saves apart."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(part, dict) for part in value)


def _is_pickle(file: Path) -> bool:
    with suppress(OSError), file.open("rb") as handle:
        return handle.read(1) == b"\x80"
    return False


def _read_safetensors(file: Path, tensors: bool = True) -> tuple[dict[str, Tensor], Label | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as handle:
            label = (handle.metadata() or {}).get(KEY)
            names = handle.keys() if tensors else []
            state = {name: handle.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no readable safetensors file: {str(error).partition(chr(10))[0]}") from None
    return state, _label(label, file) if label else None


def _label(text: str, file: Path) -> Label:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Label).validate_python(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(key) for key in first["loc"]) or "the whole"
        raise UserError(f"{file}: its label cannot be read: {key}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its label is no JSON: {error}") from None


def load_into(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict, strictly except for tensors that the model ties to others.

    Raises:
        UserError: names or shapes differ, with the first few of them; a tensor of another kind of number; or a value
            that is not finite, or no variance.
    """
    model_state = model.state_dict(keep_vars=True)
    # Tied tensors share a storage, and a file may hold either name: one of them loaded is enough.
    storages = {name: tensor.data_ptr() for name, tensor in model_state.items()}
    loaded_storages = {storages[name] for name in state if name in storages}
    missing = [
        n for n in model_state if n not in state and (model_state[n].numel() == 0 or storages[n] not in loaded_storages)
    ]
    unexpected = [n for n in state if n not in model_state]
    shapes = [n for n in state if n in model_state and model_state[n].shape != state[n].shape]
    if missing or unexpected or shapes:
        problems = []
        if shapes:
            name = shapes[0]
            problems.append(f"{name} is {list(state[name].shape)} where the model has {list(model_state[name].shape)}")
        problems += [
            f"{what} {', '.join(names[:3])}"
            for what, names in (("lacks", missing), ("has unknown", unexpected))
            if names
        ]
        raise UserError(f"{source} does not fit this model: {'; '.join(problems)}")
    for name, tensor in state.items():
        expected = model_state[name]
        check_type(name, tensor, expected, source)
        wrong = impossible_value(name, tensor, expected)
        if wrong is not None:
            raise UserError(f"{source}: {wrong}: {DAMAGED}")
    model.load_state_dict(state, strict=False)

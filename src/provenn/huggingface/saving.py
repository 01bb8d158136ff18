"""How a changed model is saved so that nothing loads it as another one, and how `load_model` gives it back.

`provenn.swap` and `provenn.insert_after` note in the config of a Hugging Face model what they did. `save_pretrained`
writes the note with the weights. transformers alone would load such a folder with new random weights in the changed
modules. So the config is written with one entry that it cannot read, which names `load_model`.
"""

import importlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from provenn import surgery
from provenn.core.errors import UserError
from provenn.core.finite import check_type
from provenn.huggingface.families import Host
from provenn.surgery.notes import TRUSTED, readable

STORED, PICKLED = "model*.safetensors", "pytorch_model*.bin"  # of the second, transformers reads where no first one is
# Options of `from_pretrained` that say which files are meant.
WHERE = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")
Values = dict[str, Any]  # what config.json holds


# A factory in JSON, where it is one that can be made again elsewhere.


def restore_factory(description: Values) -> Callable[..., Any]:
    """The factory that `describe_factory` described.

    Raises:
        UserError: it names no layer of this package or of torch.
    """
    if "attention" in description:
        from provenn.huggingface.mixers import as_attention

        mixer = description["attention"]
        factory = mixer if isinstance(mixer, str) else restore_factory(mixer)
        return as_attention(factory, **description["options"])
    module, _, name = str(description.get("class")).partition(":")
    try:
        kind: Any = importlib.import_module(module) if f"{module}.".startswith(TRUSTED) else None
        for part in name.split("."):
            kind = getattr(kind, part)
    except (ImportError, AttributeError, ValueError):
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"the config names {description.get('class')!r}, which is no layer of this version of provenn")
    return partial(kind, **description["arguments"])


# Loading.


def load_model(name: str | Path, *, rebuild: Callable[[Host], object] | None = None, **options: Any) -> PreTrainedModel:
    """A model from a folder or the hub, as it was saved: converted, changed by `swap` and `insert_after`, or neither.

    Weights are those of the files, to the bit.

    Args:
        name: of the folder that `save_pretrained` wrote, or on the hub.
        rebuild: makes the changes to a new model once more, where a function of your own made them.
        options: of transformers' `from_pretrained`, such as `device_map`, `revision` or `subfolder`.

    Raises:
        UserError: nothing there, changes that no file can hold and no `rebuild`, or weights that are not all there.
    """
    where = {option: value for option, value in options.items() if option in WHERE}
    check_folder(name)
    try:
        values, _ = PreTrainedConfig.get_config_dict(str(name), **where)
        if not values:
            raise OSError("it has no config.json, or an empty one")
        config_file = cached_file(str(name), "config.json", **where)
    except Exception as error:  # of a damaged folder, any of a dozen classes of several packages
        raise UserError(f"{name} cannot be loaded as a model: {first_line(error)}") from None
    from provenn.huggingface.conversion import CONVERTED

    kinds = {kind.__name__: kind for kind in CONVERTED.values()}
    architecture = str((values.get("architectures") or ["none"])[0])
    kind = kinds.get(architecture) or getattr(transformers, architecture, None)
    if kind is None or not hasattr(kind, "config_class"):
        raise UserError(f"{name} holds a {architecture}, which is no model of this version of transformers")
    changes = list(_noted_changes(values))
    own = [change for change in changes if change["factory"] is None]
    if own and rebuild is None:
        raise UserError(
            f"{name} was changed by a function of your own at {own[0]['names'][0]}, which no file holds; "
            "call load_model(folder, rebuild=function) with one that makes the changes to a new model"
        )
    remake = rebuild if rebuild is not None and changes else partial(_repeat, changes=changes)
    kept: dict[str, torch.Tensor] = {}
    builder = _builder(kind, remake, kept)
    try:
        config = cast(Host, kind).config_class.from_dict(readable(values))
        model, found = builder.from_pretrained(
            str(name), config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the weights of {name} cannot be loaded: {first_line(error)}") from None
    check_keys(str(name), found)
    if found["unexpected_keys"]:
        raise UserError(_keys_line(str(name), "do not fit: the model lacks", found["unexpected_keys"]))
    folder = Path(cast(str, config_file)).parent
    check_stored_types(model, folder)
    model.__class__ = kind
    for buffer, value in kept.items():
        parent, _, child = buffer.rpartition(".")
        module = model.get_submodule(parent)
        module._buffers[child] = value.to(module._buffers[child].device)
    for file in sorted(folder.glob(STORED)):
        _copy_exactly(model, file)
    return model


def _noted_changes(values: Values) -> Iterator[Values]:
    yield from values.get("provenn_changes") or []
    for value in values.values():
        if isinstance(value, dict):
            yield from _noted_changes(value)


def _builder(kind: Host, remake: Callable[[Host], object], kept: dict[str, torch.Tensor]) -> Host:
    """A class that is built with the changes, so that transformers can load all weights."""

    class Builder(kind):
        def __init__(self, config: Host, *args: Any, **options: Any):
            super().__init__(config, *args, **options)
            dtype = torch.get_default_dtype()
            # Layers are made as `swap` made them, and cast afterwards.
            torch.set_default_dtype(torch.float32)
            try:
                remake(self)
            finally:
                torch.set_default_dtype(dtype)
            # transformers empties what is in no file.
            kept.update((name, buffer.clone()) for name, buffer in self.named_non_persistent_buffers())

        @classmethod
        def get_init_context(cls, *args: Any, **options: Any) -> list[Any]:
            # On no meta device, where buffers that are in no file would be lost.
            return [one for one in super().get_init_context(*args, **options) if not isinstance(one, torch.device)]

    Builder.__name__, Builder.__qualname__, Builder.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Builder


def _repeat(model: nn.Module, changes: Sequence[Values]) -> None:
    """Make noted changes to a new model."""
    for change in changes:
        named = [module for module in model.modules() if type(module).__name__ == change["model"]]
        if not named:
            raise UserError(f"the config notes changes to a {change['model']}, and the model has none")
        factory = restore_factory(change["factory"])
        if change["verb"] == "swap":
            surgery.swap(named[0], change["names"], factory)
        else:
            width = change["width"]
            surgery.insert_after(named[0], change["names"], factory, name=change["child"], width=width)


def _copy_exactly(model: nn.Module, file: Path) -> None:
    """Give parameters and buffers the values and precision of a file, where loading or tying changed them."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with safe_open(file, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118  # no mapping
            tensor = tensors.get(name)
            if tensor is None:
                continue
            value = stored.get_tensor(name).to(tensor.device)
            if value.dtype != tensor.dtype or not torch.equal(value, tensor):
                tensor.data = value


def check_folder(name: str | Path) -> None:
    """Is what is written as a folder there? The hub would be asked for it, and answers in words of its own.

    Raises:
        UserError: it is not.
    """
    words = str(name)
    if (words.count("/") > 1 or words.startswith((".", "~", "/"))) and not Path(words).exists():
        raise UserError(f"{name} cannot be loaded as a model: there is no such folder")
    if Path(words).exists() and not Path(words).is_dir():
        raise UserError(
            f"{name} cannot be loaded as a model: it is no folder; give a model's folder, or a name on the hub"
        )


def check_stored_types(model: nn.Module, folder: Path) -> None:
    """Are the weights in a folder's files numbers that can stand for the model's? transformers casts whatever it finds.

    Raises:
        UserError: some are of whole or complex numbers, or of yes and no, with the name of the first.
    """
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."  # a file of the body alone has names without it
    for file, name, tensor in _stored_types(folder):
        named = (name, prefix + name, name.removeprefix(prefix))
        expected = next((tensors[key] for key in named if key in tensors), None)
        if expected is not None:
            check_type(name, tensor, expected, str(file))


def _stored_types(folder: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """File, name and type of each tensor that transformers reads from a folder; of the numbers as few as can be."""
    files = sorted(folder.glob(STORED))
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # no mapping
                part = stored.get_slice(name)
                yield file, name, part[:0] if part.get_shape() else stored.get_tensor(name)
    for file in [] if files else sorted(folder.glob(PICKLED)):
        for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
            if isinstance(tensor, torch.Tensor):
                yield file, name, tensor


def check_keys(name: str, found: dict[str, Any], *, expected: Sequence[str] = ()) -> None:
    """Are the weights of a checkpoint all there, in the model's sizes?

    Args:
        name: of the checkpoint.
        found: what transformers' `from_pretrained` reports of it.
        expected: parts of names that may be lacking, as a new head's are.

    Raises:
        UserError: some are not.
    """
    lacking = [key for key in found["missing_keys"] if not any(part in key for part in expected)]
    for what, keys in (("lack", lacking), ("have other sizes than its config says for", found["mismatched_keys"])):
        if keys:
            raise UserError(_keys_line(name, what, keys))


def _keys_line(name: str, what: str, keys: Collection[Any]) -> str:
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    return f"the weights of {name} {what} {len(names)} parameters, {names[0]} among them"


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    error = error.__cause__ or error  # a check of a config wraps what it found
    return (str(error).strip() or type(error).__name__).splitlines()[0]

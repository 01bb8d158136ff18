"""Folders of Hugging Face read and written without transformers: config.json, and weights under transformers' names.

Models of `nn` that carry transformers' parameter names need no conversion, so neither need they transformers. Names on
the hub, tokenizers and image processors are left to it: `huggingface_hub.snapshot_download` gives a folder.
"""

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.files import atomic_write, write_atomically
from provenn.core.finite import DAMAGED, check_type, impossible_value

CONFIG, WEIGHTS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
WANTED = f"give a folder of Hugging Face, with {CONFIG} and {WEIGHTS}"
Values = dict[str, Any]  # what config.json holds
M = TypeVar("M", bound=nn.Module)


def read_config(folder: str | Path, supported: Collection[str]) -> Values:
    """What a folder's config.json holds.

    Args:
        folder: of one model.
        supported: types of models that the caller can build.

    Raises:
        UserError: no folder, no config that can be read, or a model of another type, with those that are supported.
    """
    file = Path(folder) / CONFIG
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: there is no such folder: {WANTED}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: its {CONFIG} cannot be read: {error.strerror or error}: {WANTED}") from None
    except ValueError as error:
        raise UserError(f"{folder}: its {CONFIG} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{folder}: its {CONFIG} holds a {type(values).__name__}, expected an object of options")
    check_supported(values, supported, str(folder))
    return values


def check_supported(values: Values, supported: Collection[str], source: str) -> None:
    """Is a config that of a model which the caller can build?

    Raises:
        UserError: it is not, with those that are supported.
    """
    kind = values.get("model_type")
    if kind not in supported:
        raise UserError(f"{source} holds a model of type {kind!r}; supported here: {', '.join(supported)}")


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """All weights of a folder, from one file or from shards; a pickle with `weights_only=True`, so that no code runs.

    Raises:
        UserError: there are none, or a file is damaged or lacking.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as stored:
                    tensors.update({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118  # no mapping
            else:
                tensors.update(torch.load(file, map_location="cpu", weights_only=True))
        except FileNotFoundError:
            raise UserError(f"{folder}: its index names {file.name}, which is not there: bring all files") from None
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, EOFError) as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{file} is no weight file that can be read: {line}") from None
        except Exception as error:  # of the unpickler, which has no class of its own here
            raise UserError(f"refused {file}: it holds more than tensors: {type(error).__name__}") from None
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    for name in (WEIGHTS, PICKLED):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{index} is no index of weights: expected a 'weight_map' of names to files") from None
            return [folder / str(shard) for shard in sorted(shards)]
    raise UserError(f"{folder} has no weights: expected {WEIGHTS}, {PICKLED}, or the index of either")


def build_with(build: Callable[[], M], tensors: dict[str, Tensor], source: str, dtype: torch.dtype | None) -> M:
    """A model in eval mode that holds stored weights, built on no memory of its own.

    Args:
        build: makes the model, all of whose state is stored.
        tensors: its weights, under its names.
        source: what an error calls them.
        dtype: of the model; by default torch's default type.

    Raises:
        UserError: weights that are lacking, that the model has not, of other sizes, or that are no finite numbers.
    """
    with torch.device("meta"):
        model = build()
    expected = model.state_dict(keep_vars=True)
    differing = [n for n in expected if n in tensors and tensors[n].shape != expected[n].shape]
    for what, names in (
        ("lack", expected.keys() - tensors.keys()),
        ("do not fit: the model lacks", tensors.keys() - expected.keys()),
        ("have other sizes than its config says for", differing),
    ):
        if names:
            raise UserError(f"the weights of {source} {what} {len(names)} parameters, {min(names)} among them")
    for name, tensor in tensors.items():
        check_type(name, tensor, expected[name], source)
        if wrong := impossible_value(name, tensor, expected[name]):
            raise UserError(f"{source}: {wrong}: {DAMAGED}")
    kind = dtype or torch.get_default_dtype()
    # Copies, where the type is the same: nothing that the caller changes reaches the model.
    model.load_state_dict({name: tensor.to(kind, copy=True) for name, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(True).eval()


def check_vocabulary(folder: str | Path, ids: Iterable[tuple[str, int]]) -> None:
    """Does the tokenizer in a folder, where there is one, have the special tokens that its model needs?

    Args:
        folder: of the model; its tokenizer.json is read, or vocab.json.
        ids: what each token is for, and its number.

    Raises:
        UserError: a file that cannot be read, or a token that is lacking.
    """
    file = next((f for name in ("tokenizer.json", "vocab.json") if (f := Path(folder) / name).exists()), None)
    if file is None:
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "vocab.json":
            known = set(content.values())
        else:
            vocabulary = content["model"]["vocab"]  # names to numbers, or a list of names whose places are the numbers
            known = set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
            known |= {token["id"] for token in content.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is no vocabulary that can be read: bring the model's own") from None
    for purpose, number in ids:
        if number not in known:
            raise UserError(f"{file} has no token {number}, the model's {purpose}: bring the model's own tokenizer")


def write_folder(folder: str | Path, config: Values, model: nn.Module) -> None:
    """Write config.json and model.safetensors, each in one step; other files of the folder are left as they are.

    Raises:
        Unwritable: the folder cannot be written.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with atomic_write(Path(folder) / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})  # without which transformers refuses the file
    write_atomically(Path(folder) / CONFIG, json.dumps({**config, "dtype": dtype}, indent=2) + "\n")

"""Prune a model by a method of the catalogue: weights with zeros, masks, a report and a picture."""

import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenn import catalog
from provenn.core.errors import UserError
from provenn.core.names import listed, meant
from provenn.core.settings import arguments_of, typed
from provenn.inference.paper import Paper, paper
from provenn.inference.presets import presets_by_name

if TYPE_CHECKING:
    from torch import nn

    from provenn.nn.masks import Masks
    from provenn.surgery.pruned import Summary
    from provenn.training.weights import Label

MASKS, REPORT, PICTURE = "masks.safetensors", "pruning.json", "kept.png"
PRUNED = "pruned"  # in what a weight file says of its training: by what it was pruned, and how much


@dataclass(frozen=True)
class _Given:
    """A model to prune.

    Args:
        model: with its weights.
        name: what the user called it.
        save: writes the pruned model into a folder.
        example: shape of an image that it takes; None where it takes none.
        earlier: what an earlier pruning kept; None of a model that was not pruned.
    """

    model: "nn.Module"
    name: str
    save: Callable[[Path], object]
    example: tuple[int, ...] | None
    earlier: "Masks | None" = None


def methods() -> dict[str, tuple[catalog.Card, catalog.Pruning]]:
    """The ways to prune that papers of the catalogue offer, by name; this package's own come first."""
    known: dict[str, tuple[catalog.Card, catalog.Pruning]] = {}
    for card in sorted(catalog.cards().values(), key=lambda card: not card.built_in):
        for way in card.pruning:
            known[way.name if way.name not in known else f"{card.slug}:{way.name}"] = card, way
    return known


def prune(
    model: str | Path,
    out: str | Path,
    *,
    method: str,
    ratio: float | int | Mapping[str, float | int],
    preset: str | None = None,
    overrides: dict[str, Any] | None = None,
    packed: str | None = None,
) -> "tuple[Path, Summary]":
    """Prune a model and write it: weights with zeros, masks, a report and a picture; returns the folder and the counts.

    Args:
        model: a preset's name, whose weights that ship are taken; a weight file or the folder of a run, ours or, with
            `preset`, the authors'; or a folder that transformers wrote.
        out: a new folder.
        method: as `methods` names it.
        ratio: the share of the weights that goes, or one for each group of layers. Zeros of an earlier pruning count,
            and stay even if the ratio is below theirs.
        preset: of an authors' file, and of its options what the file does not say is in `overrides`.
        overrides: options of the method.
        packed: also write the model as "mask" or "csr"; see `provenn.surgery.pruned.pack`.

    Raises:
        UserError: an unknown method or model, or what the method refuses; nothing is written then.
    """
    import torch

    from provenn.core.files import save_figure, strict_json, work_folder, write_atomically
    from provenn.surgery import pruned

    way = _way(method)
    folder, options = Path(out), overrides or {}
    card, facts = way
    function = card.resolve(facts.masks)
    taken = arguments_of(function, but=("model", "ratio"))
    if unknown := [name for name in options if name not in taken]:
        raise UserError(f"{method} takes no option {unknown[0]!r}{meant(unknown[0], taken)}; it takes: {listed(taken)}")
    options = {name: _option(name, value, taken[name]) for name, value in options.items()}
    if packed is not None and packed not in pruned.FORMS[1:]:
        raise UserError(f"packed must be one of {', '.join(pruned.FORMS[1:])}, got {packed!r}")
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a new folder for the pruned model")
    if (folder.exists() or folder.is_symlink()) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; name a new folder for the pruned model")
    given = _read(model, preset, {"method": method, "ratio": ratio, **options})
    try:
        if given.earlier is not None:
            given.earlier.apply(given.model)
        masks = function(given.model, ratio, **options)
        if given.earlier is not None:
            masks = masks.within(given.earlier)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{method}: {' '.join(str(error).split())}") from error
    masks.apply(given.model)

    def run(example: tuple[int, ...]) -> object:
        first = next(given.model.parameters())
        return given.model(torch.zeros(example, dtype=first.dtype))

    call = None if given.example is None else partial(run, given.example)
    summary = pruned.summarise(given.model.eval(), masks, call)
    report = {
        "model": given.name,
        "method": method,
        "paper": card.slug,
        "ratio": ratio if isinstance(ratio, int | float) else dict(ratio),
        "options": options,
        **summary.json(),
    }
    # Written beside and moved in one step each, the weights last: what has weights is whole.
    with work_folder(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".pruned-") as place:
        whole = Path(place)
        given.save(whole)
        pruned.save_masks(masks, whole / MASKS)
        if packed is not None:
            pruned.save_packed(given.model, masks, whole / f"{packed}.safetensors", packed)
        write_atomically(whole / REPORT, strict_json(report) + "\n")
        save_figure(pruned.draw(summary, f"{given.name}, pruned by {method}"), whole / PICTURE)
        for file in sorted(whole.iterdir(), key=lambda file: file.suffix == ".safetensors"):
            shutil.move(file, folder / file.name)
    return folder, summary


def _option(name: str, value: Any, hint: Any) -> Any:
    if value in ({}, []):
        raise UserError(f"{name} is empty: give a value, or leave it out")
    return typed(name, value, hint)


def masks_of(path: str | Path, label: "Label", model: "nn.Module") -> "Masks | None":
    """The masks beside a weight file that was pruned; None of one that was not.

    Args:
        path: of the weights.
        label: of them.
        model: with these weights.

    Raises:
        UserError: they are not there, damaged, of another model, or of another pruning.
    """
    from provenn.surgery.pruned import load_masks
    from provenn.training import weights

    if PRUNED not in label.trained_on:
        return None
    place = weights.locate(path)
    file = place.parent / MASKS
    if not file.is_file() and place.is_symlink():
        file = place.resolve().parent / MASKS
    if not file.is_file():
        raise UserError(
            f"{path} was pruned, and {file} is not there: give the folder that the pruning wrote, or its weights "
            "would grow back"
        )
    masks = load_masks(file)
    try:
        pairs = masks.of(model)
    except ValueError as error:
        raise UserError(f"{file} is not of the weights beside it: {error}") from None
    for name, (weight, mask) in pairs.items():
        if weight.detach()[~mask].any():
            raise UserError(
                f"{file} is of another pruning than the weights beside it: it has zeros in {name} where they have "
                "none; give a folder as one pruning wrote it"
            )
    return masks


def _way(method: str) -> tuple[catalog.Card, catalog.Pruning]:
    known = methods()
    if method not in known:
        raise UserError(f"no method of pruning is called {method!r}{meant(method, known)}; there are: {listed(known)}")
    return known[method]


def _read(model: str | Path, preset: str | None, how: dict[str, Any]) -> _Given:
    path = Path(model)
    if path.is_dir() and (path / "config.json").is_file():
        if preset is not None:
            raise UserError(f"{model} says itself what it is: leave the preset {preset!r} out")
        return _of_transformers(path)
    presets = presets_by_name()
    if path.exists():
        return _of_file(path, preset, how)
    if preset is not None:
        raise UserError(f"no file or folder at {model}: a preset names what an authors' file holds")
    if str(model) not in presets and str(model) in catalog.cards():
        model = catalog.cards()[str(model)].shipped_weights().stem
    if str(model) not in presets:
        near = meant(str(model), presets)
        raise UserError(
            f"no paper, preset, file or folder is called {str(model)!r}{near}: give one whose weights ship "
            f"({', '.join(name for name, (card, p) in list(presets.items()) if p.name in card.shipped)[:200]}, …), a "
            "weight file, or a folder that transformers wrote"
        )
    card, facts = presets[str(model)]
    if facts.name not in card.shipped:
        raise UserError(f"no weights of {model} ship: give a file of its weights in its place, or the folder of a run")
    network, label = Paper(card).load(preset=facts.name)
    return _ours(network, label, str(model), how)


def _of_file(path: Path, preset: str | None, how: dict[str, Any]) -> _Given:
    from provenn.surgery import pruned
    from provenn.training import weights

    if path.is_dir() and not (path / weights.FILE).exists():
        raise UserError(
            f"{path} holds no {weights.FILE} and no config.json: give the folder of a run, or of transformers"
        )
    label = weights.label_of(path)
    if label is not None:
        network, label = paper(label.paper).load(path, preset=preset)
        earlier = masks_of(path, label, network)
        if earlier is not None:
            how = {**how, "before": label.trained_on[PRUNED]}
        return replace(_ours(network, label, str(path), how), earlier=earlier)
    if path.name in (MASKS, *(f"{form}.safetensors" for form in pruned.FORMS[1:])):
        raise UserError(f"{path} is a part of a pruned model: give its folder, or the weights in it")
    if preset is None:
        weights.read(path)  # what holds no weights says so
        raise UserError(
            f"{path} names no preset: say with --preset whose weights these are, such as --preset {_some()}"
        )
    presets = presets_by_name()
    if preset not in presets:
        raise UserError(f"no preset is called {preset!r}{meant(preset, presets)}")
    card, facts = presets[preset]
    network, label = Paper(card).load(path, preset=facts.name)
    return _ours(network, label, str(path), how)


def _some() -> str:
    """A preset of the catalogue whose authors' files are read."""
    return next(
        (name for name, (card, _) in presets_by_name().items() if card.pruning and card.has("official")), "NAME"
    )


def _ours(model: "nn.Module", label: "Label", name: str, how: dict[str, Any]) -> _Given:
    from provenn.training import weights

    metrics: dict[str, float] = {}  # those of the weights before are not of these
    marked = replace(label, metrics=metrics, trained_on={**label.trained_on, PRUNED: json.loads(json.dumps(how))})
    meta = label.meta
    example: tuple[int, ...] | None = None
    if {"size", "channels"} <= meta.keys():
        example = (1, meta["channels"], meta["size"], meta["size"])
    elif isinstance(meta.get("size"), list) and "mean" in meta:  # height and width
        example = (1, len(meta["mean"]), *meta["size"])
    return _Given(model, name, lambda folder: weights.save(model, folder / weights.FILE, marked), example)


def _of_transformers(path: Path) -> _Given:
    from provenn import huggingface

    huggingface.quiet()
    model: Any = huggingface.load_model(path)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (path / name).is_file():
                shutil.copyfile(path / name, folder / name)

    config = model.config
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    example = None
    if "pixel_values" in inspect.signature(model.forward).parameters and isinstance(channels, int):
        side = size if isinstance(size, int) else 224
        example = (1, channels, side, side)
    from provenn.surgery.pruned import load_masks

    earlier = load_masks(path / MASKS) if (path / MASKS).exists() else None
    return _Given(model, str(path), save, example, earlier)

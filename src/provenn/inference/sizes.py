"""How large a paper's presets are, and how its layers are called: measured once, kept beside the paper as `sizes.json`.

Reading the file imports no torch.
"""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from provenn.catalog import Card, Facts, Preset
from provenn.core import progress
from provenn.core.files import atomic_write
from provenn.core.names import in_a_line

FILE = "sizes.json"
LARGE = 2**26  # parameters beyond which a preset is counted without its weights, on the meta device
MOST_WORDS = 160  # of what an error says


class Size(Facts):
    """What one example costs a preset in a forward pass without gradients, in float32.

    Args:
        parameters: numbers that training can change or hold fixed; None of a procedure.
        inputs: the shape of each input, of one example.
        flops: floating-point operations, a multiply-add as two; None where they cannot be counted.
        activation_bytes: the most that is held at any moment beyond weights and inputs.
        uncounted: why something is None.
    """

    parameters: int | None = None
    inputs: list[list[int]] = Field(default_factory=list)
    flops: int | None = None
    activation_bytes: int | None = None
    uncounted: str = ""


class Sizes(Facts):
    """Sizes of presets and signatures of layers, by the names that the card has."""

    presets: dict[str, Size] = Field(default_factory=dict)
    layers: dict[str, str] = Field(default_factory=dict)


def read(card: Card) -> Sizes:
    """What came with the paper's package; empty where nothing did, or nothing that can be read."""
    try:
        return Sizes.model_validate_json((card.folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Sizes()


def write(card: Card, sizes: Sizes) -> Path:
    """Keep the sizes beside the paper, an entry a line; returns the file.

    Raises:
        Unwritable: the paper's folder cannot be written to.
    """
    parts = []
    for name, entries in sizes.model_dump(exclude_defaults=True).items():
        lines = [f"    {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
        parts.append(f'  "{name}": {{\n' + ",\n".join(lines) + "\n  }")
    with atomic_write(card.folder / FILE) as path:
        path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    return card.folder / FILE


def measure(card: Card) -> Sizes:
    """Count every preset and write down every layer's signature."""
    names = [preset.name for preset in card.presets]
    counted = (size_of(card, preset) for preset in progress.track(card.presets, card.slug))
    return Sizes(presets=dict(zip(names, counted, strict=True)), layers=signatures(card))


def size_of(card: Card, preset: Preset) -> Size:
    """One preset's size; of a large one, and of no other, what the meta device counts.

    The meta device takes other paths through attention than a processor does, and counts a little more.
    """
    import torch

    from provenn.core.cost import flops, peak_activation_bytes
    from provenn.testing.subject import Subject

    subject = Subject.preset(card, preset)
    shapes = [[1, *example.shape[1:]] for example in preset.input]
    try:
        counted = parameters_of(card, preset)
        device = "meta" if (counted or 0) > LARGE else "cpu"
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            with torch.device(device):
                model = subject.make()
            if counted is not None:
                model.eval()
            inputs = [x.to(device) for x in subject.inputs(batch=1)]

            def run() -> object:
                return model(*inputs)

            if device == "cpu":
                run()  # what is made once and kept, such as a table of positions, is no activation
            operations: list[int] = []
            held = peak_activation_bytes(lambda: operations.append(flops(run)))
            return Size(parameters=counted, inputs=shapes, flops=operations[0], activation_bytes=held)
    except Exception as error:  # a stranger's paper may fail in any way; what was counted before is kept
        words = in_a_line(error)[:MOST_WORDS]
        return Size(parameters=_or_none(lambda: parameters_of(card, preset)), inputs=shapes, uncounted=words)


def parameters_of(card: Card, preset: Preset) -> int | None:
    """The parameters of a preset, counted on the meta device; None of a procedure, which is no module."""
    import torch
    from torch import nn

    from provenn.core.cost import count_parameters

    with torch.device("meta"):
        made = card.resolve(preset.build)(**preset.options)
    return count_parameters(made) if isinstance(made, nn.Module) else None


def _or_none(count: Callable[[], int | None]) -> int | None:
    try:
        return count()
    except Exception:
        return None


def signatures(card: Card) -> dict[str, str]:
    """How each mechanism's layer is made, with defaults.

    >>> from provenn import catalog
    >>> signatures(catalog.card("eca_net"))["se-var3"]
    'SEVar3(channels: int)'
    """
    return {mechanism.name: signature(card.resolve(mechanism.layer)) for mechanism in card.mechanisms}


def signature(layer: Callable[..., Any]) -> str:
    """A layer's name with its arguments and their defaults, as one would write it.

    >>> def gate(channels: int, ratio: float = 0.5, *, act: Callable[..., Any] = len): ...
    >>> signature(gate)
    'gate(channels: int, ratio: float = 0.5, *, act: Callable[..., Any] = len)'
    """
    words: list[str] = []
    starred = False
    for each in inspect.signature(layer).parameters.values():
        if each.kind is each.KEYWORD_ONLY and not starred:
            words.append("*")
        starred = starred or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        stars = "*" if each.kind is each.VAR_POSITIONAL else "**" if each.kind is each.VAR_KEYWORD else ""
        kind = "" if each.annotation is each.empty else f": {_plain(inspect.formatannotation(each.annotation))}"
        default = "" if each.default is each.empty else f"{' = ' if kind else '='}{_default(each.default)}"
        words.append(f"{stars}{each.name}{kind}{default}")
    return f"{layer.__name__}({', '.join(words)})"


def _plain(annotation: str) -> str:
    """An annotation without the modules that its names lie in."""
    annotation = re.sub(r"\*?<class '([\w.]+)'>", r"\1", annotation)  # of keyword arguments that are a TypedDict's
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", annotation.strip("'"))


def _default(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)

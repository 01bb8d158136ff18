"""Lines of Python that run as they stand, made from a paper's card alone."""

from typing import Any

from provenn.catalog import Card, Example, Mechanism, Preset, label_of_shipped
from provenn.catalog.slots import SLOTS

WIDTH = 64  # of the layers shown: the usual numbers of heads divide it
SIZES = {"batch": 2, "tokens": 10, "other": 5, "height": 16, "width": 16}
CALLED = {"channel-gate": "gate", "residual": "join", "backbone": "backbone"}  # what a layer of the slot is named


def of_preset(card: Card, preset: Preset) -> str:
    """A preset, with the weights that ship where they do, and one call on noise of its input's shape."""
    shipped = card.shipped.get(preset.name)
    options = label_of_shipped(shipped).get("options", {}) if shipped else preset.options
    build = f'"{preset.name}", pretrained=True' if shipped else f'"{preset.name}"'
    lines = ["import provenn", "import torch", "", f'model = provenn.paper("{card.slug}").build({build})']
    if preset.input:
        lines.append(f"output = model({', '.join(_example(each, options) for each in preset.input)})")
    return "\n".join(lines)


def _example(example: Example, options: dict[str, Any]) -> str:
    """One example; weights may have been trained with other channels than the preset's own."""
    shape = [1, *example.shape[1:]]
    axis, name = {4: (1, "in_channels"), 3: (2, "channels")}.get(len(shape), (0, ""))
    shape[axis] = options.get(name, shape[axis])
    sizes = ", ".join(map(str, shape))
    noise = f"torch.randn({sizes})"
    if example.below is not None:
        least = f"{example.least}, " if example.least else ""
        noise = f"torch.randint({least}{example.below}, ({_tuple(shape)}))"
    return f"{example.name}={noise}" if example.name else noise


def _tuple(shape: list[int]) -> str:
    return f"{shape[0]}," if len(shape) == 1 else ", ".join(map(str, shape))


def of_mechanism(card: Card, mechanism: Mechanism) -> str:
    """The layer's import, the layer, and one call as its slot has it."""
    module, _, layer = mechanism.layer.partition(":")
    imported = f"from {card.package}.{module} import {layer}"
    if mechanism.slot not in SLOTS:
        return imported
    slot = SLOTS[mechanism.slot]
    given = [f"{name}={value!r}" for name, value in mechanism.arguments.items()]
    if slot.name == "backbone":
        given = ["num_classes=10", "in_channels=3", *given]
        sizes = {**SIZES, "height": 32, "width": 32, "channels": 3}
    else:
        given = [str(WIDTH), *given]
        sizes = {**SIZES, slot.width: WIDTH}
    inputs = [f"torch.randn({', '.join(map(str, shape))})" for shape in slot.shapes(**sizes)]
    if slot.name == "residual":
        inputs += [f"torch.nn.Linear({WIDTH}, {WIDTH})", "10"]  # the branch, and how many branches there are
    name = CALLED.get(slot.name, "mixer")
    return "\n".join(
        [
            "import torch",
            imported,
            "",
            f"{name} = {layer}({', '.join(given)})",
            f"y = {name}({', '.join(inputs)})",
        ]
    )

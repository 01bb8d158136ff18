"""Where a model looks when it names something, for `provenn inspect`."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.vl_sam.layers import flatness
from provenn.papers.vl_sam.model import VLSAM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WAYS: dict[str, dict[str, Any]] = {
    "regularised flow": {},
    "flow, not regularised": {"place": "none"},
    "last layer": {"naive": True},
}


def inspect(model: nn.Module, x: dict[str, Any]) -> dict[str, Float[Tensor, "height width"]]:
    """The map of each name that the model gives a picture, or of words of its answer, in three ways."""
    system = _system(model)
    found: dict[str, Tensor] = {}
    for way, options in WAYS.items():
        maps = system.attention_maps(x["image"], x["words"], **options)
        found |= {f"{name}, {way}": heat for name, heat in maps.items()}
    if not found:
        raise UserError("the model's answer names no object: there is no map to draw")
    return dict(sorted(found.items()))


def draw(model: nn.Module, x: dict[str, Any], meta: dict[str, Any], axes: "Axes") -> None:
    """The picture, and for each name its map over it, a row of three ways a name."""
    image = x["image"].permute(1, 2, 0).cpu().numpy()
    found = inspect(model, x)
    names = list(dict.fromkeys(title.rpartition(", ")[0] if "not regularised" not in title else
                               title.removesuffix(", flow, not regularised") for title in found))[:4]  # fmt: skip
    height, width = image.shape[:2]
    for row, name in enumerate(names):
        for column, way in enumerate(WAYS):
            heat = found[f"{name}, {way}"]
            left, top = column * 1.1 * width, row * 1.25 * height
            extent = (left, left + width, top + height, top)
            axes.imshow(image, extent=extent)
            axes.imshow(np.asarray(heat.cpu()), cmap="inferno", alpha=0.6, extent=extent, vmin=0, vmax=1)
            flat = float(flatness(heat[None])[0])
            axes.text(left, top - 0.03 * height, f"{name}: {way} ({flat:.0%} flat)", fontsize=7)
    axes.set_xlim(0, 3.2 * width)
    axes.set_ylim(len(names) * 1.25 * height, -0.15 * height)


def _system(model: nn.Module) -> VLSAM:
    if not isinstance(model, VLSAM):
        raise UserError(f"{type(model).__name__} joins no models: take the preset vl_sam_scenes")
    return model

"""Which points BVR chose as keys, for `provenn inspect`."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.detection import FasterRCNN
from provenn.papers.relationnet_pp.layers import Keys, select_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In the picture a corner's lines run along the object's sides, and a centre is a cross.
MARKS: dict[str, tuple[str, list[tuple[tuple[float, float], tuple[float, float]]]]] = {
    "top_left": ("#e5a50a", [((0, 0), (1, 0)), ((0, 0), (0, 1))]),
    "bottom_right": ("#1a9fff", [((0, 0), (-1, 0)), ((0, 0), (0, -1))]),
    "centre": ("#ff4f9a", [((-0.5, -0.5), (0.5, 0.5)), ((-0.5, 0.5), (0.5, -0.5))]),
}
FAINTEST = 0.25  # opacity of the least sure key, of the surest of its type 1


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, " keys"]]:
    """x, y (in pixels) and score of the keys of each type, the surest first."""
    rows = {}
    for name, keys in keys_of(model, x).items():
        rows[f"{name} x"], rows[f"{name} y"] = keys.positions[0].unbind(dim=1)
        rows[f"{name} score"] = keys.scores[0]
    return rows


def draw(model: nn.Module, x: Float[Tensor, "1 channels height width"], meta: dict[str, Any], axes: "Axes") -> None:
    """The picture as the detector sees it, the keys of each type, the surer the bolder, and what is found (dashed)."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    detector: Any = model
    height, width = x.shape[-2:]
    mean, std = (torch.tensor(meta[name])[:, None, None] for name in ("mean", "std"))
    # Corners of pixels are whole numbers in boxes and points, as in the detector, and not halves.
    axes.imshow((x[0].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    with torch.no_grad():
        keys, found = keys_of(model, x), detector.detect(x, score_threshold=0.3)[0]
    for left, top, right, bottom in found.boxes.tolist():
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", linestyle="--")
        )
    for name, (colour, strokes) in MARKS.items():
        if name not in keys:
            continue
        chosen, scores = keys[name], keys[name].scores[0].cpu()
        bold = (FAINTEST + (1 - FAINTEST) * scores / scores.max().clamp(min=1e-9)).tolist()
        size = 0.04 * max(height, width)
        lines, opacity = [], []
        for (left, top), strength in zip(chosen.positions[0].tolist(), bold):
            lines += [[(left + size * dx, top + size * dy) for dx, dy in stroke] for stroke in strokes]
            opacity += [strength] * len(strokes)
        label = f"{len(bold)} {name.replace('_', ' ')}, score {scores.min():.2g} to {scores.max():.2g}"
        axes.add_collection(LineCollection(lines, colors=colour, alpha=opacity, linewidths=2.5, label=label))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_title("keys, the surer the bolder; dashed is what the detector finds", fontsize=9)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3, fontsize=8, frameon=False)


def keys_of(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Keys]:
    """The keys of each type that a detector chooses."""
    return _regions(model, x) if isinstance(model, FasterRCNN) else _levels(model, x)


def _levels(detector: Any, x: Tensor) -> dict[str, Keys]:
    bridge, levels = detector.head.bridge, detector.levels(x)
    limits = {"most": bridge.keys, "most_a_level": bridge.keys_a_level, "ties": bridge.ties}
    limits["reference"] = bridge.point_head.reference
    said = bridge.point_head(levels)
    return {name: select_keys(points, levels, detector.strides, **limits) for name, points in said.items()}


def _regions(detector: Any, x: Tensor) -> dict[str, Keys]:
    said = detector(x).said
    return {name: detector.bridge.select(said, name, logits) for name, (logits, _) in said.maps.items()}

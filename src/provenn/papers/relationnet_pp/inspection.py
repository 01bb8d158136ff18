"""Which points BVR chose as keys, for `provenn inspect`."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.detection import FasterRCNN
from provenn.papers.relationnet_pp.layers import select_keys


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, " keys"]]:
    """x, y (in pixels) and score of the keys of each type, the surest first."""
    rows = {}
    detector: Any = model
    for name, keys in (_regions(detector, x) if isinstance(model, FasterRCNN) else _levels(detector, x)).items():
        rows[f"{name} x"], rows[f"{name} y"] = keys.positions[0].unbind(dim=1)
        rows[f"{name} score"] = keys.scores[0]
    return rows


def _levels(detector: Any, x: Tensor) -> dict[str, Any]:
    bridge, levels = detector.head.bridge, detector.levels(x)
    limits = {"most": bridge.keys, "most_a_level": bridge.keys_a_level, "reference": bridge.point_head.reference}
    said = bridge.point_head(levels)
    return {name: select_keys(points, levels, detector.strides, **limits) for name, points in said.items()}


def _regions(detector: Any, x: Tensor) -> dict[str, Any]:
    said = detector(x).said
    return {name: detector.bridge.select(said, name, logits) for name, (logits, _) in said.maps.items()}

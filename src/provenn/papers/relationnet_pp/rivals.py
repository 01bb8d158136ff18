"""The same points joined to a detector without attention: what BVR's attention is set against."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core import cost
from provenn.nn.detection import FocalDetector
from provenn.papers.relationnet_pp.bridge import CORNERS, Bridge
from provenn.papers.relationnet_pp.layers import Keys, PointMaps, cell_centres, select_keys
from provenn.papers.relationnet_pp.studies import LARGE_BRIDGE, LARGE_SIDE, large_detector

JOINS = ("nearest", "maps", "mean")
TOWERS = {"classification": ("centre",), "regression": CORNERS}  # as BVR has them


class JoinedPoints(Bridge):
    """BVR's point head and its keys, each type of which is joined to a tower without attention.

        f'_i = ReLU(f_i + Σ_t W_t' ReLU(W_t z_it))

    With "nearest", z is the feature of the nearest key, and where it lies from the cell. With "mean", z is the mean
    feature of all keys. With "maps", z is the cell's own score of each class and its offsets, as if concatenated to the
    tower. Each type has about as many parameters as its attention.

    Args:
        channels, num_classes, strides: as of `Bridge`.
        how: "nearest", "maps" or "mean".
        unit: pixels, by which the way to the nearest key is divided.
        options: of `Bridge`.
    """

    def __init__(
        self, channels: int, num_classes: int, strides: Sequence[int], *, how: str, unit: float, **options: Any
    ):
        super().__init__(channels, num_classes, strides, classification=(), regression=(), unit=unit, **options)
        if how not in JOINS:
            raise ValueError(f"how must be one of {', '.join(JOINS)}, got {how!r}")
        self.how, self.unit = how, unit
        given = {"nearest": channels + 2, "maps": num_classes + 2, "mean": channels}[how]
        hidden = 4 * channels**2 // (channels + given)
        self.join = nn.ModuleDict(
            {
                tower: nn.ModuleDict({name: _mixed(given, hidden, channels) for name in types})
                for tower, types in TOWERS.items()
            }
        )

    def forward(
        self, levels: list[Tensor], classification: list[Tensor], regression: list[Tensor], strides: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor], dict[str, PointMaps]]:
        said = self.point_head(levels)
        return (
            self.joined("classification", said, classification, strides),
            self.joined("regression", said, regression, strides),
            said,
        )

    def joined(
        self, tower: str, said: dict[str, PointMaps], features: list[Tensor], strides: Sequence[int]
    ) -> list[Tensor]:
        """A tower's levels with what is joined to them."""
        totals = list(features)
        for name, join in self.join[tower].items():  # type: ignore[operator]  # a ModuleDict
            keys = self.keys_of(said[name], features, strides) if self.how != "maps" else None
            for number, (level, stride) in enumerate(zip(features, strides, strict=True)):
                height, width = level.shape[2:]
                given = maps_of(said[name], number) if keys is None else self.read(keys, height, width, stride)
                told = join(given).expand(-1, height * width, -1)
                totals[number] = totals[number] + told.transpose(1, 2).unflatten(2, (height, width))
        return [total.relu() for total in totals]

    def keys_of(self, points: PointMaps, features: Sequence[Tensor], strides: Sequence[int]) -> Keys:
        """The keys of one type, chosen as BVR chooses them."""
        return select_keys(
            points,
            features,
            strides,
            most=self.keys,
            most_a_level=self.keys_a_level,
            reference=self.point_head.reference,
            ties=self.ties,
        )

    def read(self, keys: Keys, height: int, width: int, stride: int) -> Tensor:
        """z of every cell: (batch, cells, given), or of all alike (batch, 1, given)."""
        if self.how == "mean":
            return keys.features.mean(1, keepdim=True)
        cells = cell_centres(height, width, stride, keys.positions.device)
        away = keys.positions[:, None] - cells.expand(len(keys.positions), -1, -1)[:, :, None]
        nearest = away.detach().square().sum(-1).argmin(-1)[..., None]
        feature = keys.features.gather(1, nearest.expand(-1, -1, keys.features.shape[2]))
        way = away.gather(2, nearest[..., None].expand(-1, -1, 1, 2))[:, :, 0] / self.unit
        return torch.cat([feature, way], dim=-1)


def maps_of(points: PointMaps, level: int) -> Tensor:
    """Scores and offsets of a level: (batch, cells, classes + 2)."""
    said = torch.cat([points.logits[level].sigmoid(), points.offsets[level]], dim=1)
    return said.flatten(2).transpose(1, 2)


def _mixed(given: int, hidden: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(given, hidden), nn.ReLU(), nn.Linear(hidden, channels))


def joined_detector(part: dict[str, Any], *, num_classes: int = 2) -> nn.Module:
    """A study's `build`: `large_detector`, or with the points of a `join` that a part names."""
    if "join" not in part:
        return large_detector(part, num_classes=num_classes)
    model: Any = large_detector({}, num_classes=num_classes)
    if not isinstance(model, FocalDetector):
        raise TypeError(f"expected a detector with levels, got {type(model).__name__}")
    host: Any = model.head
    host.bridge = JoinedPoints(model.neck.widths[0], num_classes, model.strides, how=part["join"], **LARGE_BRIDGE)
    return model


def count_joined(part: dict[str, Any]) -> int:
    """Parameters of a variant of `joined_detector`."""
    with torch.device("meta"):
        return cost.count_parameters(joined_detector(part))


def megamacs_joined(part: dict[str, Any]) -> float:
    """Multiply-adds of a variant of `joined_detector` on one image, in 10⁶."""
    with torch.device("meta"):
        model = joined_detector(part).eval()
        return round(cost.macs(lambda: model(torch.empty(1, 3, LARGE_SIDE, LARGE_SIDE))) / 1e6, 1)

"""BVR inside detectors (section 4 and figure 4): one call puts it between the towers and the predictions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.nn.detection import DetectionBatch, FasterRCNN, FocalDetector
from provenn.nn.detection.assign import by_iou
from provenn.nn.detection.two_stage import Pool, Regions
from provenn.ops.autograd import at_least_single
from provenn.papers.relationnet_pp.layers import (
    BVR,
    KEY_TYPES,
    TIES,
    Keys,
    PointHead,
    PointMaps,
    check_types,
    select_keys,
)
from provenn.papers.relationnet_pp.losses import point_losses

CORNERS = ("top_left", "bottom_right")
POINTED = 100  # regions of an image in which the two-stage form looks for points: the first, which are the surest


class Bridge(nn.Module):
    """A point head on the pyramid, and a BVR for each tower: centres for the class, corners for the box.

    Args:
        channels, num_classes, strides: of the detector's levels; how many it distinguishes; of the levels.
        classification, regression: key types of each tower; () leaves a tower as it is. With both empty the point head
            learns beside the detector and nothing reads it.
        heads: of the attentions.
        point_head: "release" or "paper": see `PointHead`; with its `groups`, `convs` (here `point_convs`) and `deeper`.
        keys, keys_a_level: K, and how many of each level are looked at.
        ties: of keys with equal scores, see `select_keys`.
        share_map: one geometry for both towers, as the release's ATSS has it.
        preserve: start from output layers of zeros, so that a trained detector still says what it said.
        options: of both `BVR`s: geometry, appearance, dim, hidden, log_scale, map_size, align_corners, unit, by_level.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        *,
        classification: Sequence[str] = ("centre",),
        regression: Sequence[str] = CORNERS,
        heads: int = 8,
        point_head: str = "release",
        groups: int | None = None,
        point_convs: int = 2,
        deeper: int = 1,
        keys: int = 50,
        keys_a_level: int = 20,
        ties: str = "first",
        share_map: bool = False,
        preserve: bool = False,
        **options: Any,
    ):
        super().__init__()
        check_whole(keys=keys, keys_a_level=keys_a_level)
        if min(keys, keys_a_level) < 1:
            raise ValueError(f"keys and keys_a_level must be at least 1, got {keys} and {keys_a_level}")
        if ties not in TIES:
            raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")
        self.keys, self.keys_a_level, self.ties, self.strides = keys, keys_a_level, ties, tuple(strides)
        self.point_head = PointHead(
            channels, num_classes, form=point_head, groups=groups, convs=point_convs, deeper=deeper
        )
        self.classification = BVR(channels, heads, classification, **options) if classification else None
        self.regression = BVR(channels, heads, regression, **options) if regression else None
        if share_map and self.classification is not None and self.regression is not None:
            self.regression.geometry = self.classification.geometry
        if preserve:
            _silence(self)

    def forward(
        self, levels: list[Tensor], classification: list[Tensor], regression: list[Tensor], strides: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor], dict[str, PointMaps]]:
        said = self.point_head(levels)
        if self.classification is not None:
            chosen = self.select(said, self.classification, classification, strides)
            classification = self.classification(classification, strides, chosen)
        if self.regression is not None:
            chosen = self.select(said, self.regression, regression, strides)
            regression = self.regression(regression, strides, chosen)
        return classification, regression, said

    def select(
        self, said: dict[str, PointMaps], bvr: BVR, features: Sequence[Tensor], strides: Sequence[int]
    ) -> dict[str, Keys]:
        """The keys of one tower."""
        return {
            name: select_keys(
                said[name],
                features,
                strides,
                most=self.keys,
                most_a_level=self.keys_a_level,
                reference=self.point_head.reference,
                ties=self.ties,
            )
            for name in bvr.key_types
        }

    def losses(self, said: dict[str, PointMaps], batch: DetectionBatch) -> dict[str, Tensor]:
        """Of the point head."""
        head = self.point_head
        return point_losses(said, batch, self.strides, weights=head.weights, reference=head.reference)


class RegionPoints(NamedTuple):
    """What the point head of the two-stage form says.

    Args:
        maps: of each type, (batch · regions, 1 or 2, 2 · grid, 2 · grid): logits, and offsets.
        regions: in which it looked.
        valid: which are no padding.
    """

    maps: dict[str, tuple[Tensor, Tensor]]
    regions: Regions
    valid: Bool[Tensor, "batch regions"]


class RegionBridge(nn.Module):
    """BVR in the second stage of Faster R-CNN: regions are the queries, points inside them the keys.

    Four convolutions on 14×14 cells of each region, one transposed convolution to 28×28, and from there a heat map and
    offsets of each type. The geometry is computed directly: there are few queries, at the regions' middles. The paper
    draws this form (figure 4), its code does not have it; what the figure leaves open is ours. A point belongs to the
    regions that overlap its object by an IoU of 0.5. One heat map is for all classes. The surest 100 regions are looked
    at, and a key's feature is its cell's.

    Args:
        channels: of the pyramid.
        width: of the features that class and box are predicted from.
        classification, regression, heads, keys, preserve, options: as of `Bridge`.
        point_convs: before the transposed convolution.
        grid: cells a side of a region, before they are doubled.
    """

    WEIGHTS = (0.25, 1.0)

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        classification: Sequence[str] = ("centre",),
        regression: Sequence[str] = CORNERS,
        heads: int = 8,
        point_convs: int = 4,
        grid: int = 14,
        keys: int = 50,
        preserve: bool = False,
        **options: Any,
    ):
        super().__init__()
        check_whole(keys=keys, grid=grid, point_convs=point_convs)
        if min(keys, grid) < 1 or point_convs < 0:
            raise ValueError(f"keys and grid must be at least 1, point_convs 0, got {keys}, {grid} and {point_convs}")
        if options.get("by_level"):
            raise ValueError("by_level is of the levels of a pyramid: regions have no stride")
        classification, regression = (check_types(types) if types else () for types in (classification, regression))
        self.keys, self.grid = keys, grid
        layers: list[nn.Module] = []
        for _ in range(point_convs):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.ConvTranspose2d(channels, channels, 2, stride=2), nn.ReLU())
        self.key_types = check_types([*dict.fromkeys([*classification, *regression])] or KEY_TYPES)
        self.logits = nn.ModuleDict({name: nn.Conv2d(channels, 1, 1) for name in self.key_types})
        self.offsets = nn.ModuleDict({name: nn.Conv2d(channels, 2, 1) for name in self.key_types})
        for name in self.key_types:
            for layer in (self.logits[name], self.offsets[name]):
                nn.init.normal_(layer.weight, std=0.01)  # type: ignore[arg-type]  # a Conv2d
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            nn.init.constant_(self.logits[name].bias, -4.595)  # type: ignore[arg-type]  # p = 0.01
        options = {"geometry": "direct", "dim": 256, **options, "key_channels": channels}
        self.classification = BVR(width, heads, classification, **options) if classification else None
        self.regression = BVR(width, heads, regression, **options) if regression else None
        if preserve:
            _silence(self)

    def forward(
        self,
        regions: Regions,
        valid: Bool[Tensor, "batch regions"],
        pool: Pool,
        classification: Float[Tensor, "batch regions width"],
        regression: Float[Tensor, "batch regions width"],
    ) -> tuple[Tensor, Tensor, RegionPoints]:
        regions, middles = regions.detach(), (regions[..., :2] + regions[..., 2:]).detach() / 2
        looked_at, counted = regions[:, :POINTED], valid[:, :POINTED]
        batch, count = counted.shape
        grid = pool(looked_at, self.grid)
        features = self.trunk(grid.reshape(batch * count, *grid.shape[2:]))
        maps = {name: (self.logits[name](features), self.offsets[name](features)) for name in self.key_types}
        said = RegionPoints(maps, looked_at, counted)
        if self.classification is not None:
            keys = {name: self.select(said, name, features) for name in self.classification.key_types}
            classification = self._told(self.classification, classification, middles, keys)
        if self.regression is not None:
            keys = {name: self.select(said, name, features) for name in self.regression.key_types}
            regression = self._told(self.regression, regression, middles, keys)
        return classification, regression, said

    @staticmethod
    def _told(bvr: BVR, features: Tensor, middles: Tensor, keys: dict[str, Keys]) -> Tensor:
        shared = None if bvr.geometry is None else bvr.geometry.prepare()
        return bvr.attend(features, middles, keys, bvr.unit, shared)

    def select(self, said: RegionPoints, key_type: str, features: Tensor) -> Keys:
        """The surest points of all regions of an image; those of padding have a score of zero."""
        logits, offsets = said.maps[key_type]
        batch, count = said.valid.shape
        cells = logits.shape[2] * logits.shape[3]
        with torch.no_grad():
            heat = at_least_single(logits).sigmoid()
            heat = heat * (nn.functional.max_pool2d(heat, 3, stride=1, padding=1) == heat)
            heat = heat.reshape(batch, count, cells) * said.valid[..., None]
            scores, index = heat.reshape(batch, count * cells).topk(min(self.keys, count * cells), dim=1)
        where = index[..., None]
        table = features.flatten(2).transpose(1, 2).reshape(batch, count * cells, features.shape[1])
        points = self._centres(said.regions, logits.shape[2]) + (
            at_least_single(offsets).flatten(2).transpose(1, 2).reshape(batch, count, cells, 2)
            * self._cell(said, logits)
        )
        positions = points.reshape(batch, count * cells, 2).gather(1, where.expand(-1, -1, 2))
        return Keys(table.gather(1, where.expand(-1, -1, table.shape[2])), positions, scores, torch.zeros_like(index))

    @staticmethod
    def _cell(said: RegionPoints, logits: Tensor) -> Tensor:
        """Width and height of a cell of each region: (batch, regions, 1, 2)."""
        return ((said.regions[..., 2:] - said.regions[..., :2]) / logits.shape[2])[:, :, None]

    @staticmethod
    def _centres(regions: Regions, side: int) -> Float[Tensor, "batch regions cells 2"]:
        line = (torch.arange(side, device=regions.device) + 0.5) / side
        share = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).reshape(-1, 2)
        return regions[:, :, None, :2] + share * (regions[..., 2:] - regions[..., :2])[:, :, None]

    def losses(self, said: RegionPoints, batch: DetectionBatch) -> dict[str, Tensor]:
        """Each region that overlaps an object is to show its points; all others show none.

        A region is a picture with one object of its own, whose cells are its pixels.
        """
        with torch.no_grad():
            thing = by_iou(said.regions, batch.boxes, batch.valid, low=0.5, high=0.5, rescue=None)
            thing = torch.where(said.valid, thing, -1)
            side = next(iter(said.maps.values()))[0].shape[2]
            labels = torch.where(thing >= 0, 0, -1).reshape(-1, 1)
            size = (said.regions[..., 2:] - said.regions[..., :2]).clamp(min=1e-6) / side
            if batch.boxes.shape[1]:
                of_region = batch.boxes.gather(1, thing.clamp(min=0)[..., None].expand(-1, -1, 4))
                boxes = (of_region - said.regions[..., :2].repeat(1, 1, 2)) / size.repeat(1, 1, 2)
            else:
                boxes = torch.zeros_like(said.regions)
            sizes = torch.full((len(labels), 2), side, device=labels.device)
            inside = DetectionBatch(
                labels.new_zeros(len(labels), 1, side, side), sizes, boxes.reshape(-1, 1, 4), labels
            )
        maps = {name: PointMaps([logits], [offsets]) for name, (logits, offsets) in said.maps.items()}
        return point_losses(maps, inside, [1], weights=self.WEIGHTS)


def _silence(bridge: nn.Module) -> None:
    """Output layers of zeros: nothing is added to the queries."""
    for module in bridge.modules():
        if isinstance(module, BVR):
            for attention in module.attention.values():
                nn.init.zeros_(attention.output.weight)  # type: ignore[union-attr, arg-type]  # a KeyAttention
                nn.init.zeros_(attention.output.bias)  # type: ignore[union-attr, arg-type]


def attach_bvr(detector: Any, **options: Any) -> Any:
    """Put BVR into a RetinaNet, FCOS, ATSS or Faster R-CNN of `provenn.nn.detection`, in place, and return it.

    What the detector takes and gives stays as it is; its training loss gains those of the point head.

    Args:
        detector: its new part takes the device and type of its parameters.
        options: of `Bridge`, or of `RegionBridge` where it is a Faster R-CNN; `preserve=True` for one that is trained.

    Raises:
        TypeError: when it is no such detector.
        ValueError: when it has a bridge already.
    """
    if isinstance(detector, FocalDetector):
        host: Any = detector.head
        bridge: nn.Module = Bridge(detector.neck.widths[0], detector.num_classes, detector.strides, **options)
    elif isinstance(detector, FasterRCNN):
        host = detector
        bridge = RegionBridge(detector.neck.widths[0], detector.classify.in_features, **options)
    else:
        raise TypeError(
            f"expected a RetinaNet, FCOS, ATSS or FasterRCNN of provenn.nn.detection, got {type(detector).__name__}"
        )
    if host.bridge is not None:
        raise ValueError("the detector has a bridge already")
    like = next(detector.parameters())
    host.bridge = bridge.to(device=like.device, dtype=like.dtype).train(detector.training)
    return detector

"""Detectors that look at every cell of a pyramid once: RetinaNet, FCOS and ATSS, on any backbone.

All three are a backbone, a feature pyramid, and a head of two towers that the levels share. They differ in what an
anchor is (nine boxes a cell, a point, one box a cell), in which object it is to find, and in the loss. What changes
the features of a head, as the paper RelationNet++ does, is a `Bridge`. It goes between the towers and the predictions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.narrowing import present
from provenn.nn.backbone import Backbone, FeaturePyramid, crop_features
from provenn.nn.detection.anchors import Anchors, Shape, anchors_of, shapes_of
from provenn.nn.detection.assign import IGNORED, by_atss, by_iou, by_range
from provenn.nn.detection.batch import DetectionBatch, Detections, select
from provenn.nn.detection.boxes import around, decode, distances_of, encode
from provenn.nn.detection.losses import centreness, focal_loss, giou_loss

PRIOR = 0.01  # the probability of an object that a fresh head gives to every anchor


class Bridge(Protocol):
    """An `nn.Module` between the towers and the predictions of a head.

    It is given all levels, from fine to coarse, each (batch, dim, height, width): the pyramid's, and what each tower
    made of them. Cell (row, column) of a level lies at (column + ½, row + ½) · stride in the image.
    """

    def __call__(
        self, levels: list[Tensor], classification: list[Tensor], regression: list[Tensor], strides: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor], Any]:
        """The features that the predictions read, in the same shapes, and whatever `losses` needs."""
        ...

    def losses(self, said: Any, batch: DetectionBatch) -> dict[str, Tensor]:
        """Losses of its own, by name; what it said last is handed back. They are added to the detector's."""
        ...


class DenseOutput(NamedTuple):
    """What a head says of every anchor, in the order of `DenseDetector.anchors`.

    Args:
        logits: of each class.
        offsets: from the anchor to the box, in the detector's code.
        centreness: logits of how central the anchor is to its object; () of detectors without.
        said: by the bridge; () without one.
    """

    logits: Float[Tensor, "batch anchors classes"]
    offsets: Float[Tensor, "batch anchors 4"]
    centreness: Float[Tensor, "batch anchors"] | tuple[()] = ()
    said: Any = ()


class Scored(NamedTuple):
    """What a detector makes of every anchor.

    Args:
        boxes: left, top, right, bottom in pixels; they may reach beyond the image.
        scores: of each class, in 0…1.
        counts: anchors of each level.
    """

    boxes: Float[Tensor, "batch anchors 4"]
    scores: Float[Tensor, "batch anchors classes"]
    counts: list[int]


class Tower(nn.Sequential):
    """3×3 convolutions with a ReLU after each, and before it a group norm where `groups` are given."""

    def __init__(self, dim: int, convs: int, groups: int | None = None):
        layers: list[nn.Module] = []
        for _ in range(convs):
            layers.append(nn.Conv2d(dim, dim, 3, padding=1, bias=groups is None))
            layers += [] if groups is None else [nn.GroupNorm(groups, dim)]
            layers.append(nn.ReLU())
        super().__init__(*layers)


class DenseHead(nn.Module):
    """Two towers that all levels share, and the predictions on them.

    Args:
        dim: channels of the levels and of the towers.
        num_classes: how many.
        anchors: number of anchors a cell.
        convs: of each tower.
        groups: of the towers' group norms; None has none.
        levels: how many; with `centred` each has a factor of its own on its offsets, which starts at 1.
        centred: whether it says how central an anchor is, from the regression tower.

    Attributes:
        bridge: what changes the features between towers and predictions; None passes them on.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        anchors: int = 1,
        convs: int = 4,
        groups: int | None = None,
        levels: int = 5,
        centred: bool = False,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.classification_tower = Tower(dim, convs, groups)
        self.regression_tower = Tower(dim, convs, groups)
        self.bridge: Any = None
        self.classify = nn.Conv2d(dim, anchors * num_classes, 3, padding=1)
        self.regress = nn.Conv2d(dim, anchors * 4, 3, padding=1)
        self.centre = nn.Conv2d(dim, 1, 3, padding=1) if centred else None
        self.scales = nn.Parameter(torch.ones(levels)) if centred else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Nearly all anchors are background: at p = ½ their loss would drown the rest (Lin et al., section 3.3).
        nn.init.constant_(self.classify.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]

    def forward(self, levels: list[Tensor], strides: Sequence[int]) -> DenseOutput:
        classification = [self.classification_tower(level) for level in levels]
        regression = [self.regression_tower(level) for level in levels]
        said: Any = ()
        if self.bridge is not None:
            classification, regression, said = self.bridge(levels, classification, regression, strides)
        logits = torch.cat([by_anchor(self.classify(x), self.num_classes) for x in classification], dim=1)
        offsets = [by_anchor(self.regress(x), 4) for x in regression]
        if self.scales is not None:
            offsets = [x * scale for x, scale in zip(offsets, self.scales, strict=True)]
        centre = () if self.centre is None else torch.cat([self.centre(x).flatten(1) for x in regression], dim=1)
        return DenseOutput(logits, torch.cat(offsets, dim=1), centre, said)


def by_anchor(x: Float[Tensor, "batch channels height width"], numbers: int) -> Float[Tensor, "batch anchors numbers"]:
    """From maps of (anchors · numbers) channels to one row for each anchor."""
    batch, channels, height, width = x.shape  # said in full: of an empty batch no size can be left open
    return x.permute(0, 2, 3, 1).reshape(batch, height * width * channels // numbers, numbers)


class DenseDetector(nn.Module, ABC):
    """The parts that RetinaNet, FCOS, ATSS and SSDLite have in common.

    Args:
        backbone: gives the pyramid; its maps with strides of `finest` and more are used.
        neck: makes levels of one width of them.
        head: what is predicted of the levels.
        shapes: width and height of each level's anchors; None for points.
        finest: stride of the finest map that is used.

    Attributes:
        strides: of the levels.

    Shapes: images (batch, channels, height, width), already standardised, to a `DenseOutput`.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: Any,  # as FeaturePyramid: maps to levels, with their strides
        head: Any,  # as DenseHead: levels to a DenseOutput
        *,
        shapes: list[list[Shape]] | None = None,
        finest: int = 8,
    ):
        super().__init__()
        self.backbone: Any = backbone
        self.neck, self.head, self.shapes = neck, head, shapes
        self.num_classes = head.num_classes
        self.used = used_maps(backbone, finest)
        self.strides = neck.strides

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> DenseOutput:
        return self.head(self.levels(images), self.strides)

    def levels(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The pyramid of images, ⌈side / stride⌉ cells a level."""
        maps = self.backbone.features(images)
        # A level that is made by doubling a coarser one may reach beyond the image.
        return crop_features(self.neck([maps[index] for index in self.used]), self.strides, size_of(images))

    def anchors(self, images: Float[Tensor, "batch channels height width"]) -> Anchors:
        """Where the detector looks, on images of this size."""
        return anchors_of(size_of(images), self.strides, self.shapes, images.device)

    def training_loss(self, batch: DetectionBatch) -> Tensor:
        """The sum of `losses`."""
        return torch.stack(list(self.losses(batch).values())).sum()

    @abstractmethod
    def losses(self, batch: DetectionBatch) -> dict[str, Tensor]:
        """Each loss of a batch by name, already weighted."""

    @staticmethod
    def outside(anchors: Anchors, sizes: Int[Tensor, "batch 2"]) -> Bool[Tensor, "batch anchors"]:
        """Which anchors lie in the padding of each image, whose height and width are `sizes`."""
        x, y = anchors.centres.unbind(dim=1)
        return (y >= sizes[:, :1]) | (x >= sizes[:, 1:])

    @abstractmethod
    def assign(self, anchors: Anchors, batch: DetectionBatch) -> Int[Tensor, "batch anchors"]:
        """The object that each anchor is to find."""

    @abstractmethod
    def boxes_at(self, offsets: Float[Tensor, "... anchors 4"], anchors: Anchors) -> Float[Tensor, "... anchors 4"]:
        """The boxes that the offsets stand for."""

    def scored(
        self, images: Float[Tensor, "batch channels height width"], sizes: Int[Tensor, "batch 2"] | None = None
    ) -> Scored:
        """The box and the scores of every anchor, before any of them goes.

        Args:
            images, sizes: as in `detect`. An anchor outside of its image scores 0.
        """
        output, anchors = self(images), self.anchors(images)
        scores = output.logits.float().sigmoid()
        if isinstance(output.centreness, Tensor):
            scores = (scores * output.centreness.float().sigmoid()[..., None]).sqrt()
        if sizes is None:
            # Whole numbers, not a tensor of them: a tracer of open sizes follows these.
            height, width = size_of(images)
            x, y = anchors.centres.unbind(dim=1)
            outside = ((y >= height) | (x >= width))[None]
        else:
            outside = self.outside(anchors, sizes)
        boxes = self.boxes_at(output.offsets.float(), anchors)
        return Scored(boxes, scores.masked_fill(outside[..., None], 0.0), anchors.counts)

    @torch.no_grad()
    def detect(
        self,
        images: Float[Tensor, "batch channels height width"],
        sizes: Int[Tensor, "batch 2"] | None = None,
        *,
        score_threshold: float | int = 0.05,
        iou_threshold: float | int = 0.5,
        max_detections: int = 100,
        candidates: int = 1000,
    ) -> list[Detections]:
        """What is in each image.

        Args:
            images: standardised as in training; smaller ones padded with zeros below and to the right.
            sizes: height and width without the padding. An image that is padded is seen with a border of zeros, which
                may move its scores a little: what must not depend on its company is given images of one size.
            score_threshold: detections have a score above it.
            iou_threshold: of two boxes of a class with a larger IoU, the one of lower score goes.
            max_detections: the largest number of detections in an image.
            candidates: pairs of an anchor and a class that are looked at on each level, before any goes.
        """
        boxes, scores, counts = self.scored(images, sizes)
        if sizes is None:
            sizes = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
        best, where, start = [], [], 0
        for count in counts:
            level = scores[:, start : start + count].flatten(1)
            value, index = level.topk(min(candidates, level.shape[1]), dim=1)
            best.append(value)
            where.append(index + start * self.num_classes)
            start += count
        surest, pair = torch.cat(best, dim=1), torch.cat(where, dim=1)
        anchor, label = pair // self.num_classes, pair % self.num_classes
        return [
            select(
                boxes[i, anchor[i]],
                surest[i],
                label[i],
                sizes[i],
                score_threshold=score_threshold,
                iou_threshold=iou_threshold,
                max_detections=max_detections,
            )
            for i in range(len(images))
        ]


class FocalDetector(DenseDetector):
    """What RetinaNet, FCOS and ATSS have in common: the focal loss of all anchors, and a head that takes a `Bridge`."""

    def losses(self, batch: DetectionBatch) -> dict[str, Tensor]:
        """Each loss of a batch by name, already weighted; the bridge's begin with "bridge"."""
        output, anchors = self(batch.images), self.anchors(batch.images)
        assigned = self.assign(anchors, batch)
        # What lies in the padding of a smaller image is nobody's to judge.
        assigned = assigned.masked_fill(self.outside(anchors, batch.sizes), IGNORED)
        positive = assigned >= 0
        targets = torch.zeros_like(output.logits, dtype=torch.float32)
        image, anchor = positive.nonzero(as_tuple=True)
        thing = assigned[image, anchor]
        targets[image, anchor, batch.labels[image, thing]] = 1.0
        counted = (assigned != IGNORED)[..., None]
        focal = (focal_loss(output.logits.float(), targets) * counted).sum() / positive.sum().clamp(min=1)
        boxes = self.box_losses(
            output.offsets.float()[image, anchor],
            output.centreness.float()[image, anchor] if isinstance(output.centreness, Tensor) else None,
            Anchors(anchors.boxes[anchor], anchors.strides[anchor], []),
            batch.boxes[image, thing],
        )
        own = {} if self.head.bridge is None else self.head.bridge.losses(output.said, batch)
        return {"classification": focal, **boxes, **{f"bridge {name}": loss for name, loss in own.items()}}

    @abstractmethod
    def box_losses(
        self,
        offsets: Float[Tensor, "positives 4"],
        centre: Float[Tensor, " positives"] | None,
        anchors: Anchors,
        boxes: Float[Tensor, "positives 4"],
    ) -> dict[str, Tensor]:
        """Losses of the anchors that are to find `boxes`."""


def _centred_losses(
    predicted: Tensor, centre: Tensor | None, anchors: Anchors, boxes: Tensor, weight: float = 1.0
) -> dict[str, Tensor]:
    """1 − GIoU, weighted by how central each anchor is to its box, and the cross-entropy of what is said of that."""
    target = centreness(distances_of(boxes, anchors.centres))
    weighted = (target * giou_loss(predicted, boxes)).sum()
    entropy = F.binary_cross_entropy_with_logits(present(centre, "centre"), target, reduction="sum")
    return {"boxes": weight * weighted / target.sum().clamp(min=1e-6), "centreness": entropy / max(1, len(boxes))}


def size_of(images: Tensor) -> tuple[int, int]:
    """Height and width."""
    return images.shape[-2], images.shape[-1]


def used_maps(backbone: Backbone, finest: int) -> list[int]:
    """Which of a backbone's maps have a stride of `finest` or more."""
    used = [index for index, stride in enumerate(backbone.strides) if stride >= finest]
    if not used:
        raise ValueError(
            f"finest must be at most the backbone's coarsest stride, {max(backbone.strides)}, got {finest}"
        )
    return used


def make_neck(backbone: Backbone, finest: int, dim: int, **options: Any) -> FeaturePyramid:
    """The feature pyramid on a backbone's maps with strides of `finest` and more."""
    used = used_maps(backbone, finest)
    return FeaturePyramid(
        [backbone.widths[index] for index in used], [backbone.strides[index] for index in used], dim, **options
    )


class RetinaNet(FocalDetector):
    """RetinaNet (Lin et al., 2017, arXiv:1708.02002): nine anchors a cell, the focal loss, and nothing else.

    An anchor is to find the box that it overlaps most, if by an IoU of 0.5 or more, or if no anchor overlaps some box
    more (see `matching`); else it is background below 0.4. Loss: focal, of all anchors, and smooth L1 of deltas, both
    over the number of positives.

    Args:
        backbone: gives the pyramid.
        num_classes: how many.
        dim, convs: width and depth of the towers.
        groups: of group norms in the towers; the paper has none.
        finest, coarser, finer: the backbone's finest stride that is used, and how many levels are added at each end.
        by: how coarser levels are made: see `FeaturePyramid`.
        scales, ratios: of the anchors: their sides are stride · scale, before height/width is brought to the ratio.
        beta: of smooth L1, where it turns from a square to a line; 0 is L1. Detectron2 has 0.1, MMDetection 0.
        matching: of an anchor that overlaps some box as much as any anchor does. With "torchvision" it finds the box
            that it overlaps most itself, with "mmdetection" the box that has no better anchor.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int = 80,
        dim: int = 256,
        convs: int = 4,
        groups: int | None = None,
        finest: int = 8,
        coarser: int = 2,
        finer: int = 0,
        by: str = "input",
        scales: Sequence[float | int] = (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)),
        ratios: Sequence[float | int] = (0.5, 1.0, 2.0),
        beta: float | int = 0.1,
        matching: str = "torchvision",
    ):
        if matching not in ("torchvision", "mmdetection"):
            raise ValueError(f"matching must be 'torchvision' or 'mmdetection', got {matching!r}")
        neck = make_neck(backbone, finest, dim, coarser=coarser, finer=finer, by=by)
        anchors = len(scales) * len(ratios)
        head = DenseHead(dim, num_classes, anchors=anchors, convs=convs, groups=groups, levels=len(neck.strides))
        super().__init__(backbone, neck, head, shapes=shapes_of(neck.strides, ratios, scales), finest=finest)
        self.beta, self.matching = beta, matching

    @torch.no_grad()
    def assign(self, anchors: Anchors, batch: DetectionBatch) -> Int[Tensor, "batch anchors"]:
        claimed = self.matching == "mmdetection"
        return by_iou(anchors.boxes, batch.boxes, batch.valid, low=0.4, high=0.5, claimed=claimed)

    def box_losses(self, offsets: Tensor, centre: Tensor | None, anchors: Anchors, boxes: Tensor) -> dict[str, Tensor]:
        loss = F.smooth_l1_loss(offsets, encode(boxes, anchors.boxes), reduction="sum", beta=self.beta)
        return {"boxes": loss / max(1, len(boxes))}

    def boxes_at(self, offsets: Float[Tensor, "... anchors 4"], anchors: Anchors) -> Float[Tensor, "... anchors 4"]:
        return decode(offsets, anchors.boxes)


class FCOS(FocalDetector):
    """FCOS (Tian et al., 2019, arXiv:1904.01355): no anchor boxes. Each point in an object predicts its sides.

    A point is to find the smallest box around it whose farthest side lies in the range of its level and whose centre is
    at most `radius` strides away on either axis. Loss: focal; 1 − GIoU, weighted by the target's centreness; binary
    cross-entropy of the centreness. Scores are √(class · centreness).

    The improvements of the paper's last version are the defaults: centre sampling, GIoU, centreness from the regression
    tower, and distances in strides through a ReLU instead of an exponential.

    Args:
        backbone, num_classes, dim, convs, groups, finest, coarser, finer, by: as of `RetinaNet`. Convolutions before a
            group norm have no bias.
        radius: of centre sampling, in strides; None takes all points inside a box.
        reach: the largest distance to a side that the finest level is for, in strides; that of each level goes on
            where the last one's ends, to twice as far, and the last has no end. 8 gives 64, 128, 256, 512 and ∞ pixels.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int = 80,
        dim: int = 256,
        convs: int = 4,
        groups: int | None = 32,
        finest: int = 8,
        coarser: int = 2,
        finer: int = 0,
        by: str = "output",
        radius: float | int | None = 1.5,
        reach: float | int = 8,
    ):
        neck = make_neck(backbone, finest, dim, coarser=coarser, finer=finer, by=by)
        levels = len(neck.strides)
        head = DenseHead(dim, num_classes, convs=convs, groups=groups, levels=levels, centred=True)
        super().__init__(backbone, neck, head, finest=finest)
        ends = [0.0, *(float(reach * stride) for stride in neck.strides[:-1]), math.inf]
        self.ranges = list(pairwise(ends))
        self.radius = radius

    @torch.no_grad()
    def assign(self, anchors: Anchors, batch: DetectionBatch) -> Int[Tensor, "batch anchors"]:
        return by_range(anchors, batch.boxes, batch.valid, ranges=self.ranges, radius=self.radius)

    def box_losses(self, offsets: Tensor, centre: Tensor | None, anchors: Anchors, boxes: Tensor) -> dict[str, Tensor]:
        return _centred_losses(self.boxes_at(offsets, anchors), centre, anchors, boxes)

    def boxes_at(self, offsets: Float[Tensor, "... anchors 4"], anchors: Anchors) -> Float[Tensor, "... anchors 4"]:
        return around(anchors.centres, offsets.relu() * anchors.strides[:, None])


class ATSS(FocalDetector):
    """ATSS (Zhang et al., 2020, arXiv:1912.02424): one anchor a cell, and a threshold for each object.

    Which anchors are to find an object follows from the mean and deviation of its candidates' IoUs: see `by_atss`.
    Loss: focal; 2 (1 − GIoU), weighted by the anchor's centreness; binary cross-entropy of the centreness. Scores are
    √(class · centreness).

    Args:
        backbone, num_classes, dim, convs, groups, finest, coarser, finer, by: as of `FCOS`.
        scale: side of the anchors, in strides.
        candidates: k, the anchors of each level that are looked at for each object.
    """

    STDS = (0.1, 0.1, 0.2, 0.2)

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int = 80,
        dim: int = 256,
        convs: int = 4,
        groups: int | None = 32,
        finest: int = 8,
        coarser: int = 2,
        finer: int = 0,
        by: str = "output",
        scale: float | int = 8,
        candidates: int = 9,
    ):
        neck = make_neck(backbone, finest, dim, coarser=coarser, finer=finer, by=by)
        levels = len(neck.strides)
        head = DenseHead(dim, num_classes, convs=convs, groups=groups, levels=levels, centred=True)
        super().__init__(backbone, neck, head, shapes=shapes_of(neck.strides, (1,), (scale,)), finest=finest)
        self.candidates = candidates

    @torch.no_grad()
    def assign(self, anchors: Anchors, batch: DetectionBatch) -> Int[Tensor, "batch anchors"]:
        return by_atss(anchors, batch.boxes, batch.valid, candidates=self.candidates)

    def box_losses(self, offsets: Tensor, centre: Tensor | None, anchors: Anchors, boxes: Tensor) -> dict[str, Tensor]:
        return _centred_losses(self.boxes_at(offsets, anchors), centre, anchors, boxes, weight=2.0)

    def boxes_at(self, offsets: Float[Tensor, "... anchors 4"], anchors: Anchors) -> Float[Tensor, "... anchors 4"]:
        return decode(offsets, anchors.boxes, self.STDS)

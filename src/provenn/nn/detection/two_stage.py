"""Faster R-CNN (Ren et al., 2015, arXiv:1506.01497) on a feature pyramid (Lin et al., 2017, arXiv:1612.03144).

The first stage proposes boxes, whatever is in them; the second looks at the features inside each and says what it is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.backbone import Backbone, crop_features
from provenn.nn.detection.anchors import Anchors, anchors_of, shapes_of
from provenn.nn.detection.assign import BACKGROUND, IGNORED, by_iou
from provenn.nn.detection.batch import DetectionBatch, Detections, select
from provenn.nn.detection.boxes import areas_of, clip, decode, encode
from provenn.nn.detection.dense import make_neck, size_of, used_maps
from provenn.nn.detection.nms import nms

USUAL = 224  # pixels: a region of this side, as ImageNet's photographs have, is read from the level of `USUAL_STRIDE`
USUAL_STRIDE = 16

Regions = Float[Tensor, "batch regions 4"]
Pool = Callable[[Regions, int], Float[Tensor, "batch regions dim size size"]]


class RegionBridge(Protocol):
    """An `nn.Module` between the layers and the predictions of the second stage.

    It is given the regions, in pixels of the image, and which of them are no padding. Further come `pool(regions,
    size)`, which gives the features inside regions on a grid of size × size, and the features that class and box are
    predicted from.
    """

    def __call__(
        self,
        regions: Regions,
        valid: Bool[Tensor, "batch regions"],
        pool: Pool,
        classification: Float[Tensor, "batch regions width"],
        regression: Float[Tensor, "batch regions width"],
    ) -> tuple[Tensor, Tensor, Any]:
        """The features that the predictions read, in the same shapes, and whatever `losses` needs."""
        ...

    def losses(self, said: Any, batch: DetectionBatch) -> dict[str, Tensor]:
        """Losses of its own, by name; what it said last is handed back. They are added to the detector's."""
        ...


class Proposals(NamedTuple):
    """What the first stage says.

    Args:
        objectness: logits that an anchor holds something.
        deltas: from anchors to boxes.
        regions: the best boxes, zeros where there are fewer.
        valid: which are no such padding.
    """

    objectness: Float[Tensor, "batch anchors"]
    deltas: Float[Tensor, "batch anchors 4"]
    regions: Regions
    valid: Bool[Tensor, "batch regions"]


class RegionOutput(NamedTuple):
    """What both stages say.

    Args:
        proposals: of the first.
        logits: of each class, the last of them "nothing", for each region.
        deltas: from each region to the box, one for each class.
        said: by the bridge; () without one.
    """

    proposals: Proposals
    logits: Float[Tensor, "batch regions classes1"]
    deltas: Float[Tensor, "batch regions classes 4"]
    said: Any = ()


def roi_align(
    levels: Sequence[Float[Tensor, "batch dim _ _"]],
    strides: Sequence[int],
    regions: Regions,
    size: int = 7,
    samples: int = 2,
) -> Float[Tensor, "batch regions dim size size"]:
    """The mean of the features at points in each cell of a grid over each region (He et al., 2017, arXiv:1703.06870).

    Each cell has samples × samples points, at which the map is interpolated between the middles of its cells; beyond
    the outermost middles it is continued. A region of side s is read from the level of stride 16 · 2^⌊log₂(s/224)⌋,
    or the nearest that there is (Lin et al., equation 1).

    The maps of all levels and images become one table with a row a cell, and a sum of weighted rows gives each mean at
    once. There is no loop over regions or levels, and nothing of the size of all points is ever held.

    Args:
        levels: the pyramid's, each stride twice the last.
        strides: of the levels.
        regions: left, top, right, bottom in pixels of the image.
        size: of the grid.
        samples: points along each side of a cell.
    """
    batch, count = regions.shape[:2]
    dim, device = levels[0].shape[1], regions.device
    side = areas_of(regions).sqrt().clamp(min=1e-6)
    ideal = torch.floor(torch.log2(side / USUAL) + 1e-6) + math.log2(USUAL_STRIDE / strides[0])
    level = ideal.clamp(0, len(levels) - 1).long()
    heights, widths = (torch.tensor([x.shape[d] for x in levels], device=device)[level] for d in (2, 3))
    cells = torch.tensor([x.shape[2] * x.shape[3] for x in levels], device=device)
    first = (cells.cumsum(0) - cells)[level] + torch.arange(batch, device=device)[:, None] * cells.sum()
    stride = torch.tensor(list(strides), device=device)[level]

    points = (torch.arange(size * samples, dtype=regions.dtype, device=device) + 0.5) / (size * samples)
    low, span = regions[..., :2], regions[..., 2:] - regions[..., :2]
    at = (low[..., None] + span[..., None] * points) / stride[..., None, None] - 0.5
    x, y = at.unbind(dim=2)  # each (batch, regions, points)
    columns, across = _between(x, widths)
    rows, down = _between(y, heights)
    # (batch, regions, points in y, 2, points in x, 2): the four cells around each point, and their weights.
    index = first[..., None, None, None, None] + rows[..., None, None] * widths[..., None, None, None, None]
    index = index + columns[:, :, None, None]
    weight = down[..., None, None] * across[:, :, None, None]
    table = torch.cat([m.flatten(2) for m in levels], dim=2).transpose(1, 2).reshape(-1, dim)
    pooled = F.embedding_bag(
        _by_cell(index, size, samples),
        table,
        mode="sum",
        per_sample_weights=(_by_cell(weight, size, samples) / samples**2).to(table.dtype),
    )
    return pooled.view(batch, count, size, size, dim).permute(0, 1, 4, 2, 3)


def _between(position: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The two neighbours of each position on an axis, in [0, length), and the weight of each: (…, points, 2)."""
    last = length[..., None] - 1
    position = torch.minimum(position.clamp(min=0), last.to(position))
    low = position.floor().long()
    share = position - low
    return torch.stack([low, torch.minimum(low + 1, last)], dim=-1), torch.stack([1 - share, share], dim=-1)


def _by_cell(x: Tensor, size: int, samples: int) -> Tensor:
    """From (batch, regions, points in y, 2, points in x, 2) to a row a cell of the grid."""
    batch, count = x.shape[:2]
    x = x.view(batch, count, size, samples, 2, size, samples, 2)
    return x.permute(0, 1, 2, 5, 3, 4, 6, 7).reshape(batch * count * size * size, -1)


class FasterRCNN(nn.Module):
    """A region proposal network, and a head of two layers on the features that RoIAlign reads inside its proposals.

    First stage: three anchors a cell, positive at an IoU of 0.7 (or the best of a box), negative below 0.3. Of 256
    anchors an image, half of them positive at most, binary cross-entropy and smooth L1. Second stage: a region is
    positive at an IoU of 0.5; of 512 regions an image, a quarter of them positive at most, cross-entropy and smooth L1.

    Args:
        backbone: gives the pyramid; its maps with strides of `finest` and more are used.
        num_classes: how many, without "nothing".
        dim: channels of the levels.
        width: of the head's two layers.
        finest, coarser: as of `RetinaNet`; the coarsest level takes every other cell and is for proposals alone.
        scale, ratios: of the anchors, whose side is stride · scale.
        regions: proposals that are looked at, at most.
        candidates: anchors of each level that are looked at before overlapping ones go.
        sampled: anchors and regions of an image that count in the loss, at most.

    Attributes:
        bridge: what changes the features between the two layers and the predictions; None passes them on.
        strides: of the levels.

    Shapes: images (batch, channels, height, width), already standardised, to a `RegionOutput`.
    """

    STDS = (0.1, 0.1, 0.2, 0.2)

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int = 80,
        dim: int = 256,
        width: int = 1024,
        finest: int = 4,
        coarser: int = 1,
        scale: float | int = 8,
        ratios: Sequence[float | int] = (0.5, 1.0, 2.0),
        regions: int = 1000,
        candidates: int = 1000,
        sampled: tuple[int, int] = (256, 512),
    ):
        super().__init__()
        self.backbone: Any = backbone
        self.neck = make_neck(backbone, finest, dim, coarser=coarser, by="pool")
        self.used, self.strides, self.num_classes = used_maps(backbone, finest), self.neck.strides, num_classes
        self.read = len(self.used)  # levels that regions are read from
        self.shapes = shapes_of(self.strides, ratios, (scale,))
        self.regions, self.candidates, self.sampled = regions, candidates, sampled
        self.propose = nn.Conv2d(dim, dim, 3, padding=1)
        self.objectness = nn.Conv2d(dim, len(ratios), 1)
        self.anchor_deltas = nn.Conv2d(dim, 4 * len(ratios), 1)
        self.layers = nn.Sequential(nn.Linear(dim * 7 * 7, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.bridge: Any = None
        self.classify = nn.Linear(width, num_classes + 1)
        self.regress = nn.Linear(width, 4 * num_classes)
        predictions: list[Any] = [self.propose, self.objectness, self.anchor_deltas, self.classify, self.regress]
        for module in predictions:
            nn.init.normal_(module.weight, std=0.001 if module is self.regress else 0.01)
            nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> RegionOutput:
        levels = self.levels(images)
        proposals = self.proposals(levels, images)
        return self.look(levels, proposals, proposals.regions, proposals.valid)

    def levels(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The pyramid of images, ⌈side / stride⌉ cells a level."""
        maps = self.backbone.features(images)
        return crop_features(self.neck([maps[index] for index in self.used]), self.strides, size_of(images))

    def anchors(self, images: Float[Tensor, "batch channels height width"]) -> Anchors:
        """The anchors of images of this size."""
        return anchors_of(size_of(images), self.strides, self.shapes, images.device)

    def proposals(self, levels: list[Tensor], images: Tensor, sizes: Tensor | None = None) -> Proposals:
        """The first stage; of each image the best boxes that overlap by no more than an IoU of 0.7."""
        features = [self.propose(level).relu() for level in levels]
        objectness = torch.cat([self.objectness(x).permute(0, 2, 3, 1).flatten(1) for x in features], dim=1)
        deltas = torch.cat([self.anchor_deltas(x).permute(0, 2, 3, 1).flatten(1) for x in features], dim=1)
        deltas = deltas.unflatten(1, (-1, 4))
        regions, valid = self._best(objectness.detach().float(), deltas.detach().float(), images, sizes)
        return Proposals(objectness, deltas, regions, valid)

    @torch.no_grad()
    def _best(self, objectness: Tensor, deltas: Tensor, images: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        anchors = self.anchors(images)
        if sizes is None:
            sizes = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
        x, y = anchors.centres.unbind(dim=1)
        objectness = objectness.masked_fill((y >= sizes[:, :1]) | (x >= sizes[:, 1:]), -torch.inf)
        boxes = clip(decode(deltas, anchors.boxes), sizes)
        chosen, start = [], 0
        for count in anchors.counts:
            level = objectness[:, start : start + count]
            chosen.append(level.topk(min(self.candidates, count), dim=1).indices + start)
            start += count
        best = torch.cat(chosen, dim=1)
        regions = boxes.new_zeros(len(images), min(self.regions, best.shape[1]), 4)
        valid = torch.zeros(regions.shape[:2], dtype=torch.bool, device=images.device)
        for i, row in enumerate(best):
            # Boxes of different levels are of different sizes and do not suppress each other.
            row = row[(areas_of(boxes[i, row]) > 0) & objectness[i, row].isfinite()]
            row = row[nms(boxes[i, row], objectness[i, row], anchors.levels[row], 0.7, regions.shape[1])]
            regions[i, : len(row)], valid[i, : len(row)] = boxes[i, row], True
        return regions, valid

    def look(self, levels: list[Tensor], proposals: Proposals, regions: Tensor, valid: Tensor) -> RegionOutput:
        """The second stage, on these regions."""

        def pool(regions: Tensor, size: int) -> Tensor:
            return roi_align(levels[: self.read], self.strides[: self.read], regions, size)

        features = self.layers(pool(regions, 7).flatten(2))
        classification = regression = features
        said: Any = ()
        if self.bridge is not None:
            classification, regression, said = self.bridge(regions, valid, pool, features, features)
        deltas = self.regress(regression).unflatten(-1, (self.num_classes, 4))
        return RegionOutput(proposals, self.classify(classification), deltas, said)

    def training_loss(self, batch: DetectionBatch) -> Tensor:
        """The sum of `losses`."""
        return torch.stack(list(self.losses(batch).values())).sum()

    def losses(self, batch: DetectionBatch) -> dict[str, Tensor]:
        """Each loss of a batch by name; the bridge's begin with "bridge". Draws from torch's global generator."""
        levels, anchors = self.levels(batch.images), self.anchors(batch.images)
        proposals = self.proposals(levels, batch.images, batch.sizes)
        with torch.no_grad():
            assigned = by_iou(anchors.boxes, batch.boxes, batch.valid, low=0.3, high=0.7, rescue=0.3)
            x, y = anchors.centres.unbind(dim=1)
            assigned = assigned.masked_fill((y >= batch.sizes[:, :1]) | (x >= batch.sizes[:, 1:]), IGNORED)
            assigned = sample(assigned, self.sampled[0], 0.5)
            # The objects themselves are regions too, so that there are positives from the start.
            regions = torch.cat([batch.boxes, proposals.regions], dim=1)
            valid = torch.cat([batch.valid, proposals.valid], dim=1)
            looked_at = by_iou(regions, batch.boxes, batch.valid, low=0.5, high=0.5, rescue=None)
            looked_at = sample(looked_at.masked_fill(~valid, IGNORED), self.sampled[1], 0.25)
            # Those that count come first, and the rest is left out.
            order = (looked_at == IGNORED).long().argsort(dim=1, stable=True)[:, : self.sampled[1]]
            looked_at = looked_at.gather(1, order)
            regions = regions.gather(1, order[..., None].expand(-1, -1, 4))
        positive, counted = assigned >= 0, assigned != IGNORED
        image, anchor = positive.nonzero(as_tuple=True)
        boxes = batch.boxes[image, assigned[image, anchor]]
        count = counted.sum().clamp(min=1)
        first = F.binary_cross_entropy_with_logits(
            proposals.objectness.float()[counted], positive[counted].float(), reduction="sum"
        )
        wanted = encode(boxes, anchors.boxes[anchor])
        near = F.smooth_l1_loss(proposals.deltas.float()[image, anchor], wanted, reduction="sum", beta=1 / 9)

        output = self.look(levels, proposals, regions, looked_at != IGNORED)
        image, region = (looked_at >= 0).nonzero(as_tuple=True)
        thing = looked_at[image, region]
        label = batch.labels[image, thing]
        classes = torch.full_like(looked_at, self.num_classes)
        classes[image, region] = label
        classes = classes.masked_fill(looked_at == IGNORED, IGNORED)
        number = (looked_at != IGNORED).sum().clamp(min=1)
        named = F.cross_entropy(
            output.logits.float().flatten(0, 1), classes.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        wanted = encode(batch.boxes[image, thing], regions[image, region], self.STDS)
        moved = F.smooth_l1_loss(output.deltas.float()[image, region, label], wanted, reduction="sum", beta=1.0)
        own = {} if self.bridge is None else self.bridge.losses(output.said, batch)
        return {
            "objectness": first / count,
            "proposals": near / count,
            "classification": named / number,
            "boxes": moved / number,
            **{f"bridge {name}": loss for name, loss in own.items()},
        }

    @torch.no_grad()
    def detect(
        self,
        images: Float[Tensor, "batch channels height width"],
        sizes: Int[Tensor, "batch 2"] | None = None,
        *,
        score_threshold: float | int = 0.05,
        iou_threshold: float | int = 0.5,
        max_detections: int = 100,
    ) -> list[Detections]:
        """What is in each image; the arguments are those of `DenseDetector.detect`."""
        levels = self.levels(images)
        proposals = self.proposals(levels, images, sizes)
        output = self.look(levels, proposals, proposals.regions, proposals.valid)
        scores = output.logits.float().softmax(dim=-1)[..., :-1] * proposals.valid[..., None]
        boxes = decode(output.deltas.float(), proposals.regions[:, :, None], self.STDS)
        if sizes is None:
            sizes = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
        labels = torch.arange(self.num_classes, device=images.device).expand(scores.shape[1:]).flatten()
        return [
            select(
                boxes[i].flatten(0, 1),
                scores[i].flatten(),
                labels,
                sizes[i],
                score_threshold=score_threshold,
                iou_threshold=iou_threshold,
                max_detections=max_detections,
            )
            for i in range(len(images))
        ]


def sample(assigned: Int[Tensor, "batch anchors"], count: int, share: float) -> Int[Tensor, "batch anchors"]:
    """Ignore all but a random `count` of the anchors of each image, of which at most `share` are positive.

    What is missing of positives is made up by background.
    """
    noise = torch.rand(assigned.shape, device=assigned.device)
    positive = _random_few(assigned >= 0, noise, torch.full_like(assigned[:, :1], int(count * share)))
    rest = count - positive.sum(dim=1, keepdim=True)
    return assigned.masked_fill(~(positive | _random_few(assigned == BACKGROUND, noise, rest)), IGNORED)


def _random_few(
    members: Bool[Tensor, "batch anchors"], noise: Tensor, count: Int[Tensor, "batch 1"]
) -> Bool[Tensor, "batch anchors"]:
    rank = noise.masked_fill(~members, 2.0).argsort(dim=1).argsort(dim=1)
    return members & (rank < count)

"""SSDLite (Sandler et al., 2018, arXiv:1801.04381): SSD's default boxes under depth-wise separable layers.

SSD (Liu et al., 2016, arXiv:1512.02325) predicts on maps as they are, without a pyramid's way back, one predictor a
level; the levels beyond the backbone's are made by strides of 2. An anchor is one box of a cell, and "nothing" a class.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.backbone import Backbone, ceil_div
from provenn.nn.detection.anchors import Anchors
from provenn.nn.detection.assign import BACKGROUND, IGNORED, by_best
from provenn.nn.detection.batch import DetectionBatch, Detections
from provenn.nn.detection.boxes import decode, encode
from provenn.nn.detection.dense import DenseDetector, DenseOutput, by_anchor, size_of, used_maps

EPS, MOMENTUM = 1e-3, 0.03  # of the batch norms
NEAR_ZERO = 1e-7  # the least probability of a complement, so that odds are finite


def default_shapes(
    levels: int, scales: tuple[float, float], ratios: Sequence[float | int]
) -> list[list[tuple[float, float]]]:
    """Width and height of each level's boxes, in parts of the image (SSD, equation 4).

    The scale s_k rises evenly over the levels. A square of s_k, one of √(s_k s_{k+1}), s of the level after the last
    being 1, and for each ratio r boxes of s_k √r × s_k / √r, lying and standing.

    >>> [[round(side, 2) for side in shape] for shape in default_shapes(2, (0.25, 0.5), (4,))[0]]
    [[0.25, 0.25], [0.35, 0.35], [0.5, 0.12], [0.12, 0.5]]
    """
    low, high = scales
    if levels < 1 or not 0 < low <= high <= 1 or min(ratios, default=1) <= 0:
        raise ValueError(
            "levels must be at least 1, scales rise between 0 and 1, and ratios be positive, got "
            f"{levels}, {scales} and {tuple(ratios)}"
        )
    rising = [low + (high - low) * k / max(levels - 1, 1) for k in range(levels)] + [1.0]
    shapes = []
    for s, following in pairwise(rising):
        between = (s * following) ** 0.5
        oblong = [shape for r in ratios for shape in ((s * r**0.5, s / r**0.5), (s / r**0.5, s * r**0.5))]
        shapes.append([(s, s), (between, between), *oblong])
    return shapes


def default_boxes(
    size: tuple[int, int],
    strides: Sequence[int],
    shapes: Sequence[Sequence[tuple[float, float]]],
    device: torch.device | None = None,
) -> Anchors:
    """SSD's boxes of an image: those of cell i of n stand at (i + ½) / n of its side.

    Unlike anchors that stand at multiples of the stride they are spread over the whole image and no farther, also where
    the stride divides no side. They stretch with it, as SSD stretches images to a square.

    Args:
        size: height and width of the image. A level has ⌈side / stride⌉ cells.
        strides: of the levels, from fine to coarse.
        shapes: width and height of each level's boxes, in parts of the image.
    """
    height, width = size
    boxes, spacing = [], []
    for stride, given in zip(strides, shapes, strict=True):
        rows, columns = ceil_div(height, stride), ceil_div(width, stride)
        y = (torch.arange(rows, device=device) + 0.5) * height / rows
        x = (torch.arange(columns, device=device) + 0.5) * width / columns
        centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 1, 2)
        across, down = torch.tensor(given, dtype=torch.float32, device=device).unbind(dim=1)
        half = torch.stack([across * width, down * height], dim=-1) / 2
        boxes.append(torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4))
        spacing.append(torch.full((boxes[-1].shape[0],), float(stride), device=device))
    return Anchors(torch.cat(boxes), torch.cat(spacing), [level.shape[0] for level in boxes])


def mine_negatives(
    losses: Float[Tensor, "batch anchors"], assigned: Int[Tensor, "batch anchors"], ratio: float | int
) -> Bool[Tensor, "batch anchors"]:
    """Of each image's background the anchors of the greatest loss, `ratio` times as many as it has positives.

    An image without positives counts as one with one. SSD leaves it out; then a batch of empty images has no loss.
    """
    background = assigned == BACKGROUND
    wanted = (ratio * (assigned >= 0).sum(dim=1).clamp(min=1)).long()
    # The rank of each anchor in falling order of losses; whatever is no background comes last.
    order = losses.detach().masked_fill(~background, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return background & (rank < wanted[:, None])


def _convolution(dim: int, dim_out: int, size: int = 1, stride: int = 1) -> list[nn.Module]:
    """1×1, or a filter of each channel; batch norm; ReLU6."""
    groups = dim if size > 1 else 1
    return [
        nn.Conv2d(dim, dim_out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(dim_out, eps=EPS, momentum=MOMENTUM),
        nn.ReLU6(),
    ]


class ExtraLevels(nn.Module):
    """Maps as they are, and coarser ones: 1×1 to half of the new width, depth-wise 3×3 of stride 2, 1×1.

    Args:
        widths, strides: of the maps that it is given, from fine to coarse.
        extra: widths of the levels to add.

    Attributes:
        widths, strides: of the levels that it gives.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], extra: Sequence[int]):
        super().__init__()
        if min(extra, default=2) < 2:
            raise ValueError(f"extra levels must be at least 2 wide, got {tuple(extra)}")
        self.widths = [*widths, *extra]
        self.strides = [*strides, *(strides[-1] * 2**k for k in range(1, len(extra) + 1))]
        self.extra = nn.ModuleList(
            nn.Sequential(
                *_convolution(before, width // 2),
                *_convolution(width // 2, width // 2, 3, 2),
                *_convolution(width // 2, width),
            )
            for before, width in zip(self.widths[len(widths) - 1 :], extra)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.03)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = list(maps)
        for layer in self.extra:
            levels.append(layer(levels[-1]))
        return levels


class SeparableHead(nn.Module):
    """Two predictors a level, each a depth-wise 3×3 convolution and a 1×1.

    Args:
        widths: of the levels.
        num_classes: how many; "nothing" is one more, the last.
        anchors: boxes a cell.
    """

    bridge = None  # levels of many widths have no features in common that could be changed

    def __init__(self, widths: Sequence[int], num_classes: int, anchors: int):
        super().__init__()
        self.num_classes = num_classes

        def predictors(numbers: int) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Sequential(*_convolution(width, width, 3), nn.Conv2d(width, anchors * numbers, 1))
                for width in widths
            )

        self.classify, self.regress = predictors(num_classes + 1), predictors(4)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def predict(
        self, levels: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "batch anchors classes_and_nothing"], Float[Tensor, "batch anchors 4"]]:
        """What the softmax is of, and the offsets."""
        said = [by_anchor(f(x), self.num_classes + 1) for f, x in zip(self.classify, levels, strict=True)]
        offsets = [by_anchor(f(x), 4) for f, x in zip(self.regress, levels, strict=True)]
        return torch.cat(said, dim=1), torch.cat(offsets, dim=1)

    def forward(self, levels: list[Tensor], strides: Sequence[int]) -> DenseOutput:
        """Logits as other heads have them: log p / (1 − p), whose sigmoid is what the softmax gives the class."""
        said, offsets = self.predict(levels)
        p = said.float().softmax(dim=-1)[..., :-1]
        odds = p.clamp(min=NEAR_ZERO).log() - (1 - p).clamp(min=NEAR_ZERO).log()
        return DenseOutput(odds.to(said.dtype), offsets)


class SSDLite(DenseDetector):
    """SSDLite (Sandler et al., 2018, arXiv:1801.04381), as mobile networks are compared with on COCO.

    A default box is to find the object that it overlaps by an IoU of 0.5 or more; and the box that an object overlaps
    most finds it in any case. Loss: cross-entropy of a softmax over the classes and nothing, of the positives and of
    three times as many negatives, the hardest of each image. Also smooth L1 of offsets in units of 0.1 (centre) and 0.2
    (log size); both over the number of positives.

    The defaults are those of images of 320 pixels over maps of strides 16 and 32: six levels.

    Args:
        backbone: gives the first levels.
        num_classes: how many.
        finest: stride of the backbone's finest map that is used.
        extra: widths of the levels beyond.
        scales: of the boxes of the first and the last level, in parts of the image's side.
        ratios: of the oblong boxes, each lying and standing.
        negatives: how many are counted for each positive.

    Attributes:
        strides: of the levels.
    """

    STDS = (0.1, 0.1, 0.2, 0.2)

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int = 80,
        finest: int = 16,
        extra: Sequence[int] = (512, 256, 256, 128),
        scales: tuple[float, float] = (0.15, 0.95),
        ratios: Sequence[float | int] = (2, 3),
        negatives: float | int = 3,
    ):
        if num_classes < 1 or negatives <= 0:
            raise ValueError(
                f"num_classes must be at least 1 and negatives positive, got {num_classes} and {negatives}"
            )
        used = used_maps(backbone, finest)
        neck = ExtraLevels([backbone.widths[i] for i in used], [backbone.strides[i] for i in used], extra)
        shapes = default_shapes(len(neck.widths), scales, ratios)
        head = SeparableHead(neck.widths, num_classes, anchors=len(shapes[0]))
        super().__init__(backbone, neck, head, shapes=shapes, finest=finest)
        self.negatives = negatives

    def anchors(self, images: Float[Tensor, "batch channels height width"]) -> Anchors:
        shapes = cast(list[list[tuple[float, float]]], self.shapes)
        return default_boxes(size_of(images), self.strides, shapes, images.device)

    @torch.no_grad()
    def assign(self, anchors: Anchors, batch: DetectionBatch) -> Int[Tensor, "batch anchors"]:
        return by_best(anchors.boxes, batch.boxes, batch.valid, high=0.5)

    def losses(self, batch: DetectionBatch) -> dict[str, Tensor]:
        said, offsets = self.head.predict(self.levels(batch.images))
        anchors = self.anchors(batch.images)
        assigned = self.assign(anchors, batch).masked_fill(self.outside(anchors, batch.sizes), IGNORED)
        image, anchor = (assigned >= 0).nonzero(as_tuple=True)
        thing = assigned[image, anchor]
        targets = torch.full_like(assigned, self.num_classes)
        targets[image, anchor] = batch.labels[image, thing]
        entropy = F.cross_entropy(said.float().transpose(1, 2), targets, reduction="none")
        counted = (assigned >= 0) | mine_negatives(entropy, assigned, self.negatives)
        wanted = encode(batch.boxes[image, thing], anchors.boxes[anchor], self.STDS)
        distance = F.smooth_l1_loss(offsets.float()[image, anchor], wanted, reduction="sum")
        positives = max(1, len(image))
        return {"classification": (entropy * counted).sum() / positives, "boxes": distance / positives}

    def boxes_at(self, offsets: Float[Tensor, "... anchors 4"], anchors: Anchors) -> Float[Tensor, "... anchors 4"]:
        return decode(offsets, anchors.boxes, self.STDS)

    def detect(
        self,
        images: Float[Tensor, "batch channels height width"],
        sizes: Int[Tensor, "batch 2"] | None = None,
        *,
        score_threshold: float | int = 0.02,
        iou_threshold: float | int = 0.45,
        max_detections: int = 200,
        candidates: int = 1000,
    ) -> list[Detections]:
        """What is in each image: see `DenseDetector.detect`, with SSD's thresholds."""
        return super().detect(
            images,
            sizes,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            candidates=candidates,
        )

"""Non-maximum suppression: of boxes that say the same, the surest."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provenn.nn.detection.boxes import iou

BLOCK = 512  # boxes that are compared with each other at a time


def nms(
    boxes: Float[Tensor, "boxes 4"],
    scores: Float[Tensor, " boxes"],
    labels: Int[Tensor, " boxes"] | None = None,
    threshold: float | int = 0.5,
    max_detections: int | None = None,
) -> Int[Tensor, " kept"]:
    """The boxes that no surer kept box of their class overlaps by more than `threshold`, the surest first.

        kept_i = ¬ ∃ j < i: kept_j ∧ class_j = class_i ∧ IoU(j, i) > threshold,   in falling order of scores.

    Taken in blocks: a block loses what earlier kept boxes overlap, and within it the equation is iterated from "all
    kept". After n rounds the first n are right whatever follows, so that it ends, at the definition; chains of boxes
    that suppress each other are short, and a few rounds do.

    Args:
        boxes, scores: of one image. Boxes of equal score keep their order.
        labels: a class each; without, all are of one.
        threshold: of the IoU.
        max_detections: stop after so many.

    Returns:
        Indices into `boxes`.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    labels = torch.zeros_like(order) if labels is None else labels[order]
    kept = order.new_zeros(0)
    for start in range(0, len(order), BLOCK):
        block = torch.arange(start, min(start + BLOCK, len(order)), device=order.device)
        free = ~_overlaps(boxes, labels, kept, block, threshold).any(dim=0)
        block = block[free]
        kept = torch.cat([kept, block[_settle(_overlaps(boxes, labels, block, block, threshold))]])
        if max_detections is not None and len(kept) >= max_detections:
            break
    return order[kept[:max_detections]]


def _overlaps(boxes: Tensor, labels: Tensor, first: Tensor, second: Tensor, threshold: float) -> Bool[Tensor, "n m"]:
    same = labels[first][:, None] == labels[second]
    return (iou(boxes[first], boxes[second]) > threshold) & same


def _settle(overlaps: Bool[Tensor, "n n"]) -> Bool[Tensor, " n"]:
    """The solution of kept_i = ¬ ∃ j < i: kept_j ∧ overlaps_ji."""
    before = overlaps.triu(diagonal=1)
    kept = torch.ones(len(overlaps), dtype=torch.bool, device=overlaps.device)
    while True:
        again = ~(before & kept[:, None]).any(dim=0)
        if torch.equal(again, kept):
            return kept
        kept = again

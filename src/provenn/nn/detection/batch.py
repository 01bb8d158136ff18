"""What a detector is given and what it gives."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.nn.detection.boxes import clip
from provenn.nn.detection.nms import nms

NO_OBJECT = -1  # the label of padding


class DetectionBatch(NamedTuple):
    """Images of several sizes with their objects.

    Args:
        images: zeros below and to the right of those that are smaller than the largest.
        sizes: height and width of each image without that.
        boxes: left, top, right, bottom in pixels; zeros where an image has fewer than another.
        labels: a class each; `NO_OBJECT` there.
    """

    images: Float[Tensor, "batch channels height width"]
    sizes: Int[Tensor, "batch 2"]
    boxes: Float[Tensor, "batch objects 4"]
    labels: Int[Tensor, "batch objects"]

    @property
    def valid(self) -> Bool[Tensor, "batch objects"]:
        """Which boxes are no padding."""
        return self.labels != NO_OBJECT


class Detections(NamedTuple):
    """What was found in one image, the surest first."""

    boxes: Float[Tensor, "found 4"]
    scores: Float[Tensor, " found"]
    labels: Int[Tensor, " found"]


def pad_batch(images: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> DetectionBatch:
    """Join images of any sizes, each (channels, height, width), with their boxes and labels."""
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = sizes.amax(dim=0).tolist()
    stacked = torch.stack(
        [nn.functional.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
    )
    longest = max(len(given) for given in labels)
    padded = [nn.functional.pad(given.float(), (0, 0, 0, longest - len(given))) for given in boxes]
    named = [nn.functional.pad(given, (0, longest - len(given)), value=NO_OBJECT) for given in labels]
    return DetectionBatch(stacked, sizes, torch.stack(padded), torch.stack(named))


def select(
    boxes: Float[Tensor, "candidates 4"],
    scores: Float[Tensor, " candidates"],
    labels: Int[Tensor, " candidates"],
    size: Int[Tensor, "2"],
    *,
    score_threshold: float | int,
    iou_threshold: float | int,
    max_detections: int,
) -> Detections:
    """Of one image's candidates those that are sure enough, hold something and say nothing twice.

    Args:
        size: height and width of the image, to which boxes are cut.
        score_threshold: candidates count with a score above it.
        iou_threshold: of two boxes of a class with a larger IoU, the one of lower score goes.
        max_detections: how many are kept, those of the highest scores.
    """
    boxes = clip(boxes, size)
    sure = (scores > score_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, labels = boxes[sure], scores[sure], labels[sure]
    kept = nms(boxes, scores, labels, iou_threshold, max_detections)
    return Detections(boxes[kept], scores[kept], labels[kept])

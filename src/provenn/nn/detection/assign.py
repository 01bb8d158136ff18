"""The object that each anchor is to find: an index into the image's boxes, or `BACKGROUND` or `IGNORED`."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provenn.nn.detection.anchors import Anchors
from provenn.nn.detection.boxes import areas_of, centres_of, distances_of, iou

BACKGROUND, IGNORED = -1, -2
Boxes = Float[Tensor, "batch boxes 4"]
Valid = Bool[Tensor, "batch boxes"]
Assigned = Int[Tensor, "batch anchors"]


def by_iou(
    anchors: Float[Tensor, "*batch anchors 4"],
    boxes: Boxes,
    valid: Valid,
    *,
    low: float | int,
    high: float | int,
    rescue: float | int | None = 0.0,
    claimed: bool = False,
) -> Assigned:
    """The box that each anchor overlaps most, if by `high` or more; below `low` it is background, between ignored.

    Args:
        anchors: (anchors, 4), or (batch, anchors, 4) of each image.
        boxes, valid: of each image, padded; and which are no padding.
        low, high: of the IoU.
        rescue: an anchor that overlaps some box as much as any anchor does, and by more than this, is given the box
            that it overlaps most too, however little that is. So every box is sought by some anchor. None does not.
        claimed: give such an anchor the box that claims it instead, and of several the last, as MMDetection
            does. There a box without any overlap claims all anchors without any; here it has none.
    """
    if not low <= high:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    if boxes.shape[1] == 0:
        return torch.full((len(boxes), anchors.shape[-2]), BACKGROUND, device=boxes.device)
    overlap = iou(anchors.expand(len(boxes), -1, -1), boxes).masked_fill(~valid[:, None], -1.0)
    best, which = overlap.max(dim=2)
    positive = best >= high
    if rescue is not None:
        most = overlap.amax(dim=1, keepdim=True)
        wanted = (overlap == most) & (most > rescue)
        rescued = wanted.any(dim=2)
        positive = positive | rescued
        if claimed:
            which = torch.where(rescued, wanted.shape[2] - 1 - wanted.flip(2).int().argmax(dim=2), which)
    assigned = torch.where(best < low, BACKGROUND, IGNORED)
    return torch.where(positive, which, assigned)


def by_best(anchors: Float[Tensor, "anchors 4"], boxes: Boxes, valid: Valid, *, high: float | int) -> Assigned:
    """SSD's matching (Liu et al., 2016, arXiv:1512.02325, section 2.2): each box's best anchor is given to that box.

    The other anchors are given the box that they overlap most, if by `high` or more, and are background below. Unlike
    `by_iou` with a rescue, a box's best anchor goes to it even where it overlaps another box more. Of two boxes with
    the same best anchor the one that it overlaps more has it.
    """
    if boxes.shape[1] == 0:
        return torch.full((len(boxes), len(anchors)), BACKGROUND, device=boxes.device)
    overlap = iou(anchors.expand(len(boxes), -1, -1), boxes).masked_fill(~valid[:, None], -1.0)
    best, which = overlap.max(dim=2)
    most, where = overlap.max(dim=1, keepdim=True)
    # A box has one best anchor, the first where several overlap it as much; a box that none overlaps has none.
    chosen = torch.zeros_like(overlap, dtype=torch.bool).scatter(1, where, most > 0)
    claimed, claimant = overlap.masked_fill(~chosen, -1.0).max(dim=2)
    return torch.where(claimed > 0, claimant, torch.where(best >= high, which, BACKGROUND))


def by_atss(anchors: Anchors, boxes: Boxes, valid: Valid, *, candidates: int = 9) -> Assigned:
    """Adaptive training sample selection (Zhang et al., 2020, arXiv:1912.02424, algorithm 1).

    Of each level the `candidates` anchors nearest to a box's centre are its candidates. Those are positive that
    overlap it by at least the mean plus the standard deviation of its candidates' IoUs and whose centre lies inside.
    An anchor that is positive for several goes to the one that it overlaps most.
    """
    if boxes.shape[1] == 0:
        return torch.full((len(boxes), len(anchors.boxes)), BACKGROUND, device=boxes.device)
    distance = (anchors.centres[:, None] - centres_of(boxes)[:, None]).square().sum(dim=-1)
    near, start = [], 0
    for count in anchors.counts:
        level = distance[:, start : start + count]
        near.append(level.topk(min(candidates, count), dim=1, largest=False).indices + start)
        start += count
    chosen = torch.cat(near, dim=1)
    overlap = iou(anchors.boxes.expand(len(boxes), -1, -1), boxes)
    of_chosen = overlap.gather(1, chosen)
    # Of a single candidate there is no deviation.
    spread = of_chosen.std(dim=1, keepdim=True) if chosen.shape[1] > 1 else 0.0
    inside = distances_of(boxes[:, None], anchors.centres[:, None]).amin(dim=-1) > 0
    positive = (of_chosen >= of_chosen.mean(dim=1, keepdim=True) + spread) & inside.gather(1, chosen)
    # Back from candidates to anchors: −1 wherever an anchor is not positive for a box.
    scored = torch.full_like(overlap, -1.0).scatter(1, chosen, torch.where(positive, of_chosen, -1.0))
    best, which = scored.masked_fill(~valid[:, None], -1.0).max(dim=2)
    return torch.where(best >= 0, which, BACKGROUND)


def by_range(
    anchors: Anchors,
    boxes: Boxes,
    valid: Valid,
    *,
    ranges: Sequence[tuple[float, float]],
    radius: float | int | None = 1.5,
) -> Assigned:
    """FCOS's assignment (Tian et al., 2019, arXiv:1904.01355, section 3.2): the smallest box around each point.

    Args:
        anchors: anchor points.
        boxes, valid: of each image, padded; and which are no padding.
        ranges: of each level, between which the largest distance from the point to the box's sides must lie, in pixels;
            both ends count.
        radius: of the square round a box's centre, in strides, in which its points must lie; None takes the box whole.
    """
    if boxes.shape[1] == 0:
        return torch.full((len(boxes), len(anchors.boxes)), BACKGROUND, device=boxes.device)
    points, spacing = anchors.centres[:, None], anchors.strides[:, None, None]
    distances = distances_of(boxes[:, None], points)
    region = boxes[:, None]
    if radius is not None:
        middle = centres_of(boxes)[:, None]
        square = torch.cat([middle - radius * spacing, middle + radius * spacing], dim=-1)
        region = torch.cat(
            [torch.maximum(square[..., :2], region[..., :2]), torch.minimum(square[..., 2:], region[..., 2:])], dim=-1
        )
    inside = distances_of(region, points).amin(dim=-1) > 0
    bounds = boxes.new_tensor(ranges)[anchors.levels]
    far = distances.amax(dim=-1)
    fits = inside & (far >= bounds[:, None, 0]) & (far <= bounds[:, None, 1]) & valid[:, None]
    smallest, which = torch.where(fits, areas_of(boxes)[:, None], torch.inf).min(dim=2)
    return torch.where(smallest.isfinite(), which, BACKGROUND)

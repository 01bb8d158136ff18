"""Boxes: (…, 4) as left, top, right, bottom in pixels; a pixel is 1 wide, so that (0, 0, 3, 2) covers six of them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Sizes change by at most this factor, so that a wild network gives no infinite boxes (Detectron's bound).
LARGEST_LOG_SIZE = math.log(1000 / 16)
UNIT = (1.0, 1.0, 1.0, 1.0)


def corners_of(xywh: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """From left, top, width, height, as COCO writes boxes.

    >>> corners_of(torch.tensor([10.0, 20.0, 3.0, 4.0]))
    tensor([10., 20., 13., 24.])
    """
    return torch.cat([xywh[..., :2], xywh[..., :2] + xywh[..., 2:]], dim=-1)


def xywh_of(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """To left, top, width, height."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def centres_of(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 2"]:
    """Their middle points, x and y."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def areas_of(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Width times height; 0 of a box whose corners are out of order."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def clip(boxes: Float[Tensor, "*batch boxes 4"], sizes: Tensor) -> Float[Tensor, "*batch boxes 4"]:
    """Cut off what lies outside the image.

    Args:
        boxes: of an image, or of a batch of them.
        sizes: (…, 2) height and width of each image.
    """
    limit = torch.cat([sizes.flip(-1), sizes.flip(-1)], dim=-1)  # width, height, width, height
    return torch.minimum(boxes.clamp(min=0), limit[..., None, :].to(boxes))


def iou(a: Float[Tensor, "*batch n 4"], b: Float[Tensor, "*batch m 4"]) -> Float[Tensor, "*batch n m"]:
    """Intersection over union of every box of `a` with every box of `b`; 0 where both are empty."""
    top_left = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    bottom_right = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    overlap = (bottom_right - top_left).clamp(min=0).prod(dim=-1)
    union = areas_of(a)[..., :, None] + areas_of(b)[..., None, :] - overlap
    return torch.where(union > 0, overlap / union.clamp(min=torch.finfo(a.dtype).tiny), 0.0)


def giou(a: Float[Tensor, "*batch 4"], b: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Generalised intersection over union of pairs (Rezatofighi et al., 2019, arXiv:1902.09630).

    |A∩B| / |A∪B| − |C ∖ (A∪B)| / |C|, C the smallest box around both: from −1, far apart, to 1, the same.
    """
    eps = 1e-7
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    around = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = areas_of(a) + areas_of(b) - overlap
    return overlap / union.clamp(min=eps) - (around - union) / around.clamp(min=eps)


def encode(
    boxes: Float[Tensor, "... 4"], anchors: Float[Tensor, "... 4"], stds: tuple[float, ...] = UNIT
) -> Float[Tensor, "... 4"]:
    """What carries anchors to boxes (Girshick et al., 2014, arXiv:1311.2524, appendix C).

    t = ((x − x_a)/w_a, (y − y_a)/h_a, log(w/w_a), log(h/h_a)) / stds, of centres (x, y).

    Args:
        boxes: none of them empty.
        anchors: one each.
        stds: the usual deviation of each number, so that a network learns numbers near 1.
    """
    size, size_a = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    shift = (centres_of(boxes) - centres_of(anchors)) / size_a
    least = torch.finfo(boxes.dtype).tiny
    return torch.cat([shift, (size.clamp(min=least) / size_a).log()], dim=-1) / boxes.new_tensor(stds)


def decode(
    deltas: Float[Tensor, "... 4"], anchors: Float[Tensor, "... 4"], stds: tuple[float, ...] = UNIT
) -> Float[Tensor, "... 4"]:
    """The boxes to which `deltas` carry the anchors; the inverse of `encode` up to sizes of 62.5 times the anchor's."""
    deltas = deltas * deltas.new_tensor(stds)
    size = anchors[..., 2:] - anchors[..., :2]
    middle = centres_of(anchors) + deltas[..., :2] * size
    half = deltas[..., 2:].clamp(max=LARGEST_LOG_SIZE).exp() * size / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def distances_of(boxes: Float[Tensor, "... 4"], points: Float[Tensor, "... 2"]) -> Float[Tensor, "... 4"]:
    """How far the left, top, right and bottom sides are from the points (FCOS, equation 1); negative if outside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def around(points: Float[Tensor, "... 2"], distances: Float[Tensor, "... 4"]) -> Float[Tensor, "... 4"]:
    """The boxes whose sides are so far from the points; the inverse of `distances_of`."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)

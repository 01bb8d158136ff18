"""What a point head is to say, and how wrong it is (section 3.2; the targets are CornerNet's, arXiv:1808.01244)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from provenn.nn.detection import DetectionBatch
from provenn.papers.relationnet_pp.layers import PointMaps, cell_centres


def gaussian_radius(
    height: Float[Tensor, "*batch"], width: Float[Tensor, "*batch"], overlap: float = 0.7
) -> Float[Tensor, "*batch"]:
    """How far both corners of a box may move for its IoU to stay: the least of three cases.

    >>> gaussian_radius(torch.tensor([40.0, 100.0]), torch.tensor([60.0, 20.0]))
    tensor([3.9050, 2.6139])
    """
    both, area = height + width, height * width
    # The roots of a r² + b r + c: one corner in and one out, both in, both out. CornerNet's own code divides by 2 where
    # this, as RelationNet++'s, has 2a.
    cases = (
        (1.0, both, area * (1 - overlap) / (1 + overlap), -1),
        (4.0, 2 * both, (1 - overlap) * area, -1),
        (4 * overlap, -2 * overlap * both, (overlap - 1) * area, 1),
    )
    radii = [(b + sign * (b.square() - 4 * a * c).clamp(min=0).sqrt()) / (2 * a) for a, b, c, sign in cases]
    return torch.stack(radii).amin(dim=0)


class PointTargets(NamedTuple):
    """Of all cells of all levels, in a row.

    Args:
        heat: 1 at the cell nearest to a point, falling off around it.
        offsets: from the reference of such a cell to the point, in strides.
        nearest: which cells are such.
    """

    heat: Float[Tensor, "batch cells classes"]
    offsets: Float[Tensor, "batch cells 2"]
    nearest: Bool[Tensor, "batch cells"]


def points_of(boxes: Float[Tensor, "*batch 4"], key_type: str) -> Float[Tensor, "*batch 2"]:
    """The corner or centre of each box."""
    if key_type == "centre":
        return (boxes[..., :2] + boxes[..., 2:]) / 2
    return boxes[..., :2] if key_type == "top_left" else boxes[..., 2:]


@torch.no_grad()
def point_targets(
    batch: DetectionBatch,
    key_type: str,
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    classes: int,
    reference: float = 0.5,
) -> PointTargets:
    """Every object on every level: e^(−d²/2σ²) of the distance to the cell nearest to its point, σ = (2r + 1)/6.

    Of several objects the nearest counts, and its class alone; with one class it is of all.

    Args:
        batch: boxes and labels.
        key_type: of which points.
        sizes, strides: height and width of the levels.
        classes: of the head's logits.
        reference: in a cell, from which offsets start.
    """
    boxes = batch.boxes.float()  # a half-precision training has them in halves
    points, valid = points_of(boxes, key_type), batch.valid
    count, objects = valid.shape
    sides = boxes[..., 2:] - boxes[..., :2]
    sigma = (2 * gaussian_radius(sides[..., 1], sides[..., 0]) + 1) / 6
    heats, offsets, nearest = [], [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        cells = cell_centres(height, width, stride, points.device)
        heat = torch.zeros(count, height * width, classes, dtype=boxes.dtype, device=boxes.device)
        offset = torch.zeros(count, height * width, 2, dtype=boxes.dtype, device=boxes.device)
        chosen = torch.zeros(count, height * width, dtype=torch.bool, device=points.device)
        if objects:
            near = (cells[None, :, None] - points[:, None]).square().sum(-1).argmin(dim=1)
            far = (cells[None, :, None] - cells[near][:, None]).square().sum(-1)
            bump = torch.exp(-far / (2 * sigma[:, None].square())).masked_fill(~valid[:, None], 0.0)
            best, which = bump.max(dim=2)
            label = batch.labels.gather(1, which) if classes > 1 else torch.zeros_like(which)
            heat.scatter_(2, label.clamp(min=0)[..., None], best[..., None])
            chosen = best == 1
            of_best = points.gather(1, which[..., None].expand(-1, -1, 2))
            start = cells + (reference - 0.5) * stride
            offset = ((of_best - start) / stride).masked_fill(~chosen[..., None], 0.0)
        heats.append(heat)
        offsets.append(offset)
        nearest.append(chosen)
    return PointTargets(torch.cat(heats, dim=1), torch.cat(offsets, dim=1), torch.cat(nearest, dim=1))


def gaussian_focal_loss(logits: Float[Tensor, "*batch"], heat: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """−(1 − p)² log p where the heat is 1, −p² (1 − heat)⁴ log(1 − p) elsewhere."""
    p = logits.sigmoid()
    there = -(1 - p).square() * F.logsigmoid(logits)
    elsewhere = -p.square() * (1 - heat) ** 4 * F.logsigmoid(-logits)
    return torch.where(heat == 1, there, elsewhere)


def point_losses(
    said: Mapping[str, PointMaps],
    batch: DetectionBatch,
    strides: Sequence[int],
    *,
    weights: tuple[float, float] = (0.25, 1.0),
    reference: float = 0.5,
) -> dict[str, Tensor]:
    """Losses of heat maps and of offsets, of all types together, over the number of points' cells.

    Args:
        said: by the head, of each type.
        batch: what is there. Padding of smaller images counts: nothing is to be found there.
        strides: of the levels.
        weights: of the two.
        reference: in a cell, from which offsets start.
    """
    heat, near, positives = [], [], []
    for name, (logits, offsets) in said.items():
        sizes = [(level.shape[2], level.shape[3]) for level in logits]
        targets = point_targets(batch, name, sizes, strides, logits[0].shape[1], reference)
        predicted = torch.cat([level.flatten(2) for level in logits], dim=2).transpose(1, 2).float()
        moved = torch.cat([level.flatten(2) for level in offsets], dim=2).transpose(1, 2).float()
        heat.append(gaussian_focal_loss(predicted, targets.heat).sum())
        error = F.smooth_l1_loss(moved, targets.offsets, reduction="none")
        near.append((error * targets.nearest[..., None]).sum())
        positives.append(targets.nearest.sum())
    count = torch.stack(positives).sum().clamp(min=1)
    return {
        "points": weights[0] * torch.stack(heat).sum() / count,
        "offsets": weights[1] * torch.stack(near).sum() / count,
    }

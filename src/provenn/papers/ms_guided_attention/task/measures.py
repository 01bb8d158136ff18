"""How near a labelled volume is to the true one: overlap, volume and surfaces, for one class of one subject."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool


class Agreement(NamedTuple):
    """Of one class in one subject.

    Args:
        dice: 2|A∩B| / (|A| + |B|).
        volume_similarity: 1 − ||A| − |B|| / (|A| + |B|).
        mean_distance: the paper's MSD in voxels: distances of the voxels of each to the other, summed, over |A| + |B|.
        surface_distance: the mean of the distances of each surface to the other (ASSD), in millimetres.
        hausdorff_95: the 95th percentile of these, of the worse side, in millimetres.
    """

    dice: float
    volume_similarity: float
    mean_distance: float
    surface_distance: float
    hausdorff_95: float


def dice(predicted: Bool[np.ndarray, "..."], true: Bool[np.ndarray, "..."]) -> float:
    """2|A∩B| / (|A| + |B|); not a number where both are empty."""
    total = int(predicted.sum()) + int(true.sum())
    return 2 * float((predicted & true).sum()) / total if total else float("nan")


def agreement(
    predicted: Bool[np.ndarray, "slices height width"],
    true: Bool[np.ndarray, "slices height width"],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> Agreement | None:
    """All measures of one class; None where neither has it.

    Where one of the two is empty there is no distance: the diagonal of the volume stands for it.

    Args:
        predicted, true: where the class is.
        spacing: millimetres between slices, rows and columns.
    """
    from scipy.ndimage import distance_transform_edt

    a, b = int(predicted.sum()), int(true.sum())
    if not a + b:
        return None
    overlap, similarity = dice(predicted, true), 1 - abs(a - b) / (a + b)
    if not a or not b:
        voxels = float(np.linalg.norm(predicted.shape))
        diagonal = float(np.linalg.norm(np.array(predicted.shape) * np.array(spacing)))
        return Agreement(overlap, similarity, voxels, diagonal, diagonal)
    box = _box(predicted | true)
    predicted, true = predicted[box], true[box]
    in_voxels = (distance_transform_edt(~true)[predicted].sum() + distance_transform_edt(~predicted)[true].sum()) / (
        a + b
    )
    edges = surface(predicted), surface(true)
    to_true = distance_transform_edt(~edges[1], sampling=spacing)[edges[0]]
    to_predicted = distance_transform_edt(~edges[0], sampling=spacing)[edges[1]]
    mean = (to_true.sum() + to_predicted.sum()) / (len(to_true) + len(to_predicted))
    worst = max(np.percentile(to_true, 95), np.percentile(to_predicted, 95))
    return Agreement(overlap, similarity, float(in_voxels), float(mean), float(worst))


def surface(mask: Bool[np.ndarray, "slices height width"]) -> Bool[np.ndarray, "slices height width"]:
    """Voxels of which one of the six neighbours is outside; what lies beyond the volume is outside."""
    from scipy.ndimage import binary_erosion

    return mask & ~binary_erosion(mask)


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around a mask: nothing outside it is nearer to anything inside."""
    sides = []
    for axis in range(mask.ndim):
        there = np.flatnonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
        sides.append(slice(int(there[0]), int(there[-1]) + 1))
    return tuple(sides)

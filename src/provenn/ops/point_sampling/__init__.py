"""Points chosen far apart, and the nearest points of each: how a cloud becomes a few groups."""

from jaxtyping import Float, Int64
from torch import Tensor

from .fast import farthest, nearest, smallest
from .reference import farthest_by_table, nearest_by_table

__all__ = [
    "farthest",
    "farthest_by_table",
    "farthest_points",
    "nearest",
    "nearest_by_table",
    "nearest_points",
    "smallest",
]


def farthest_points(
    points: Float[Tensor, "batch points axes"], count: int, *, start: int = 0
) -> Int64[Tensor, "batch count"]:
    """Farthest-point sampling (Qi et al., 2017, PointNet++, arXiv:1706.02413, section 3.2): numbers of points.

    c_1 = start,  c_{m+1} = argmax_i min_{j ≤ m} |p_i − p_{c_j}|; of several alike the first.

    Args:
        points: N of each cloud, finite.
        count: how many to choose, at most N.
        start: number of the first.

    Memory: one number a point. Time: count · N. No gradient: the choice has none.

    Raises:
        ValueError: more than there are points, or a first that is not there.

    >>> import torch
    >>> line = torch.tensor([[[0.0], [1.0], [9.0], [5.0]]])
    >>> farthest_points(line, 3).tolist()
    [[0, 2, 3]]
    """
    total = points.shape[1]
    if not 1 <= count <= total:
        raise ValueError(f"count must lie between 1 and the {total} points, got {count}")
    if not 0 <= start < total:
        raise ValueError(f"start must be the number of a point, 0 to {total - 1}, got {start}")
    return farthest(points.detach(), count, start)


def nearest_points(
    points: Float[Tensor, "batch points axes"], centres: Float[Tensor, "batch centres axes"], count: int
) -> Int64[Tensor, "batch centres count"]:
    """The nearest points of each centre, nearest first; numbers of points.

    Args:
        points: N of each cloud, finite.
        centres: anywhere.
        count: how many of each centre, at most N.

    Memory: 2²⁰ distances at a time, or those of one centre. Of points that are equally far, any may come first.

    Raises:
        ValueError: more than there are points.

    >>> import torch
    >>> line = torch.tensor([[[0.0], [1.0], [9.0], [5.0]]])
    >>> nearest_points(line, torch.tensor([[[6.0]]]), 2).tolist()
    [[[3, 2]]]
    """
    total = points.shape[1]
    if not 1 <= count <= total:
        raise ValueError(f"count must lie between 1 and the {total} points, got {count}")
    return nearest(points.detach(), centres.detach(), count)

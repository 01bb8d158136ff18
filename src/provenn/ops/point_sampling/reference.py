"""The definitions: every distance in a table of points × points."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def farthest_by_table(
    points: Float[Tensor, "batch points axes"], count: int, start: int = 0
) -> Int64[Tensor, "batch count"]:
    """Each next point is the one whose nearest chosen point is farthest away; of several alike the first."""
    chosen = torch.full((len(points), 1), start, dtype=torch.long, device=points.device)
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    for _ in range(count - 1):
        columns = distances.gather(2, chosen[:, None].expand(-1, points.shape[1], -1))
        chosen = torch.cat([chosen, columns.amin(2).argmax(1, keepdim=True)], dim=1)
    return chosen


def nearest_by_table(
    points: Float[Tensor, "batch points axes"], centres: Float[Tensor, "batch centres axes"], count: int
) -> Int64[Tensor, "batch centres count"]:
    """The points in the order of their distance to each centre, the first `count` of them."""
    distances = torch.cdist(centres, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.argsort(dim=2, stable=True)[:, :, :count]

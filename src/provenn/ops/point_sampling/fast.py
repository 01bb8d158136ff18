"""The same in memory that grows with the points alone."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

TABLE = 2**24  # distances that are held at a time


def farthest(points: Float[Tensor, "batch points axes"], count: int, start: int = 0) -> Int64[Tensor, "batch count"]:
    """One distance a point is kept, to the nearest of those that are chosen."""
    batch, total, axes = points.shape
    columns = points.mT.contiguous().unbind(1)  # an axis at a time: three passes over memory in a row
    rows = torch.arange(batch, device=points.device)
    chosen = torch.full((batch, count), start, dtype=torch.long, device=points.device)
    nearest = points.new_full((batch, total), torch.inf)
    for step in range(1, count):
        last = points[rows, chosen[:, step - 1]]
        distances = (columns[0] - last[:, :1]).square_()
        for axis in range(1, axes):
            distances.add_((columns[axis] - last[:, axis : axis + 1]).square_())
        torch.minimum(nearest, distances, out=nearest)
        chosen[:, step] = nearest.argmax(1)
    return chosen


def nearest(
    points: Float[Tensor, "batch points axes"], centres: Float[Tensor, "batch centres axes"], count: int
) -> Int64[Tensor, "batch centres count"]:
    """So many centres at a time that their distances stay within `TABLE`."""
    batch, total = points.shape[:2]
    # A graph for any batch cannot depend on its size.
    traced = torch.compiler.is_compiling()
    step = centres.shape[1] if traced else max(1, TABLE // max(1, batch * total))
    parts = [
        torch.cdist(some, points, compute_mode="donot_use_mm_for_euclid_dist").topk(count, dim=2, largest=False).indices
        for some in centres.split(step, dim=1)
    ]
    return torch.cat(parts, dim=1) if parts else centres.new_zeros(batch, 0, count, dtype=torch.long)

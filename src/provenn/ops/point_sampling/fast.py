"""The same in memory that grows with the points alone."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

TABLE = 2**20  # distances that are sought at a time: a CPU's cache holds them from one axis to the next


def farthest(points: Float[Tensor, "batch points axes"], count: int, start: int = 0) -> Int64[Tensor, "batch count"]:
    """One distance a point is kept, to the nearest of those that are chosen."""
    batch, total, _ = points.shape
    columns = points.mT.contiguous().unbind(1)  # an axis at a time: passes over memory in a row
    rows = torch.arange(batch, device=points.device)
    chosen = torch.full((batch, count), start, dtype=torch.long, device=points.device)
    nearest = points.new_full((batch, total), torch.inf)
    for step in range(1, count):
        torch.minimum(nearest, _squares(columns, points[rows, chosen[:, step - 1]]), out=nearest)
        # Of several alike the first. On a CPU `argmax` takes three times as long.
        chosen[:, step] = nearest.max(1).indices
    return chosen


def nearest(
    points: Float[Tensor, "batch points axes"], centres: Float[Tensor, "batch centres axes"], count: int
) -> Int64[Tensor, "batch centres count"]:
    """So many centres at a time that their distances stay within `TABLE`."""
    batch, total = points.shape[:2]
    columns = points.mT.contiguous()[:, :, None].unbind(1)
    if torch.compiler.is_compiling():  # a graph for any batch cannot depend on its size
        return _by_topk(_squares(columns, centres), count)
    step = max(1, TABLE // max(1, batch * total))
    return torch.cat([smallest(_squares(columns, some), count) for some in centres.split(step, dim=1)], dim=1)


def smallest(x: Float[Tensor, "*rows numbers"], count: int) -> Int64[Tensor, "*rows count"]:
    """Places of the smallest numbers of each row, smallest first.

    What is among them lies in a block whose least number is among the `count` least of all blocks. So two short
    searches find them: for blocks, and within those. Of numbers that are alike, any may come first.

    >>> smallest(torch.tensor([[5.0, 1.0, 4.0, 0.0, 3.0]]), 2).tolist()
    [[3, 1]]
    """
    total = x.shape[-1]
    size = math.isqrt(total // count)
    if size < 3:  # two searches would be no shorter
        return _by_topk(x, count)
    blocks = total // size
    # Block b is every `blocks`-th number from b on: its least is found by passes over memory in a row.
    least = x[..., : blocks * size].unflatten(-1, (size, blocks)).amin(-2)
    chosen = least.topk(count, largest=False, sorted=False).indices
    starts = blocks * torch.arange(size, device=x.device)
    behind = torch.arange(blocks * size, total, device=x.device).expand(*x.shape[:-1], -1)
    places = torch.cat([(chosen[..., None] + starts).flatten(-2), behind], dim=-1)
    return places.gather(-1, _by_topk(x.gather(-1, places), count))


def _by_topk(x: Tensor, count: int) -> Tensor:
    return x.topk(count, dim=-1, largest=False).indices


def _squares(columns: tuple[Tensor, ...], centres: Float[Tensor, "*batch axes"]) -> Float[Tensor, "*batch points"]:
    """Squared distances to centres of points, whose columns are an axis each."""
    squares = (columns[0] - centres[..., :1]).square_()
    for axis, column in enumerate(columns[1:], 1):
        away = column - centres[..., axis : axis + 1]
        squares.addcmul_(away, away)
    return squares

"""Anchor boxes and anchor points: where on a pyramid a detector looks for objects."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.nn.backbone import ceil_div

Number = float | int


class Anchors(NamedTuple):
    """Where the cells of all levels lie, from fine to coarse, row by row; several anchors of a cell in a row.

    Args:
        boxes: left, top, right, bottom of the anchors, in pixels of the image. Of anchor points, the cells themselves.
        strides: pixels between neighbours, of each anchor.
        counts: how many anchors each level has.
    """

    boxes: Float[Tensor, "anchors 4"]
    strides: Float[Tensor, " anchors"]
    counts: list[int]

    @property
    def centres(self) -> Float[Tensor, "anchors 2"]:
        """x and y of each anchor."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    @property
    def levels(self) -> Int[Tensor, " anchors"]:
        """The level of each anchor."""
        counts = torch.tensor(self.counts, device=self.boxes.device)
        return torch.repeat_interleave(torch.arange(len(self.counts), device=counts.device), counts)


Shape = tuple[float, float]  # width and height


def shapes_of(sizes: Sequence[Number], ratios: Sequence[Number], scales: Sequence[Number]) -> list[list[Shape]]:
    """Width and height of the anchors of each level: of area (size · scale)², of height/width `ratios`.

    >>> shapes_of([32], ratios=(0.25, 1, 4), scales=(1,))
    [[(64.0, 16.0), (32.0, 32.0), (16.0, 64.0)]]
    """
    if min(*sizes, *ratios, *scales) <= 0:
        raise ValueError(f"sizes, ratios and scales must be positive, got {sizes}, {ratios} and {scales}")
    return [[(s * c / math.sqrt(r), s * c * math.sqrt(r)) for r in ratios for c in scales] for s in sizes]


def anchors_of(
    size: tuple[int, int],
    strides: Sequence[int],
    shapes: Sequence[Sequence[Shape]] | None = None,
    device: torch.device | None = None,
) -> Anchors:
    """Anchors of an image of this size.

    Anchors stand at the middle of their cell, which is stride · (i + ½) for cell i.

    Args:
        size: height and width of the image, in pixels. A level has ⌈side / stride⌉ cells.
        strides: of the levels, from fine to coarse.
        shapes: width and height of each level's anchors. Without them the cells are the anchors.
    """
    boxes, spacing = [], []
    for level, stride in enumerate(strides):
        shape = torch.tensor(
            [(stride, stride)] if shapes is None else shapes[level], dtype=torch.float32, device=device
        )
        y, x = (stride * (torch.arange(ceil_div(side, stride), device=device) + 0.5) for side in size)
        centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 1, 2)
        boxes.append(torch.cat([centre - shape / 2, centre + shape / 2], dim=-1).reshape(-1, 4))
        # A tensor's len() would make a rule of the size when this is exported.
        spacing.append(torch.full((boxes[-1].shape[0],), float(stride), device=device))
    return Anchors(torch.cat(boxes), torch.cat(spacing), [level.shape[0] for level in boxes])

"""From a map to the points that prompt a segmenter (section 3.3)."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Pair(NamedTuple):
    """Where the map is highest inside its positive area, and lowest outside; x and y in cells of the map.

    Args:
        positive: inside the largest part above the threshold.
        negative: outside of it; None where nothing is outside.
        area: the positive area.
    """

    positive: tuple[int, int]
    negative: tuple[int, int] | None
    area: Bool[Tensor, "rows columns"]


def largest_component(area: Bool[Tensor, "rows columns"]) -> Bool[Tensor, "rows columns"]:
    """The largest part whose cells touch, corners included; of equal ones the first by rows; empty of none.

    >>> largest_component(torch.tensor([[True, False, True], [False, False, True]])).int().tolist()
    [[0, 0, 1], [0, 0, 1]]
    """
    from scipy.ndimage import label

    numbers, count = label(area.cpu().numpy(), np.ones((3, 3)))
    if not count:
        return torch.zeros_like(area)
    sizes = np.bincount(numbers.ravel())[1:]
    return torch.from_numpy(numbers == 1 + int(sizes.argmax())).to(area.device)


def point_pair(heat: Float[Tensor, "rows columns"], threshold: float | int = 0.5) -> Pair | None:
    """A positive and a negative point of a map; None where no cell is above 0.

    Args:
        heat: at least 0.
        threshold: share of the maximum from which a cell is in the positive area; the paper names none.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    top = heat.amax()
    if not top > 0:
        return None
    area = largest_component(heat >= threshold * top)
    columns = heat.shape[1]
    best = int(heat.masked_fill(~area, -torch.inf).argmax())
    negative = None
    if not bool(area.all()):
        least = int(heat.masked_fill(area, torch.inf).argmin())
        negative = (least % columns, least // columns)
    return Pair((best % columns, best // columns), negative, area)

"""Patches of photographs, whose class is the photograph: a small set of real images other than digits."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from provenn.data.photographs import grey_photograph

SOURCES = (
    *("brick", "grass", "gravel", "page", "camera", "moon", "coins", "cell", "hubble"),
    *("ihc", "chelsea", "coffee", "astronaut", "motorcycle", "china", "flower"),
)
# Columns of each photograph that a split is cut from, as shares of its width: no pixel is in two.
BANDS = {"train": (0.0, 0.6), "val": (0.6, 0.76), "test": (0.76, 1.0)}
NARROW = ("coins", "page", "chelsea")  # whose bands wide patches do not fit into
WIDE_SIDE = 64  # pixels
SCALES = (0.7, 1.2)  # pixels of the photograph that a pixel of the patch is wide
FLATTEST = 6.0  # of 255: what varies less shows nothing


@cache
def _band(name: str, split: str) -> Float[Tensor, "1 1 height width"]:
    pixels = grey_photograph(name)
    first, last = (round(share * pixels.shape[1]) for share in BANDS[split])
    return torch.from_numpy(pixels[:, first:last].astype(np.float32))[None, None]


def photo_patches(
    split: str, count: int, *, side: int = 32, seed: int = 0
) -> tuple[Float[Tensor, "patches 1 side side"], Int64[Tensor, " patches"]]:
    """Grey patches of every photograph, each scaled, turned, mirrored, brought to mean 0 and deviation 1, with noise.

    What is flat is drawn again, so that a patch shows something. Colour and brightness say nothing about the class.

    Args:
        split: "train", "val" or "test": from other columns of the photographs.
        count: patches of each photograph.
        side: pixels; at most 40, or the narrowest band is too narrow.
        seed: of the drawing.
    """
    if not 8 <= side <= 40:
        raise ValueError(f"side must be from 8 to 40 pixels, got {side}")
    generator = torch.Generator().manual_seed(seed * 3 + list(BANDS).index(split))
    patches = [_of_one(_band(name, split), count, side, generator) for name in SOURCES]
    labels = torch.arange(len(SOURCES)).repeat_interleave(count)
    images = torch.cat(patches)
    images = (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True)
    return images + 0.1 * torch.randn(images.shape, generator=generator), labels


def wide_patches(
    split: str, count: int, seed: int
) -> tuple[Float[Tensor, "patches 1 64 64"], Int64[Tensor, " patches"]]:
    """Patches of 64 pixels, drawn as `photo_patches` draws its own, of the 13 photographs that are wide enough."""
    generator = torch.Generator().manual_seed(seed * 3 + list(BANDS).index(split))
    names = [name for name in SOURCES if name not in NARROW]
    images = torch.cat([_of_one(_band(name, split), count, WIDE_SIDE, generator) for name in names])
    images = (images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True)
    noise = 0.1 * torch.randn(images.shape, generator=generator)
    return images + noise, torch.arange(len(names)).repeat_interleave(count)


def _of_one(
    band: Float[Tensor, "1 1 height width"], count: int, side: int, generator: torch.Generator
) -> Float[Tensor, "patches 1 side side"]:
    height, width = band.shape[2:]
    kept: list[Tensor] = []
    offsets = torch.arange(side) - (side - 1) / 2
    while sum(map(len, kept)) < count:
        draw = torch.rand((3, 2 * count, 1, 1), generator=generator)
        scale = SCALES[0] + (SCALES[1] - SCALES[0]) * draw[0]
        half = scale * (side - 1) / 2
        # The whole patch lies inside of the band.
        middle_y = half + draw[1] * (height - 1 - 2 * half)
        middle_x = half + draw[2] * (width - 1 - 2 * half)
        y = (middle_y + scale * offsets[:, None]).expand(-1, side, side)
        x = (middle_x + scale * offsets[None, :]).expand(-1, side, side)
        grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
        drawn = F.grid_sample(band.expand(len(grid), -1, -1, -1), grid, align_corners=True)
        kept.append(drawn[drawn.std((1, 2, 3)) > FLATTEST])
    patches = torch.cat(kept)[:count]
    # One of the eight ways to turn and mirror a square, for each patch.
    ways = torch.randint(8, (count,), generator=generator)
    turns = [patches.rot90(quarters, (2, 3)) for quarters in range(4)]
    turned = torch.stack([*turns, *(turn.flip(3) for turn in turns)])
    return turned[ways, torch.arange(count)]

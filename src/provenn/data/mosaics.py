"""Mosaics of textures: scenes with exact masks, composed of photographs that scikit-image ships."""

from functools import cache

import numpy as np
from jaxtyping import Float32, UInt8
from numpy.typing import NDArray

from provenn.data.photographs import grey_photograph

MEAN, STD = 0.5, 0.15  # of the grey that textures of mean 0 and deviation 1 are shown in
TEXTURES = ("brick", "grass", "gravel", "hubble", "page")
# Columns of each photograph that a split is cut from, as shares of its width: no pixel is in two.
BANDS = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}


@cache
def _band(name: str, split: str, side: int) -> NDArray[np.float32]:
    """A texture of mean 0 and deviation 1, continued by its mirror image where the band is smaller than `side`."""
    pixels = grey_photograph(name)
    first, last = (round(share * pixels.shape[1]) for share in BANDS[split])
    band = pixels[:, first:last].astype(np.float32)
    band = (band - band.mean()) / band.std()
    missing = [max(0, side - length) for length in band.shape]
    return np.pad(band, [(0, missing[0]), (0, missing[1])], mode="symmetric")


def mosaic(
    split: str, index: int, *, seed: int = 0, side: int = 128, cells: int = 6, noise: float = 0.2
) -> tuple[Float32[np.ndarray, "side side"], UInt8[np.ndarray, "side side"]]:
    """One mosaic, in 0…1, and its mask: random Voronoi cells, each filled with a texture.

    A cell's texture is scaled by 0.6 to 1.4, the whole is lit from a side, and sensor noise is added: the mean grey of
    a cell says nothing about its class, its texture everything.

    Args:
        split: "train", "val" or "test": from other columns of the photographs.
        index: which of them.
        seed: of all of them.
        side: pixels.
        cells: Voronoi cells.
        noise: standard deviation, of textures that have 1.
    """
    rng = np.random.default_rng([seed, list(BANDS).index(split), index])
    centres = rng.uniform(0, side, (cells, 2))
    kinds = rng.integers(len(TEXTURES), size=cells)
    rows, columns = np.mgrid[:side, :side]
    distance = (rows[..., None] - centres[:, 0]) ** 2 + (columns[..., None] - centres[:, 1]) ** 2
    cell = distance.argmin(-1)
    patches = np.empty((cells, side, side), np.float32)
    for k, kind in enumerate(kinds):
        band = _band(TEXTURES[kind], split, side)
        top, left = (int(rng.integers(length - side + 1)) for length in band.shape)
        patches[k] = band[top : top + side, left : left + side] * rng.uniform(0.6, 1.4)
    image = np.take_along_axis(patches, cell[None], 0)[0]
    angle = rng.uniform(0, 2 * np.pi)
    light = (np.cos(angle) * rows + np.sin(angle) * columns) / side
    image = image * (1 + 0.3 * (light - light.mean())) + noise * rng.standard_normal((side, side))
    return np.clip(MEAN + STD * image, 0, 1).astype(np.float32), kinds[cell].astype(np.uint8)

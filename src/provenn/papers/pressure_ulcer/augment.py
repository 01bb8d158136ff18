"""Augmentation of wound photographs: turns, reflections, and a watershed that regroups the colours of an image.

Images are (height, width, 3) of uint8, masks (height, width). Turns and reflections move both alike; the watershed
touches the image alone. The abstract names the watershed algorithm and no more: its three modes are inferred.
"""

from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8
from numpy.random import Generator

MODES = ("flatten", "edges", "jitter")
MARKERS = 200  # seeds of basins; an image of few pixels gets fewer
LEAST_BASIN = 16  # pixels that a basin has on average, at least
DARKENED = 0.8  # of an edge's brightness
JITTER = 0.05  # σ of a basin's brightness
BLEND = (0.3, 0.8)  # between which the share of the flat colours is drawn

Image = UInt8[np.ndarray, "height width 3"]
Mask = UInt8[np.ndarray, "height width"]
Regions = Int32[np.ndarray, "height width"]


def basins(
    image: Image, n_markers: int = MARKERS, *, sigma: float | int = 1.0, rng: Generator | None = None
) -> Regions:
    """The watershed's basins of an image's gradient, numbered from 1; every pixel is in exactly one.

    The grey image is smoothed, its Sobel gradient flooded from seeds on a grid. With `rng` each seed is moved within
    its cell; the same generator state gives the same basins.

    Args:
        image: a photograph.
        n_markers: about how many seeds; capped so that a basin has 16 pixels on average.
        sigma: of the Gaussian before the gradient, in pixels; skin is noisy, and without it basins are too many.
        rng: moves the seeds.

    Raises:
        ValueError: n_markers below 1.
    """
    from scipy.ndimage import gaussian_filter
    from skimage.filters import sobel
    from skimage.segmentation import watershed as flood

    if n_markers < 1:
        raise ValueError(f"n_markers must be at least 1, got {n_markers}")
    height, width = image.shape[:2]
    grey = gaussian_filter(image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32), sigma)
    count = max(1, min(n_markers, height * width // LEAST_BASIN))
    rows = max(1, min(height, round((count * height / width) ** 0.5)))
    columns = max(1, min(width, round(count / rows)))
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    shift = np.full((2, rows, columns), 0.5) if rng is None else rng.random((2, rows, columns))
    at = ((y + shift[0]) * height / rows).astype(int), ((x + shift[1]) * width / columns).astype(int)
    seeds = np.zeros((height, width), np.int32)
    seeds[np.minimum(at[0], height - 1), np.minimum(at[1], width - 1)] = np.arange(1, rows * columns + 1).reshape(
        rows, columns
    )
    return flood(sobel(grey), seeds).astype(np.int32)


def watershed(
    image: Image,
    mode: str = "flatten",
    n_markers: int = MARKERS,
    rng: Generator | None = None,
    *,
    blend: float | int | None = None,
    regions: Regions | None = None,
) -> Image:
    """An image whose basins are flattened, outlined or lit anew.

    Args:
        image: a photograph.
        mode: "flatten" blends each basin with its mean colour, "edges" darkens the lines between basins by 20 %,
            "jitter" multiplies each basin's brightness by 1 + N(0, 0.05).
        n_markers, rng: of `basins`; `rng` also draws the blend and the jitter.
        blend: λ of "flatten", the share of the flat colours; by default drawn from 0.3 to 0.8.
        regions: basins that were found before.

    Raises:
        ValueError: an unknown mode, or a blend outside 0…1.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if blend is not None and not 0 <= blend <= 1:
        raise ValueError(f"blend must lie between 0 and 1, got {blend}")
    rng = np.random.default_rng(0) if rng is None else rng
    regions = basins(image, n_markers, rng=rng) if regions is None else regions
    values = image.astype(np.float64)
    if mode == "flatten":
        share = rng.uniform(*BLEND) if blend is None else blend
        values = share * means(values, regions)[regions] + (1 - share) * values
    elif mode == "edges":
        from skimage.segmentation import find_boundaries

        values[find_boundaries(regions, mode="inner")] *= DARKENED
    else:
        values = values * (1 + JITTER * rng.standard_normal(int(regions.max()) + 1))[regions][..., None]
    return np.rint(values).clip(0, 255).astype(np.uint8)


def means(values: np.ndarray, regions: Regions) -> np.ndarray:
    """The mean of each channel in each region, by its number."""
    flat = regions.ravel()
    pixels = np.bincount(flat).clip(1)
    return np.stack([np.bincount(flat, channel.ravel()) / pixels for channel in np.moveaxis(values, -1, 0)], axis=-1)


def snap_mask(mask: Mask, regions: Regions) -> Mask:
    """A rough mask moved to the borders of basins: a basin is wound where most of its pixels are. No augmentation."""
    share = means((mask > 0).astype(np.float64)[..., None], regions)[:, 0]
    return (share > 0.5).astype(np.uint8)[regions]


def turn(array: np.ndarray, quarters: int) -> np.ndarray:
    """An image, a mask or a map of regions turned by quarters of a circle, exactly."""
    return np.ascontiguousarray(np.rot90(array, quarters))


def reflect(array: np.ndarray, axis: int) -> np.ndarray:
    """Mirrored: upside down for axis 0, left to right for axis 1."""
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis}")
    return np.ascontiguousarray(np.flip(array, axis))


def rotate(array: np.ndarray, degrees: float | int) -> np.ndarray:
    """Turned about the middle in a frame of the same size: images bilinear, masks to the nearest pixel.

    What comes from beyond the frame is the mirror image.
    """
    from scipy.ndimage import affine_transform

    angle = np.deg2rad(degrees)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = (np.array(array.shape[:2]) - 1) / 2
    options: dict[str, Any] = {"offset": centre - matrix @ centre, "mode": "mirror"}
    if array.ndim == 2:
        return affine_transform(array, matrix, order=0, **options)
    channels = [
        affine_transform(part.astype(np.float64), matrix, order=1, **options) for part in np.moveaxis(array, -1, 0)
    ]
    return np.rint(np.stack(channels, axis=-1)).clip(0, 255).astype(np.uint8)


def colour_jitter(image: Image, strength: float | int, rng: Generator) -> Image:
    """White balance, brightness and contrast changed at random, by factors of 1 ± `strength`."""
    low, high = 1 - strength, 1 + strength
    values = image.astype(np.float64) * rng.uniform(low, high, 3)
    grey = values.mean()
    values = (values - grey) * rng.uniform(low, high) + grey * rng.uniform(low, high)
    return np.rint(values).clip(0, 255).astype(np.uint8)

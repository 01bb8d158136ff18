"""Slices of the MNI152 brain with their tissues, which nilearn ships: an average of 152 people, and one image."""

import importlib.util
from functools import cache

import numpy as np
from jaxtyping import Float32, UInt8

from provenn.core.errors import UserError

TISSUES = ("background", "other", "grey matter", "white matter")
# Heights of the slices, in mm from the lowest; 6 mm and more lie between splits, so that no neighbour is in two.
HEIGHTS = {"train": range(20, 96), "val": range(102, 116, 2), "test": range(122, 160, 2)}
ROWS, COLUMNS = 224, 192


@cache
def brain_slices(
    split: str,
) -> tuple[Float32[np.ndarray, "slices 224 192"], UInt8[np.ndarray, "slices 224 192"]]:
    """T1-weighted axial slices in 0…1, and of each pixel its tissue: the likelier of grey and white from 50 % on.

    Raises:
        UserError: nilearn is not installed.
    """
    if importlib.util.find_spec("nilearn") is None:
        raise UserError("the brain comes with nilearn, which is not installed: pip install 'provenn[medical]'")
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    t1, grey, white = (
        load(resolution=1).get_fdata(dtype=np.float32)
        for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    )
    mask = np.where(t1 > 0, 1, 0)
    mask[(grey >= 0.5) & (grey >= white)] = 2
    mask[(white >= 0.5) & (white > grey)] = 3
    heights = list(HEIGHTS[split])
    image = np.stack([_framed(t1[:, :, z]) for z in heights]) / t1.max()
    return image.astype(np.float32), np.stack([_framed(mask[:, :, z]) for z in heights]).astype(np.uint8)


def _framed(plane: np.ndarray) -> np.ndarray:
    """Seen from above with the nose up, in the middle of a frame."""
    plane = plane.T[::-1]
    framed = np.zeros((ROWS, COLUMNS), plane.dtype)
    height, width = (min(a, b) for a, b in zip(plane.shape, framed.shape))
    tops = [(a - b) // 2 for a, b in zip(plane.shape, (height, width))]
    into = [(a - b) // 2 for a, b in zip(framed.shape, (height, width))]
    part = plane[tops[0] : tops[0] + height, tops[1] : tops[1] + width]
    framed[into[0] : into[0] + height, into[1] : into[1] + width] = part
    return framed

"""Subjects made of the MNI152 brain template: one brain, moved, lit and grained anew for each subject.

A subject is a stack of axial slices with its tissues. Template and tissue maps are moved together by a random affine
map (scale and shear to 10 %, turns to 8°) and a smooth displacement. The image gets another contrast (a power of 0.7 to
1.4), a smooth field of brightness (to ±30 %) and Rician noise (σ of 4 to 10 % of white matter). All are one brain: what
differs between subjects is what is drawn here, and no patient was seen.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.brain import TISSUES
from provenn.papers.ms_guided_attention.task.volumes import scaled

SIDE, SPACING = 64, 3.0  # pixels of a slice, and millimetres between voxels
LEVELS = slice(13, 49, 2)  # of the template's axial slices: every second one, 6 mm apart
SEEDS = {"train": 0, "val": 1, "test": 2}
AFFINE, TURN, PUSH, SMOOTH = 0.1, np.pi / 22.5, 2.0, 7.0  # shares, radians, voxels, voxels


class Subject(NamedTuple):
    """Slices of one subject.

    Args:
        image: in 0…1.
        mask: the class of each voxel.
        spacing: millimetres between slices, rows and columns.
    """

    image: Float32[np.ndarray, "slices height width"]
    mask: UInt8[np.ndarray, "slices height width"]
    spacing: tuple[float, float, float]


@cache
def template() -> Float32[np.ndarray, "maps slices 64 64"]:
    """T1-weighted intensity, grey matter, white matter and the brain's inside, at 3 mm, in a frame of 64 pixels.

    Raises:
        UserError: nilearn is not installed.
    """
    try:
        from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
    except ImportError:
        raise UserError(
            "the brain comes with nilearn, which is not installed: pip install 'provenn[medical]'"
        ) from None
    from scipy.ndimage import binary_fill_holes

    t1, grey, white = (
        load(resolution=int(SPACING)).get_fdata(dtype=np.float32)
        for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    )
    # Inside is what grey and white matter enclose in a slice: the template's rim is resampling, and no tissue.
    enclosed = np.stack([binary_fill_holes(tissue) for tissue in np.moveaxis(grey + white > 0.5, 2, 0)], 2)
    maps = np.stack([t1 / t1.max(), grey, white, enclosed.astype(np.float32)])
    maps = np.ascontiguousarray(maps.transpose(0, 3, 2, 1)[:, :, ::-1])  # slices from below, the nose up
    rows, columns = ((length - SIDE) // 2 for length in maps.shape[2:])
    top, left = max(0, rows), max(0, columns)
    cut = maps[:, :, top : top + SIDE, left : left + SIDE]
    missing = [(0, 0), (0, 0), *((part // 2, part - part // 2) for part in (SIDE - s for s in cut.shape[2:]))]
    return np.pad(cut, missing)


def draw_subject(split: str, index: int, seed: int = 0) -> Subject:
    """One subject; another index, split or seed gives another one."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    rng = np.random.default_rng([seed, SEEDS[split], index])
    maps = template()
    shape = maps.shape[1:]
    centre = (np.array(shape) - 1)[:, None] / 2
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).reshape(3, -1)
    angles, stretch = rng.uniform(-TURN, TURN, 3), np.eye(3) + rng.uniform(-AFFINE, AFFINE, (3, 3)) * _SCALED
    places = _turned(angles) @ stretch @ (grid - centre) + centre
    pushed = np.stack([gaussian_filter(rng.standard_normal(shape), SMOOTH, mode="wrap") for _ in range(3)])
    pushed *= PUSH / pushed.std()
    where = (places.reshape(3, *shape) + pushed)[:, LEVELS]
    moved = np.stack([map_coordinates(one, where, order=1, mode="constant") for one in maps])
    t1, grey, white, inside = moved
    mask = np.where(inside > 0.5, 1, 0)
    mask[(grey >= 0.5) & (grey >= white)] = 2
    mask[(white >= 0.5) & (white > grey)] = 3
    image = np.clip(t1, 0, 1) ** rng.uniform(0.7, 1.4)
    image = image * _brightness(image.shape, rng)
    level = float(image[mask == 3].mean())
    noise = rng.uniform(0.04, 0.1) * level
    image = np.hypot(image + noise * rng.standard_normal(image.shape), noise * rng.standard_normal(image.shape))
    return Subject(scaled(image), mask.astype(np.uint8), (2 * SPACING, SPACING, SPACING))


_SCALED = np.array([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]])  # shear is half of the stretch


def _turned(angles: np.ndarray) -> np.ndarray:
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        turned = turned @ turn
    return turned


def _brightness(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A polynomial of second order over the volume, from 0.7 to 1.3."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    terms = [*axes, *(a * b for i, a in enumerate(axes) for b in axes[i:])]
    field = sum(weight * term for weight, term in zip(rng.standard_normal(len(terms)), terms))
    field -= field.mean()
    return 1 + 0.3 * field / max(1e-6, np.abs(field).max())


def draw_subjects(split: str, count: int, seed: int = 0) -> list[Subject]:
    """So many subjects of a split."""
    return [draw_subject(split, index, seed) for index in progress.track(range(count), f"drawing {split} subjects")]


__all__ = ["SIDE", "SPACING", "TISSUES", "Subject", "draw_subject", "draw_subjects", "template"]

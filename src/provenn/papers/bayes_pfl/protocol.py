"""Scores of images as the authors' evaluation has them, which looks at all images of a category together.

It is transductive: the smallest and the largest of a category's test images decide where each lies between 0 and 1. How
many pixels count follows from a list of names. `BayesPFL.score` knows one image alone, and one number of pixels.
`training.figures.figures_by_protocol` has the figures of both, beside each other.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

FEW = ("capsules", "macaroni1", "macaroni2", "pipe_fryum", "screw", "cashew", "chewinggum")
PIXELS = {True: 20, False: 2000}  # of the categories in `FEW`, and of others


def top_means(maps: Float[np.ndarray, "images height width"], count: int) -> Float[np.ndarray, " images"]:
    """The mean of the largest pixels of each map, before it is smoothed.

    >>> top_means(np.array([[[1.0, 2.0], [4.0, 3.0]]]), 2).tolist()
    [3.5]
    """
    flat = maps.reshape(len(maps), -1)
    count = min(count, flat.shape[1])
    return np.partition(flat, flat.shape[1] - count, 1)[:, -count:].mean(1)


def _stretched(values: Float[np.ndarray, " images"]) -> Float[np.ndarray, " images"]:
    return (values - values.min()) / (values.max() - values.min() + 1e-8)


def official_scores(
    probabilities: Float[np.ndarray, " images"],
    maps: Float[np.ndarray, "images height width"],
    categories: Sequence[str],
    *,
    alpha: float = 0.5,
) -> Float[np.ndarray, " images"]:
    """α · stretched probability + (1 − α) · stretched mean of the largest pixels, each within its category.

    Args:
        probabilities: of images, by global features.
        maps: not smoothed.
        categories: of each image.
        alpha: α.

    Raises:
        ValueError: other numbers of them.
    """
    if not len(probabilities) == len(maps) == len(categories):
        raise ValueError(
            "expected as many probabilities, maps and categories, got "
            f"{len(probabilities)}, {len(maps)} and {len(categories)}"
        )
    local = np.zeros(len(maps))
    for name in dict.fromkeys(categories):
        rows = np.array(categories) == name
        local[rows] = top_means(maps[rows], PIXELS[name in FEW])
    return add_stretched(probabilities, local, categories, alpha)


def add_stretched(
    probabilities: Float[np.ndarray, " images"],
    local: Float[np.ndarray, " images"],
    categories: Sequence[str],
    alpha: float,
) -> Float[np.ndarray, " images"]:
    """What `official_scores` gives, where only the means of the largest pixels were kept.

    Args:
        probabilities, categories, alpha: as there.
        local: of each map, by `top_means`.
    """
    scores = np.zeros(len(local))
    for name in dict.fromkeys(categories):
        rows = np.array(categories) == name
        scores[rows] = alpha * _stretched(probabilities[rows]) + (1 - alpha) * _stretched(local[rows])
    return scores

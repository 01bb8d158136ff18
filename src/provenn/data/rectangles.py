"""Rectangles of brick and of grass on gravel: objects that are known by their texture and found by their corners.

The textures are scikit-image's: training is cut from their upper halves, validation from the left of the lower ones,
tests from the right. A large rectangle looks alike wherever it is looked at, but at its edges.
"""

from functools import cache

import numpy as np

from provenn.data.photographs import grey_photograph
from provenn.data.scenes import Scene

RECTANGLE_CLASSES = ("brick", "grass")
RECTANGLE_SIDE = 64  # of a scene, in pixels
RECTANGLE_COUNTS = {"train": 1200, "val": 50, "test": 120}
SIDES = (16, 48)  # of a rectangle, in pixels
MOST = 3
NOISE = 12.0  # deviation, of 255


@cache
def rectangles(
    split: str,
    seed: int = 0,
    count: int | None = None,
    *,
    side: int = RECTANGLE_SIDE,
    sides: tuple[int, int] = SIDES,
    noise: float = NOISE,
) -> tuple[Scene, ...]:
    """The scenes of a split, the same for a seed.

    Args:
        split, seed: see `RECTANGLE_COUNTS`, which also says how many there are without a `count`.
        count: how many.
        side: of a scene, in pixels.
        sides: the least and the largest of a rectangle, in pixels.
        noise: its deviation, of 255.

    >>> first = rectangles("val")[0]
    >>> first.pixels.shape, 1 <= len(first.boxes) <= 3
    ((64, 64, 3), True)
    """
    rng = np.random.default_rng([seed, list(RECTANGLE_COUNTS).index(split)])
    return tuple(
        _scene(split, side, sides, noise, rng) for _ in range(RECTANGLE_COUNTS[split] if count is None else count)
    )


def _scene(split: str, side: int, sides: tuple[int, int], noise: float, rng: np.random.Generator) -> Scene:
    canvas = _piece("gravel", side, side, split, rng)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(1, MOST + 1))):
        label = int(rng.integers(len(RECTANGLE_CLASSES)))
        tall, wide = (int(length) for length in rng.integers(sides[0], sides[1] + 1, 2))
        for _ in range(20):
            top, left = int(rng.integers(0, side - tall + 1)), int(rng.integers(0, side - wide + 1))
            if not any(left < r and left + wide > x and top < b and top + tall > y for x, y, r, b in boxes):
                break
        else:
            continue
        canvas[top : top + tall, left : left + wide] = _piece(RECTANGLE_CLASSES[label], tall, wide, split, rng)
        boxes.append((left, top, left + wide, top + tall))
        labels.append(label)
    noisy = (canvas + rng.normal(0, noise, canvas.shape)).round().clip(0, 255).astype(np.uint8)
    return Scene(np.repeat(noisy[..., None], 3, axis=2), np.array(boxes, np.float32), np.array(labels, np.int64))


def _piece(name: str, tall: int, wide: int, split: str, rng: np.random.Generator) -> np.ndarray:
    """A cut of the region of a texture that is the split's own."""
    region = _region(grey_photograph(name), split)
    top, left = (int(rng.integers(0, have - need + 1)) for have, need in zip(region.shape, (tall, wide), strict=True))
    return region[top : top + tall, left : left + wide].astype(np.float64)


def _region(picture: np.ndarray, split: str) -> np.ndarray:
    height, width = (length // 2 for length in picture.shape)
    if split == "train":
        return picture[:height]
    return picture[height:, :width] if split == "val" else picture[height:, width:]

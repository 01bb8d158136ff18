"""Squares of the embedded photographs, for the studies."""

from collections.abc import Iterator, Sequence

import numpy as np

from provenn.data.photographs import photograph
from provenn.papers.s2lic.task.metrics import Pixels

TRAIN, VALIDATE = ("astronaut", "coffee", "rocket", "china", "hubble"), ("motorcycle",)
TEST = ("chelsea", "flower", "ihc")
SIDE = 256


def squares(name: str, count: int, rng: np.random.Generator, side: int = SIDE) -> Iterator[Pixels]:
    """So many squares of a photograph, where the generator says."""
    photo = photograph(name)
    for _ in range(count):
        top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
        yield np.ascontiguousarray(photo[top : top + side, left : left + side])


def middle(name: str, side: int = SIDE) -> Pixels:
    """The square in the middle of a photograph."""
    photo = photograph(name)
    top, left = ((length - side) // 2 for length in photo.shape[:2])
    return np.ascontiguousarray(photo[top : top + side, left : left + side])


def whole(names: Sequence[str]) -> list[np.ndarray]:
    """Photographs as they are."""
    return [photograph(name) for name in names]

"""Squares of the embedded photographs, for the studies."""

from collections.abc import Iterator, Sequence

import numpy as np

from provenn.data.photographs import photograph
from provenn.papers.s2lic.task.metrics import Pixels

TRAIN, VALIDATE = ("astronaut", "coffee", "rocket", "china", "hubble"), ("motorcycle",)
TEST = ("chelsea", "flower", "ihc")
SIDE = 256


def squares(name: str, count: int, rng: np.random.Generator) -> Iterator[Pixels]:
    """So many squares of 256 pixels of a photograph, where the generator says."""
    photo = photograph(name)
    for _ in range(count):
        top, left = (int(rng.integers(length - SIDE + 1)) for length in photo.shape[:2])
        yield np.ascontiguousarray(photo[top : top + SIDE, left : left + SIDE])


def middle(name: str) -> Pixels:
    """The 256 pixels in the middle of a photograph."""
    photo = photograph(name)
    top, left = ((length - SIDE) // 2 for length in photo.shape[:2])
    return np.ascontiguousarray(photo[top : top + SIDE, left : left + SIDE])


def whole(names: Sequence[str]) -> list[Pixels]:
    """Photographs as they are."""
    return [photograph(name) for name in names]

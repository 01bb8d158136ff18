"""Scenes of texture rectangles."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from provenn.data import rectangles as module
from provenn.data.rectangles import RECTANGLE_COUNTS, rectangles

BLOCKS = np.kron(np.arange(256, dtype=np.uint8).reshape(16, 16), np.ones((32, 32), np.uint8))  # each has its number


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[module.Scene, ...]]:
    """Scenes without noise from textures in which a pixel's value says where in the picture it lies."""
    monkeypatch.setattr(module, "grey_photograph", lambda name: BLOCKS)
    return rectangles.__wrapped__


def test_no_region_of_a_texture_is_in_two_splits(drawn):
    blocks = {
        split: {int(v) for scene in drawn(split, 3, noise=0.0) for v in np.unique(scene.pixels)}
        for split in RECTANGLE_COUNTS
    }
    for one, other in combinations(blocks, 2):
        assert not blocks[one] & blocks[other], (one, other)
    assert {split: len(found) for split, found in blocks.items()} == {"train": 128, "val": 64, "test": 64}


def test_scenes_and_rectangles_have_the_sides_that_are_asked_for():
    found = rectangles("test", 1, 40, side=128, sides=(20, 80), noise=25.5)
    assert {scene.pixels.shape for scene in found} == {(128, 128, 3)}
    lengths = np.concatenate([scene.boxes[:, 2:] - scene.boxes[:, :2] for scene in found])
    assert 20 <= lengths.min() < 30
    assert 70 < lengths.max() <= 80

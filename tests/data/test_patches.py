"""Patches of photographs."""

import pytest
import torch

from provenn.core.errors import UserError
from provenn.data import patches
from provenn.data.patches import BANDS, SOURCES, photo_patches
from provenn.tasks import get_task

TASK = get_task("image-classification")


def test_patches_repeat_and_show_something():
    images, labels = photo_patches("val", 5, seed=1)
    assert images.shape == (5 * len(SOURCES), 1, 32, 32) and labels.bincount().tolist() == [5] * len(SOURCES)
    assert images.mean((2, 3)).abs().max() < 0.05 and ((images.std((2, 3)) - 1).abs() < 0.05).all()
    again, _ = photo_patches("val", 5, seed=1)
    assert torch.equal(images, again)
    assert not torch.equal(images, photo_patches("val", 5, seed=2)[0])
    assert not torch.equal(images, photo_patches("test", 5, seed=1)[0])


def test_no_pixel_of_a_photograph_is_in_two_splits(monkeypatch):
    """Each photograph becomes its own columns' numbers, and the patches of a split hold those of its band alone."""
    columns = torch.arange(400.0).expand(400, 400)
    monkeypatch.setattr(patches, "grey_photograph", lambda name: columns.numpy())
    monkeypatch.setattr(patches, "FLATTEST", 0.0)
    for split, (first, last) in BANDS.items():
        band = patches._band.__wrapped__(SOURCES[0], split)
        drawn = patches._of_one(band, 50, 32, torch.Generator().manual_seed(0))
        assert drawn.min() >= 400 * first - 1e-3 and drawn.max() <= 400 * last - 1 + 1e-3
    ends = [end for band in BANDS.values() for end in band]
    assert ends == sorted(ends)


@pytest.mark.parametrize("side", [7, 41])
def test_sides_that_do_not_fit(side):
    with pytest.raises(ValueError, match="from 8 to 40"):
        photo_patches("train", 1, side=side)
    with pytest.raises(UserError, match="8 to 40 pixels"):
        TASK.load("patches", size=side)


def test_the_task_takes_them(monkeypatch):
    fewer = {"train": 3, "val": 1, "test": 1}
    for counts in (fewer, {"train": 4, "val": 2, "test": 3}):  # what is kept of one is not given for the other
        monkeypatch.setattr("provenn.tasks.image_classification.PATCHES", counts)
        data = TASK.load("patches", size=16)
    assert [len(part) for part in (data.train, data.val, data.test)] == [64, 32, 48]
    assert data.options == {"num_classes": 16, "in_channels": 1} and TASK.dummy_baseline(data) == pytest.approx(1 / 16)
    assert TASK.held_out("patches", data.meta).dataset[5][0].shape == (1, 16, 16)
    with pytest.raises(UserError, match="grey images of 16 photographs"):
        TASK.held_out("patches", {**data.meta, "classes": ["a"] * 16})

"""Views of regions: no photograph on two sides of a split, no region with another one's pixels, views that differ."""

import itertools

import numpy as np
import pytest
import torch

from provenn.data import regions
from provenn.data.patches import SOURCES
from provenn.data.photographs import GREY
from provenn.data.regions import (
    COUNTS,
    MARGIN,
    OF_CLASS,
    SIGHTING,
    SPLITS,
    Camera,
    Wander,
    class_names,
    region_classes,
    region_sightings,
)
from provenn.tasks import fingerprint

STILL = Wander(shift=0, turn=0, scale=0, hidden=0)


def test_no_photograph_is_in_two_splits_and_none_is_another_one_again():
    for one, other in itertools.combinations(SPLITS.values(), 2):
        assert not set(one) & set(other)
    names = [name for part in SPLITS.values() for name in part]
    assert len({fingerprint(regions._pixels(name)) for name in names}) == len(names) == 17
    assert not {"cat", "motorcycle_right"} & set(names), (
        "chelsea is scikit-image's cat, and the motorcycle is one scene"
    )
    for part in SPLITS.values():
        assert set(part) & set(GREY) and set(part) - set(GREY), "in each split a photograph's kind says nothing"


def test_identities_and_views_of_the_splits_are_apart():
    parts = {split: region_sightings(split, views=2) for split in SPLITS}
    people = [set(part.identities.tolist()) for part in parts.values()]
    assert [len(some) for some in people] == list(COUNTS.values())
    assert len(set.union(*people)) == sum(COUNTS.values())
    seen = [{fingerprint(image) for image in part.images} for part in parts.values()]
    assert all(len(some) == len(part.images) for some, part in zip(seen, parts.values())), "each view is another one"
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_identities_of_a_photograph_do_not_touch_each_other():
    """Whatever way a view is moved, turned and zoomed, it does not reach the rectangle of its neighbour."""
    for name in SPLITS["test"]:
        centres = regions._cells(name)
        gaps = (centres[:, None] - centres).abs()
        apart = (gaps[..., 0] >= SIGHTING[0] + MARGIN[0]) | (gaps[..., 1] >= SIGHTING[1] + MARGIN[1])
        assert (apart | torch.eye(len(centres), dtype=torch.bool)).all()
        height, width = regions._pixels(name).shape[1:]
        half = torch.tensor(SIGHTING) / 2
        assert ((centres >= half) & (centres <= torch.tensor([height, width]) - half)).all()
    reach, angle = 1.21 * torch.tensor(SIGHTING) / 2, np.deg2rad(14)  # the widest zoom and the largest turn
    corner = reach * np.cos(angle) + reach.flip(0) * np.sin(angle) + 4
    assert (corner < torch.tensor(SIGHTING) / 2 + torch.tensor(MARGIN)).all()


def test_a_view_that_does_not_wander_is_the_photograph():
    """The rectangle around the centre, exactly."""
    name = "coffee"
    centre = torch.tensor([[100.5, 200.5]])
    pixels = regions._pixels(name)
    cut = regions._cut(name, centre, (8, 6), torch.zeros(1), torch.ones(1))[0]
    assert torch.allclose(cut, pixels[:, 97:105, 198:204], atol=1e-2)
    turned = regions._cut(name, centre, (8, 8), torch.tensor([np.pi / 2]), torch.ones(1))[0]
    upright = regions._cut(name, centre, (8, 8), torch.zeros(1), torch.ones(1))[0]
    assert torch.allclose(turned, upright.rot90(1, (1, 2)), atol=0.1) or torch.allclose(
        turned, upright.rot90(-1, (1, 2)), atol=0.1
    )


def test_cameras_see_colour_darkness_blur_and_resolution():
    def by(camera):
        return region_sightings("val", identities=4, views=1, cameras=[camera], wander=STILL).images.float()

    plain = by(Camera())
    red = by(Camera(gain=(1.0, 0.5, 0.5)))
    assert torch.allclose(red[:, 1], plain[:, 1] / 2, atol=1) and torch.equal(red[:, 0], plain[:, 0])
    assert by(Camera(gamma=2.0)).mean() < plain.mean()
    rough = lambda x: (x[..., 1:] - x[..., :-1]).abs().mean()  # noqa: E731
    assert rough(by(Camera(blur=1.5))) < 0.8 * rough(plain) and rough(by(Camera(coarse=3.0))) < 0.8 * rough(plain)
    assert rough(by(Camera(noise=20.0))) > rough(plain)


def test_a_rectangle_hides_a_part_of_as_many_views_as_asked():
    def hidden(share):
        seen = [
            region_sightings(
                "val", identities=4, views=40, cameras=[Camera()], wander=Wander(0, 0, 0, hidden), seed=3
            ).images.float()
            for hidden in (0, share)
        ]
        return (seen[0] != seen[1]).any(1).flatten(1).float().mean(1)

    covered = hidden(1.0)
    assert (covered > 0).float().mean() > 0.95 and covered.max() <= 0.45 and 0.1 < covered.mean() < 0.3
    assert 0.25 < (hidden(0.5) > 0).float().mean() < 0.75
    assert hidden(0.0).max() == 0


def test_seeds_draw_other_regions_and_views_and_the_same_ones_again():
    one, same, other = (region_sightings("val", views=1, seed=seed).images for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_queries_are_the_first_view_of_each_identity_by_each_camera():
    seen = region_sightings("val")
    asked = {(i, c) for i, c in zip(seen.identities[seen.queries].tolist(), seen.cameras[seen.queries].tolist())}
    assert len(asked) == int(seen.queries.sum()) == COUNTS["val"] * 4
    assert len(seen.images) == COUNTS["val"] * 4 * 4


def test_more_identities_than_a_photograph_has_are_refused():
    with pytest.raises(ValueError, match="moon has 9 regions that do not touch"):
        region_sightings("val", photographs=["moon"], identities=10)


def test_classes_are_four_regions_of_each_photograph():
    images, labels = region_classes("val")
    assert images.shape == (64 * OF_CLASS["val"], 3, 32, 32) and labels.bincount().tolist() == [OF_CLASS["val"]] * 64
    assert len(class_names()) == 64 == len(set(class_names())) and len(SOURCES) == 16
    views = [{fingerprint(image) for image in region_classes(split)[0]} for split in OF_CLASS]
    assert len(set.union(*views)) == sum(map(len, views)) == 64 * sum(OF_CLASS.values())


def test_neighbouring_classes_overlap_by_half():
    """The right one of two regions is the left one 16 pixels on, whatever the seed."""
    images, _ = region_classes("val", photographs=["brick"], wander=STILL)
    left, right, below = (images[8 * k].float() for k in (0, 1, 2))
    assert torch.allclose(left[:, :, 16:], right[:, :, :16], atol=1)
    assert torch.allclose(left[:, 16:], below[:, :16], atol=1)
    again, _ = region_classes("val", photographs=["brick"], wander=STILL, seed=7)
    assert torch.equal(images, again)
    other, _ = region_classes("val", photographs=["brick"], wander=STILL, corner=0.1)
    assert not torch.equal(images, other)

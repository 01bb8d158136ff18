"""Augmentation of wound photographs, and the report of a mask."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.core.errors import UserError
from provenn.papers.pressure_ulcer import analysis, augment
from provenn.papers.pressure_ulcer.task import scenes
from provenn.papers.pressure_ulcer.task.photos import POLICIES, Policy, augmented


def picture(index=0, side=64):
    return scenes.draw(scenes.ULCERS, "train", index, seed=0, side=side)


# Augmentation


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(0, 1), st.integers(3, 17), st.integers(3, 17))
def test_turns_and_reflections_are_undone_bit_for_bit(quarters, axis, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(augment.turn(augment.turn(image, quarters), -quarters), image)
    assert np.array_equal(augment.reflect(augment.reflect(image, axis), axis), image)


def test_a_rotation_by_a_right_angle_is_a_turn_and_masks_stay_masks():
    image, mask = picture()
    assert np.array_equal(augment.rotate(image, 90), augment.turn(image, 1))
    assert np.array_equal(augment.rotate(mask, 90), augment.turn(mask, 1))
    assert set(np.unique(augment.rotate(mask, 33))) <= {0, 1}


@pytest.mark.parametrize(
    "policy", [POLICIES["geometric"], Policy(mode="flatten", share=1.0), Policy(mode="edges", share=1.0)]
)
def test_image_and_mask_stay_aligned(policy):
    mask = picture(side=96)[1]
    image = np.repeat(255 * mask[..., None], 3, axis=2)
    for seed in range(6):
        shown, moved = augmented(image, mask, policy, np.random.default_rng(seed))
        told = shown[..., 0] > 127 * (augment.DARKENED if policy.mode else 1)
        assert (told == (moved > 0)).mean() > 0.98
        again = augmented(image, mask, policy, np.random.default_rng(seed))
        assert np.array_equal(again[0], shown) and np.array_equal(again[1], moved)


def test_every_pixel_is_in_one_basin_and_the_same_seed_gives_the_same():
    image, _ = picture()
    regions = augment.basins(image, 50, rng=np.random.default_rng(3))
    assert regions.min() == 1 and 40 <= regions.max() <= 60
    assert set(np.unique(regions)) == set(range(1, regions.max() + 1))
    assert np.array_equal(regions, augment.basins(image, 50, rng=np.random.default_rng(3)))
    assert augment.basins(image, 10**6).max() <= image.shape[0] * image.shape[1] // augment.LEAST_BASIN * 1.2
    assert augment.basins(image[:1, :1], 50).tolist() == [[1]]


def test_flat_basins_keep_their_means_and_have_one_colour_each():
    image, _ = picture()
    regions = augment.basins(image, 80)
    flat = augment.watershed(image, "flatten", blend=1.0, regions=regions)
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) <= regions.max()
    assert np.abs(augment.means(flat, regions) - augment.means(image, regions))[1:].max() <= 0.5
    assert np.array_equal(augment.watershed(image, "flatten", blend=0.0, regions=regions), image)


def test_edges_darken_lines_alone_and_jitter_lights_basins_alone():
    from skimage.segmentation import find_boundaries

    image, _ = picture()
    regions = augment.basins(image, 80)
    lines = find_boundaries(regions, mode="inner")
    edged = augment.watershed(image, "edges", regions=regions)
    assert np.array_equal(edged[~lines], image[~lines])
    assert np.array_equal(edged[lines], np.rint(0.8 * image[lines]).astype(np.uint8))
    grey = np.full_like(image, 120)
    jittered = augment.watershed(grey, "jitter", regions=regions)
    assert (augment.means(jittered, regions)[regions] == jittered).all() and len(np.unique(jittered)) > 5


def test_strengths_of_the_watershed_are_those_that_are_named():
    """The share of flat colours lies in 0.3…0.8, and a basin's brightness changes by a twentieth."""
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, ::2] = 200
    one = np.ones((40, 40), np.int32)
    shares = []
    for seed in range(40):
        flat = augment.watershed(image, "flatten", rng=np.random.default_rng(seed), regions=one)
        shares.append(1 - (int(flat[0, 0, 0]) - int(flat[0, 1, 0])) / 200)
    assert 0.29 < min(shares) < 0.4 and 0.7 < max(shares) < 0.81
    grey, many = np.full((40, 40, 3), 128, np.uint8), np.arange(1, 1601, dtype=np.int32).reshape(40, 40)
    lit = augment.watershed(grey, "jitter", rng=np.random.default_rng(0), regions=many).astype(float) / 128
    assert abs(lit[..., 0].std() - 0.05) < 0.005 and abs(lit.mean() - 1) < 0.005


def test_a_rough_mask_snaps_to_basins_by_majority():
    regions = np.repeat(np.repeat(np.array([[1, 2], [3, 4]], np.int32), 4, 0), 4, 1)
    rough = np.zeros((8, 8), np.uint8)
    rough[:3, :4] = 1
    rough[4:5, 4:] = 1
    expected = (regions == 1).astype(np.uint8)
    assert np.array_equal(augment.snap_mask(rough, regions), expected)


@pytest.mark.parametrize("mode, options", [("paint", {}), ("flatten", {"blend": 2.0}), ("flatten", {"n_markers": 0})])
def test_watersheds_that_are_none_are_refused(mode, options):
    with pytest.raises(ValueError, match="must"):
        augment.watershed(picture()[0], mode, **options)


# Composed pictures


def test_pictures_repeat_and_differ_by_split_seed_and_domain():
    first = picture()
    assert all(np.array_equal(a, b) for a, b in zip(first, picture()))
    others = [
        scenes.draw(scenes.ULCERS, "test", 0, seed=0, side=64),
        scenes.draw(scenes.ULCERS, "train", 0, seed=1, side=64),
        scenes.draw(scenes.WOUNDS, "train", 0, seed=0, side=64),
    ]
    assert not any(np.array_equal(first[0], other) for other, _ in others)


def test_the_share_of_wound_is_that_of_ulcers():
    shares = {
        domain.name: np.mean([scenes.draw(domain, "test", i, seed=5, side=48)[1].mean() for i in range(60)])
        for domain in (scenes.ULCERS, scenes.WOUNDS)
    }
    assert 0.08 < shares["ulcers"] < 0.15 and shares["wounds"] < shares["ulcers"] / 2


def test_tissues_of_composed_wounds_are_found():
    image, mask = picture(3, 128)
    shares = analysis.tissues(image, mask > 0)
    assert sum(shares.values()) == pytest.approx(1) and shares["other"] < 0.25
    flat = {"granulation": (150, 40, 40), "slough": (190, 165, 100), "necrosis": (30, 25, 22)}
    for name, colour in flat.items():
        painted = np.broadcast_to(np.array(colour, np.uint8), (4, 4, 3))
        assert analysis.tissues(painted, np.ones((4, 4), bool))[name] == 1


# Reports


def disc(radius, side=400):
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return np.hypot(y, x) <= radius


def skin(side=400):
    return np.random.default_rng(0).integers(90, 220, (side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("radius", [40, 95, 150])
def test_a_disc_has_its_area_its_outline_and_its_diameter(radius):
    report = analysis.analyse(skin(), disc(radius), scale=analysis.Scale(20.0, "given"))
    assert report.area_cm2 == pytest.approx(np.pi * radius**2 / 400, rel=0.01)
    assert report.perimeter_cm == pytest.approx(2 * np.pi * radius / 20, rel=0.02)
    assert report.length_cm == pytest.approx(2 * radius / 20, rel=0.03) == report.width_cm
    assert report.centroid == (199.5, 199.5) and report.components == 1


def test_an_area_does_not_change_when_photograph_and_scale_are_resized():
    areas = [
        analysis.analyse(skin(side), disc(side / 4, side), scale=analysis.Scale(side / 20, "given")).area_cm2
        for side in (160, 320, 640)
    ]
    assert areas == pytest.approx([areas[0]] * 3, rel=0.01)


def test_length_and_width_are_those_of_a_turned_rectangle():
    mask = np.zeros((300, 300), np.uint8)
    mask[130:170, 60:240] = 1
    for degrees in (0, 30, 75):
        length, width = analysis.extents(augment.rotate(mask, degrees) > 0)
        assert length == pytest.approx(np.hypot(180, 40), rel=0.02)
        across = 2 * 180 * 40 / np.hypot(180, 40)  # of a rectangle, across its diagonal
        assert width == pytest.approx(across, rel=0.04)
    assert analysis.extents(np.zeros((3, 3), bool)) == (0.0, 0.0)
    assert analysis.extents(np.ones((1, 1), bool)) == pytest.approx((2**0.5, 2**0.5))


def test_warnings_say_what_a_reader_must_know():
    two = disc(40) | np.roll(disc(30), 150, 1)
    said = analysis.analyse(np.full((400, 400, 3), 128, np.uint8), two, probability=np.full((400, 400), 0.6))
    joined = "; ".join(said.warnings)
    assert all(
        part in joined for part in ("no scale", "2 parts", "blurred", "uncertain: the mean probability inside is 0.60")
    )
    edge = analysis.analyse(skin(), np.roll(disc(60), 140, 0), scale=analysis.Scale(9.0, "given"))
    assert edge.warnings == ("the wound touches the border of the photograph: its area is a lower bound",)
    none = analysis.analyse(skin(), np.zeros((400, 400), bool))
    assert "no wound was found in the photograph" in none.warnings and none.centroid is None
    assert json.dumps(none.as_json()) and "Not a medical device" in none.notice


def test_a_mask_is_cleaned_of_holes_and_specks():
    mask = disc(80)
    mask[195:205, 195:205] = False
    mask[5:8, 5:8] = True
    cleaned = analysis.clean(mask)
    assert np.array_equal(cleaned, disc(80))
    assert not analysis.clean(np.zeros((9, 9), bool)).any()


def test_a_scale_is_read_from_words():
    given = ["42.5px/cm", "ruler:5cm=212.5px", "coin: 2.325cm=98px"]
    assert [analysis.read_scale(words.replace(": ", ":")).source for words in given] == ["given", "ruler", "coin"]
    assert analysis.read_scale(given[1]).px_per_cm == analysis.read_scale(given[0]).px_per_cm == 42.5
    image = skin()
    image[disc(33)] = (20, 170, 60)
    found = analysis.read_scale("sticker:2cm:green", image)
    assert found.px_per_cm == pytest.approx(33, rel=0.01) and found.source == "sticker"


@pytest.mark.parametrize(
    "words", ["about a hand", "0px/cm", "ruler:0cm=5px", "sticker:2cm", "sticker:2cm:grey", "-3px/cm"]
)
def test_a_scale_that_is_none_is_refused(words):
    with pytest.raises(UserError, match=r"scale|sticker"):
        analysis.read_scale(words, skin())


def test_a_square_of_the_colour_is_no_sticker():
    image = skin()
    image[100:110, 20:380] = (20, 170, 60)
    with pytest.raises(UserError, match="no round green sticker"):
        analysis.read_scale("sticker:2cm", image)


def test_visits_say_what_changed():
    tracker = analysis.WoundTracker()
    scale = analysis.Scale(20.0, "given")
    assert tracker.add("2026-11-01", analysis.analyse(skin(), disc(100), scale=scale))["change"] == {}
    later = tracker.add("2026-11-08", analysis.analyse(skin(), disc(80), scale=scale))
    assert later["change"]["area_percent"] == pytest.approx(-36, abs=1)
    assert [day for day, _ in tracker.series("area_cm2")] == ["2026-11-01", "2026-11-08"]
    for date, said in (("2026-11-08", "already"), ("8 November", "2026-11-23")):
        with pytest.raises(ValueError, match=said):
            tracker.add(date, analysis.analyse(skin(), disc(9)))

"""Boxes in text: round trips within a unit, what a resize does, and bad boxes in one line."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from provenn.core.box_text import (
    CONVENTIONS,
    Box,
    check_box,
    convert_box,
    crop_box,
    flip_box,
    image_tokens,
    read_box,
    resize_box,
    smart_resize,
    write_box,
)
from provenn.core.errors import UserError

RELATIVE = ("qwen2-vl", "qwen3-vl", "fractions", "paligemma")
PARTS = {"qwen2-vl": 1000, "qwen3-vl": 1000, "fractions": 1000, "paligemma": 1024, "llava": 100}


@st.composite
def placed(draw) -> tuple[Box, tuple[int, int]]:
    """A box with an area, and the size of its picture."""
    width, height = draw(st.integers(28, 3000)), draw(st.integers(28, 3000))
    left, right = sorted(draw(st.lists(st.floats(0, width), min_size=2, max_size=2)))
    top, bottom = sorted(draw(st.lists(st.floats(0, height), min_size=2, max_size=2)))
    assume(right - left > 1e-3 and bottom - top > 1e-3)
    return Box(left, top, right, bottom), (width, height)


def unit(convention: str, size: tuple[int, int]) -> tuple[float, float]:
    """Pixels of the picture that a unit of the convention has, across and down."""
    if convention == "qwen2.5-vl":
        seen = smart_resize(*size)
        return size[0] / seen.width, size[1] / seen.height
    if convention == "llava":
        return max(size) / 100, max(size) / 100
    return tuple(side / PARTS[convention] for side in size) if convention in PARTS else (2e-4, 2e-4)  # type: ignore[return-value]


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=40, deadline=None)
@given(case=placed())
def test_a_round_trip_moves_an_edge_by_half_a_unit(convention, case):
    box, size = case
    assume(max(size) / min(size) <= 100)
    back = read_box(write_box(box, size, convention), size, convention)
    across, down = unit(convention, size)
    # A box below a unit is widened to one; PaliGemma's last bin stands for the picture's edge.
    large = box.right - box.left > 2 * across and box.bottom - box.top > 2 * down
    most = 1.0 if convention == "paligemma" else 0.5
    for edge, (before, after) in enumerate(zip(box, back)):
        moved = abs(before - after) / (across, down)[edge % 2]
        assert moved <= (most if large else 1.5) + 1e-3, (convention, box, back)


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=40, deadline=None)
@given(case=placed())
def test_what_was_written_is_written_again_to_the_character(convention, case):
    box, size = case
    text = write_box(box, size, convention)
    # A box that rounding widened to a unit, and an edge in the padding of a square, may move once.
    once = write_box(read_box(text, size, convention), size, convention)
    assert write_box(read_box(once, size, convention), size, convention) == once
    if convention in RELATIVE or convention == "qwen2.5-vl":
        assert once == text


@pytest.mark.parametrize("source", CONVENTIONS)
@pytest.mark.parametrize("target", CONVENTIONS)
def test_every_convention_is_converted_to_every_other(source, target):
    size = (1000, 500)  # padding to a square matters
    box = Box(100, 100, 500, 400)
    found = read_box(convert_box(write_box(box, size, source), size, source, target), size, target)
    assert all(abs(a - b) <= 6 for a, b in zip(box, found)), found


@settings(max_examples=40, deadline=None)
@given(case=placed(), new=st.tuples(st.integers(28, 3000), st.integers(28, 3000)))
def test_a_resize_leaves_what_is_relative(case, new):
    box, size = case
    for convention in RELATIVE:
        text = write_box(box, size, convention)
        assert resize_box(text, size, new, convention) == text


@settings(max_examples=40, deadline=None)
@given(case=placed(), factor=st.integers(1, 4))
def test_a_resize_scales_what_is_in_pixels(case, factor):
    box, size = case
    text = write_box([round(edge) for edge in box] if _whole(box) else (0, 0, 1, 1), size, "coco")
    new = (size[0] * factor, size[1] * factor)
    small, large = read_box(text, size, "coco"), read_box(resize_box(text, size, new, "coco"), new, "coco")
    assert all(factor * a == b for a, b in zip(small, large))


def _whole(box: Box) -> bool:
    left, top, right, bottom = map(round, box)
    return right > left and bottom > top


def test_a_box_of_the_whole_picture_is_written_to_its_edges():
    size = (640, 480)
    told = {convention: write_box((0, 0, 640, 480), size, convention) for convention in CONVENTIONS}
    assert told == {
        "coco": "[0, 0, 640, 480]",
        "qwen2-vl": "<|box_start|>(0,0),(1000,1000)<|box_end|>",
        "qwen2.5-vl": '{"bbox_2d": [0, 0, 644, 476]}',
        "qwen3-vl": '{"bbox_2d": [0, 0, 1000, 1000]}',
        "llava": "[0.00, 0.12, 1.00, 0.88]",
        "fractions": "[0.000, 0.000, 1.000, 1.000]",
        "paligemma": "<loc0000><loc0000><loc1023><loc1023>",
    }


@pytest.mark.parametrize(
    ("size", "seen", "tokens"),
    [
        ((1000, 700), (1008, 700), 900),
        ((640, 480), (644, 476), 391),
        ((1920, 1080), (1316, 728), 1222),
        ((4000, 3000), (1148, 840), 1230),
        ((500, 40), (504, 28), 18),
        ((30, 30), (56, 56), 4),
    ],
)
def test_sizes_are_those_that_transformers_gives(size, seen, tokens):
    assert tuple(smart_resize(*size)) == seen and image_tokens(*size) == tokens


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_the_rule_is_that_of_transformers(width, height):
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    assume(max(width, height) / min(width, height) <= 200)
    tall, wide = theirs(height, width, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    assert smart_resize(width, height) == (wide, tall)


def test_rounding_is_to_even():
    assert smart_resize(70, 98, min_pixels=1).width == 56  # 70 / 28 = 2.5


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ((10, 10, 10, 20), "no area"),
        ((10, 20, 30, 20), "no area"),
        ((30, 10, 10, 20), "no area"),
        ((-1, 0, 5, 5), "outside of the picture of 100×50"),
        ((0, 0, 101, 5), "outside"),
        ((0, 0, 5, math.nan), "four numbers"),
        ((0, 0, 5), "four numbers"),
    ],
)
def test_bad_boxes_are_refused_in_a_line(box, said):
    with pytest.raises(UserError, match=said) as caught:
        check_box(box, (100, 50))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "convention", "said"),
    [
        ("a dog", "qwen2-vl", "no box of the convention qwen2-vl"),
        ("(1,2),(1,5)", "qwen2-vl", "no area"),
        ("(1,2),(1001,5)", "qwen2-vl", "right edge .* is 1001: qwen2-vl has 0 to 1000"),
        ("[0.1, 0.2, 1.3, 0.4]", "fractions", "0 to 1"),
        ("[1, 2, 3]", "coco", "no box"),
        ("[90, 0, 20, 10]", "coco", "outside"),
        ("[-3, 0, 20, 10]", "coco", "outside"),
        ("<loc0001><loc0002><loc0003>", "paligemma", "no box"),
        ("<loc0001><loc0002><loc0003><loc2000>", "paligemma", "0 to 1024"),
        ("[0.0, 0.0, 0.5, 0.5]", "llava", "outside"),  # in the padding above a wide picture
        ("(1,2),(3,4)", "qwen", "no convention"),
    ],
)
def test_texts_without_a_box_are_refused_in_a_line(text, convention, said):
    with pytest.raises(UserError, match=said) as caught:
        read_box(text, (100, 50), convention)
    assert "\n" not in str(caught.value)


def test_a_missing_comma_is_read():
    assert read_box("(214,424),(583 884)", (1000, 1000), "qwen2-vl") == Box(214, 424, 583, 884)


def test_pictures_that_no_model_reads_are_refused():
    with pytest.raises(UserError, match="no area"):
        smart_resize(0, 10)
    with pytest.raises(UserError, match="200 times"):
        smart_resize(4000, 10)


@settings(max_examples=40, deadline=None)
@given(case=placed())
def test_two_flips_are_none(case):
    box, size = case
    assert all(a == pytest.approx(b, abs=1e-6) for a, b in zip(box, _twice(box, size)))


def _twice(box: Box, size: tuple[int, int]) -> Box:
    left, top, right, bottom = flip_box(box, size)
    left = max(left, 0.0)
    assume(right > left)
    return flip_box((left, top, right, bottom), size)


def test_a_crop_cuts_boxes_off_and_drops_what_is_left_too_little_of():
    assert crop_box((10, 10, 30, 30), (20, 0, 60, 60)) == Box(0, 10, 10, 30)
    assert crop_box((10, 10, 30, 30), (28, 0, 60, 60)) is None
    assert crop_box((10, 10, 30, 30), (40, 0, 60, 60), keep=0.0) is None

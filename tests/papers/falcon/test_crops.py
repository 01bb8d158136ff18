"""The choice of crops by the authors' rule, and cutting that leaves nothing out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from provenn.catalog import card
from provenn.core.errors import UserError
from provenn.papers.falcon import choose_grid, cut, cut_image, grids_up_to, markers_of, places_of, write_prompt
from provenn.papers.falcon.crops import MEAN, STD
from provenn.tasks.multimodal_chat import fitted

# Width and height, and rows and columns of at most 9 and of at most 16 crops of 384: of the authors' code.
CHOICES = {
    (384, 384): ((1, 1), (1, 1)), (512, 512): ((1, 1), (1, 1)), (640, 480): ((2, 3), (3, 4)),
    (500, 400): ((2, 3), (3, 4)), (1024, 768): ((2, 3), (3, 4)), (1920, 1080): ((2, 4), (3, 5)),
    (1080, 1920): ((4, 2), (5, 3)), (300, 1200): ((4, 1), (4, 1)), (2048, 2048): ((3, 3), (4, 4)),
    (1600, 600): ((1, 3), (2, 5)), (100, 90): ((2, 2), (2, 2)), (1275, 1650): ((3, 2), (4, 3)),
    (768, 768): ((2, 2), (2, 2)), (800, 200): ((1, 4), (1, 4)),
}  # fmt: skip


def test_grids_are_every_factorisation_in_order():
    assert [len(grids_up_to(n)) for n in (9, 16)] == [23, 50]
    grids = grids_up_to(16)
    assert len(set(grids)) == 50 and {rows * columns for rows, columns in grids} == set(range(1, 17))
    assert list(grids) == sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))


@pytest.mark.parametrize("size", CHOICES)
def test_choices_are_the_authors(size):
    assert tuple(choose_grid(*size, limit=limit) for limit in (9, 16)) == CHOICES[size]


def test_equal_scores_go_to_the_first_and_heights_are_cut_to_whole_pixels():
    """100×90 as 1×1: 345 of 384 rows; as 2×2: 691 of 768. Rounded up, the first would win."""
    assert choose_grid(100, 90) == (2, 2)
    assert choose_grid(1000, 1000, limit=3) == (1, 1)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1.0, 1.5, 4.0]))
@settings(max_examples=60, deadline=None)
def test_an_image_is_not_enlarged_beyond_what_is_allowed(width, height, most):
    rows, columns = choose_grid(width, height, 24, 9, max_upscale=most)
    fits = [(r, c) for r, c in grids_up_to(9) if max(24 * r / height, 24 * c / width) <= most]
    assert (rows, columns) in fits or (not fits and (rows, columns) == (1, 1))


def test_crops_put_together_are_the_resized_image():
    image = torch.randn(2, 3, 48, 72)
    crops = cut(image, (2, 3), 24)
    assert crops.shape == (2, 7, 3, 24, 24)
    rows = [torch.cat(list(crops[0, 1 + 3 * row : 4 + 3 * row]), dim=2) for row in range(2)]
    assert torch.equal(torch.cat(rows, dim=1), image[0])
    assert torch.equal(cut(image, (0, 0), 24), crops[:, :1])
    assert torch.equal(cut(image, (1, 1), 24)[:, 0], cut(image, (1, 1), 24)[:, 1])


@pytest.mark.parametrize(("height", "width", "grid"), [(31, 100, (2, 3)), (90, 40, (3, 1)), (20, 20, (2, 2))])
def test_crops_of_an_image_of_any_size_are_those_of_it_resized(height, width, grid):
    """Bicubic with the filter of PIL, to the grid's size in one step; its shape is not kept."""
    image = torch.randn(1, 3, height, width)
    rows, columns = grid
    large = F.interpolate(image, (24 * rows, 24 * columns), mode="bicubic", antialias=True)
    crops = iter(cut(image, grid, 24)[0])
    torch.testing.assert_close(next(crops), F.interpolate(image, (24, 24), mode="bicubic", antialias=True)[0])
    for row in range(rows):
        for column in range(columns):
            there = large[0, :, 24 * row : 24 * row + 24, 24 * column : 24 * column + 24]
            torch.testing.assert_close(next(crops), there)


def test_statistics_are_those_of_clip():
    """As `OPENAI_CLIP_MEAN` and `OPENAI_CLIP_STD` of transformers have them."""
    assert (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)) == (MEAN, STD)
    pixels = cut_image(torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None, None].expand(3, 24, 24), side=24).pixels
    expected = (torch.tensor([0, 128, 255]) / 255 - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
    torch.testing.assert_close(pixels[0, :, 0, 0], expected)


@given(st.integers(200, 6144), st.integers(200, 6144))
@settings(max_examples=200, deadline=None)
def test_pictures_of_the_user_s_reach_the_choice_of_a_grid_at_their_own_size(width, height):
    """The large preset shrinks none before, up to what 16 crops side by side hold."""
    reads = next(p for p in card("falcon").presets if p.name == "falcon_8b").reads
    read = fitted(torch.zeros(1, 1, 1, dtype=torch.uint8).expand(3, height, width), reads)
    assert tuple(read.shape[1:]) == (height, width)


def test_resizing_is_that_of_pil_up_to_rounding():
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((150, 100), Image.Resampling.BICUBIC)
    crops = cut_image(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1), side=24, limit=9)
    assert crops.grid == (2, 3) and crops.places.tolist()[:3] == [[9, 9], [0, 0], [0, 1]]
    levels = (crops.pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    whole = torch.from_numpy(np.asarray(picture.resize((24, 24), Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)
    large = np.asarray(picture.resize((72, 48), Image.Resampling.BICUBIC))
    assert (levels[0] - whole).abs().max() < 3.5
    assert (levels[6] - torch.from_numpy(large[24:, 48:].copy()).permute(2, 0, 1)).abs().max() < 3.5
    low = cut_image(torch.zeros(3, 50, 90, dtype=torch.uint8), side=24, limit=9, low_resolution=True)
    assert low.pixels.shape == (1, 3, 24, 24) and low.grid == (0, 0) and low.places.tolist() == [[9, 9]]


def test_places_and_markers_are_in_reading_order():
    assert places_of((2, 2), 9).tolist() == [[9, 9], [0, 0], [0, 1], [1, 0], [1, 1]]
    assert markers_of((2, 1)) == ["<global_img>", "<crop_img_row0_col0>", "<crop_img_row1_col0>"]
    assert places_of((0, 0)).tolist() == [[16, 16]] and markers_of((0, 0)) == ["<global_img>"]


def test_prompts_have_a_placeholder_for_each_crop():
    text = write_prompt("a <image> b <image> c", [(1, 1), (0, 0)])
    assert text == "a <global_img><image><crop_img_row0_col0><image> b <global_img><image> c"
    assert write_prompt("<image>?", [(1, 2)], markers=False) == "<image><image><image>?"
    with pytest.raises(UserError, match="the text has 1 placeholders <image> and there are 2 images"):
        write_prompt("<image>", [(1, 1), (1, 1)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0, "height": 5}, "at least one pixel, got 0×5"),
        ({"width": 5, "height": 5, "limit": 0}, "limit must be at least 1 crop, got 0"),
        ({"width": 5, "height": 5, "max_upscale": 0}, "max_upscale must be above 0, got 0"),
        ({"width": 5, "height": 5, "max_upscale": float("nan")}, "max_upscale must be"),
    ],
)
def test_wrong_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_grid(**arguments)

"""Bicubic resizing: what MATLAB's `imresize` promises."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.data.resize import bicubic

sizes = st.integers(1, 40)


@given(sizes, sizes, sizes, sizes)
@settings(max_examples=30, deadline=None)
def test_a_constant_image_stays_constant(height, width, height2, width2):
    x = torch.full((2, height, width), 0.7, dtype=torch.float64)
    torch.testing.assert_close(
        bicubic(x, (height2, width2)), torch.full((2, height2, width2), 0.7, dtype=torch.float64)
    )


@given(st.integers(2, 30), st.integers(2, 30))
@settings(max_examples=20, deadline=None)
def test_mirrored_images_give_mirrored_results(count, length):
    x = torch.rand(1, count, 3, dtype=torch.float64)
    torch.testing.assert_close(bicubic(x.flip(1), (length, 3)), bicubic(x, (length, 3)).flip(1))


def test_it_is_linear_and_acts_on_rows_and_columns_alone():
    x, y = torch.rand(2, 12, 9, dtype=torch.float64)
    torch.testing.assert_close(bicubic(2 * x - y, (6, 27)), 2 * bicubic(x, (6, 27)) - bicubic(y, (6, 27)))
    torch.testing.assert_close(bicubic(bicubic(x, (6, 9)), (6, 27)), bicubic(bicubic(x, (12, 27)), (6, 27)))
    assert torch.equal(bicubic(x, (12, 9)), x)


@pytest.mark.parametrize("scale", [2, 3, 4, 1 / 2, 1 / 3, 1 / 4])
def test_it_agrees_with_torch_inside_and_not_at_the_border(scale):
    x = torch.rand(1, 1, 48, 60, dtype=torch.float64)
    size = round(48 * scale), round(60 * scale)
    ours, theirs = bicubic(x, size), F.interpolate(x, size=size, mode="bicubic", antialias=True)
    rim = 2 * max(1, round(scale))
    torch.testing.assert_close(ours[..., rim:-rim, rim:-rim], theirs[..., rim:-rim, rim:-rim], atol=1e-6, rtol=0)
    assert (ours - theirs).abs().max() > 1e-3


def test_halving_weighs_eight_neighbours_by_the_stretched_kernel():
    """Worked by hand: k(|d|/2)/2 at d = 0.5, 1.5, 2.5, 3.5, around the centre 6.5 of the fourth pixel."""
    half = np.array([0.867188, 0.226562, -0.0703125, -0.0234375])
    weight = np.concatenate([half[::-1], half]) / 2
    impulses = torch.eye(8, dtype=torch.float64)[:, None]
    seen = bicubic(F.pad(impulses, (4, 4)), (1, 8))[:, 0]
    torch.testing.assert_close(seen[:, 3], torch.tensor(np.append(weight[1:], 0)), atol=1e-6, rtol=0)


def test_doubling_a_ramp_gives_a_ramp_inside():
    ramp = torch.arange(12, dtype=torch.float64)[None].repeat(3, 1)
    steps = bicubic(ramp, (3, 24))[0].diff()
    torch.testing.assert_close(steps[4:-4], torch.full_like(steps[4:-4], 0.5))


def test_the_border_repeats_the_last_pixel():
    x = torch.tensor([[5.0, 1.0]], dtype=torch.float64)
    mirrored = torch.tensor([[1.0, 5.0, 5.0, 1.0, 1.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(bicubic(x, (1, 4)), bicubic(mirrored, (1, 12))[:, 4:8])


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        bicubic(torch.rand(1, 4, 4), (0, 2))

"""Padding to multiples: the identity where nothing is missing, a mirror where something is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from provenn.nn.padding import PadToMultiple, mirror_pad


class Blur(nn.Module):
    """Twice as large, and every pixel depends on the whole image; refuses sides that are no multiples of 16."""

    def forward(self, x):
        assert x.shape[2] % 16 == x.shape[3] % 16 == 0
        return nn.functional.interpolate(x, scale_factor=2) + x.mean()


@pytest.mark.parametrize("size", [(1, 1), (5, 37), (16, 16), (33, 31)])
@pytest.mark.parametrize("mode", ["symmetric", "reflect"])
def test_padding_takes_any_size(size, mode):
    model = PadToMultiple(Blur(), 16, 2, mode=mode)
    x = torch.rand(1, 3, *size)
    assert model(x).shape == (1, 3, 2 * size[0], 2 * size[1])


def test_padding_leaves_whole_multiples_alone_unless_asked():
    model = Blur()
    x = torch.rand(1, 3, 32, 16)
    assert torch.equal(PadToMultiple(model, 16, 2)(x), model(x))
    padded = mirror_pad(x, 16, 16)
    assert padded.shape == (1, 3, 48, 32)
    assert torch.equal(PadToMultiple(model, 16, 2, always=True)(x), model(padded)[..., :64, :32])


@given(st.integers(1, 9), st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_mirror_padding_continues_by_reflection(size, extra):
    x = torch.arange(size).float()[None, None, :, None]
    symmetric = mirror_pad(x, extra, 0)[0, 0, :, 0]
    assert torch.equal(symmetric[:size], x[0, 0, :, 0])
    assert (symmetric.diff().abs() <= 1).all()
    once = min(extra, size)
    assert torch.equal(symmetric[size : size + once], x[0, 0, :, 0].flip(0)[:once])
    if 0 < extra < size:
        reflected = nn.functional.pad(x, (0, 0, 0, extra), mode="reflect")
        assert torch.equal(mirror_pad(x, extra, 0, "reflect"), reflected)


@pytest.mark.parametrize(
    "make", [lambda: mirror_pad(torch.rand(1, 1, 2, 2), 1, 1, "wrap"), lambda: PadToMultiple(Blur(), 0)]
)
def test_bad_arguments_are_refused(make):
    with pytest.raises((ValueError, TypeError), match=r"'symmetric'|at least 1"):
        make()

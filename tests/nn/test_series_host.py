"""The host of token mixers: padding does not reach the classes, and any mixer of the slot goes in."""

from functools import partial

import torch

from provenn.nn.attention import SoftmaxAttention
from provenn.nn.hosts import SeriesHost


def test_padding_changes_nothing_whatever_it_holds():
    torch.manual_seed(0)
    host = SeriesHost(partial(SoftmaxAttention, heads=2), channels=3, num_classes=4, dim=8).eval()
    x = torch.randn(2, 5, 3)
    padded = torch.cat([x, torch.full((2, 3, 3), 9.0)], dim=1)
    mask = torch.arange(8).expand(2, 8) < 5
    torch.testing.assert_close(host(padded, mask), host(x))


def test_order_matters():
    torch.manual_seed(0)
    host = SeriesHost(partial(SoftmaxAttention, heads=2), channels=3, num_classes=4, dim=8).eval()
    x = torch.randn(1, 5, 3)
    assert not torch.allclose(host(x), host(x.flip(1)))

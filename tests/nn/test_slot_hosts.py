"""The hosts of slots: what is compared in them is the mechanism alone."""

from functools import partial

import pytest
import torch
from torch import nn

from provenn.nn.attention import SoftmaxAttention
from provenn.nn.hosts import ResidualHost, SeriesHost
from provenn.tasks.image_hosts import Sum


@pytest.fixture
def series() -> SeriesHost:
    torch.manual_seed(0)
    return SeriesHost(partial(SoftmaxAttention, heads=2), channels=3, num_classes=4, dim=8).eval()


def test_padding_of_a_series_changes_nothing_whatever_it_holds(series: SeriesHost):
    x = torch.randn(2, 5, 3)
    padded = torch.cat([x, torch.full((2, 3, 3), 9.0)], dim=1)
    mask = torch.arange(8).expand(2, 8) < 5
    torch.testing.assert_close(series(padded, mask), series(x))
    torch.testing.assert_close(series(padded.flip(1), mask.flip(1)), series(x.flip(1)))


def test_the_order_of_a_series_matters(series: SeriesHost):
    x = torch.randn(1, 5, 3)
    assert not torch.allclose(series(x), series(x.flip(1)))


def test_a_tower_joins_each_branch_once_and_lets_the_join_set_its_weights():
    depths: list[int] = []

    class Zero(Sum):
        def initialise(self, branch: nn.Module, depth: int) -> None:
            depths.append(depth)
            for parameter in branch.parameters():
                nn.init.zeros_(parameter)

    tower = ResidualHost(Zero, num_classes=3, in_channels=1, dim=6, depth=4)
    x = torch.randn(2, 1, 9, 5)
    assert depths == [4] * 4
    torch.testing.assert_close(tower(x), tower.head(tower.embed(x)))

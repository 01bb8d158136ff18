"""Points joined without attention: each reads what it says, is as large as BVR, and all of it learns."""

import pytest
import torch

from provenn.nn.detection import pad_batch
from provenn.papers.relationnet_pp.experiments import JOINED
from provenn.papers.relationnet_pp.layers import Keys, PointMaps
from provenn.papers.relationnet_pp.rivals import JOINS, JoinedPoints, joined_detector, maps_of


def bridge(how):
    torch.manual_seed(0)
    return JoinedPoints(
        16, 2, (8,), how=how, unit=8.0, groups=4, point_convs=1, deeper=0, keys=5, keys_a_level=5
    ).double()


def test_the_nearest_key_is_read_and_where_it_lies():
    join, generator = bridge("nearest"), torch.Generator().manual_seed(1)
    features = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    positions = 40 * torch.rand(2, 5, 2, generator=generator, dtype=torch.float64)
    keys = Keys(features, positions, torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.long))
    read = join.read(keys, 4, 5, 8)
    assert read.shape == (2, 20, 18)
    for image in range(2):
        for y in range(4):
            for x in range(5):
                cell = torch.tensor([8 * x + 4, 8 * y + 4], dtype=torch.float64)
                nearest = int((positions[image] - cell).norm(dim=-1).argmin())
                expected = torch.cat([features[image, nearest], (positions[image, nearest] - cell) / 8])
                torch.testing.assert_close(read[image, 5 * y + x], expected)


def test_the_mean_is_of_all_keys_and_maps_are_the_cell_s_own():
    features = torch.randn(2, 5, 16, dtype=torch.float64)
    keys = Keys(features, torch.zeros(2, 5, 2), torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.long))
    torch.testing.assert_close(bridge("mean").read(keys, 4, 5, 8)[:, 0], features.mean(1))
    points = PointMaps([torch.randn(2, 2, 4, 5)], [torch.randn(2, 2, 4, 5)])
    read = maps_of(points, 0)
    assert read.shape == (2, 20, 4)
    torch.testing.assert_close(read[1, 5 * 2 + 3, :2], points.logits[0][1, :, 2, 3].sigmoid())
    torch.testing.assert_close(read[1, 5 * 2 + 3, 2:], points.offsets[0][1, :, 2, 3])


@pytest.mark.parametrize("how", JOINS)
def test_joins_of_nothing_leave_the_tower_but_for_relu(how):
    join = bridge(how)
    for layer in join.join.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    levels = [torch.randn(2, 16, 6, 7, dtype=torch.float64)]
    towers = [torch.randn(2, 16, 6, 7, dtype=torch.float64) for _ in range(2)]
    classification, regression, said = join(levels, [towers[0]], [towers[1]], (8,))
    torch.testing.assert_close(classification[0], towers[0].relu())
    torch.testing.assert_close(regression[0], towers[1].relu())
    assert set(said) == {"top_left", "bottom_right", "centre"}


@pytest.mark.parametrize("how", JOINS)
def test_a_join_is_as_large_as_bvr_and_all_of_it_learns(how):
    count = JOINED.columns["parameters"]
    assert count({"join": how}) == pytest.approx(count(JOINED.variants["bvr"][1]), rel=0.02)
    torch.manual_seed(0)
    model = joined_detector({"join": how})
    images = [torch.randn(3, 128, 128) for _ in range(2)]
    batch = pad_batch(images, [torch.tensor([[10.0, 20, 90, 70]])] * 2, [torch.tensor([1])] * 2)
    model.training_loss(batch).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_another_join_is_refused():
    with pytest.raises(ValueError, match="nearest, maps, mean"):
        bridge("attention")

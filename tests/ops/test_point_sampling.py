"""Farthest points and nearest points against their definitions by a table of all distances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.ops import point_sampling
from provenn.ops.point_sampling import (
    farthest_by_table,
    farthest_points,
    fast,
    nearest_by_table,
    nearest_points,
    smallest,
)


def cloud(batch: int, points: int, axes: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, points, axes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 4), st.integers(0, 2**31), st.data())
def test_both_are_what_the_tables_say(batch, points, axes, seed, data):
    p = cloud(batch, points, axes, seed)
    count, start = data.draw(st.integers(1, points)), data.draw(st.integers(0, points - 1))
    chosen = farthest_points(p, count, start=start)
    assert torch.equal(chosen, farthest_by_table(p, count, start))
    assert all(len(set(row)) == count for row in chosen.tolist()), "a point is chosen twice"
    centres = cloud(batch, 5, axes, seed + 1)
    assert torch.equal(nearest_points(p, centres, count), nearest_by_table(p, centres, count))


def test_each_cloud_of_a_batch_gets_what_it_gets_alone():
    p, centres = cloud(3, 50), cloud(3, 4, seed=1)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(farthest_points(p, 9)[one], farthest_points(p[one], 9))
        assert torch.equal(nearest_points(p, centres, 7)[one], nearest_points(p[one], centres[one], 7))


def test_pieces_of_the_table_of_distances_change_nothing(monkeypatch):
    p, centres = cloud(2, 40), cloud(2, 11, seed=1)
    whole = nearest_points(p, centres, 6)
    monkeypatch.setattr(fast, "TABLE", 100)  # one centre at a time
    assert torch.equal(nearest_points(p, centres, 6), whole)


def test_a_million_points_need_memory_for_one_table_at_a_time(monkeypatch):
    """The largest table of distances that is asked for has `TABLE` entries, or one centre's."""
    sizes, search = [], fast.smallest

    def counted(distances, count):
        sizes.append(distances.numel())
        return search(distances, count)

    monkeypatch.setattr(fast, "smallest", counted)
    p = torch.rand(1, 1_000_000, 3)
    chosen = farthest_points(p, 4)
    nearest_points(p, p[:, chosen[0]].repeat(1, 10, 1), 8)
    assert max(sizes) <= fast.TABLE and len(sizes) > 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 3), st.integers(0, 2**31), st.data())
def test_two_short_searches_find_what_one_does(numbers, rows, seed, data):
    count = data.draw(st.integers(1, max(1, numbers // 9)))
    x = torch.randn(rows, numbers, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(smallest(x, count), x.argsort(dim=1)[:, :count])
    few = (4 * x).round()  # many are alike
    assert torch.equal(few.gather(1, smallest(few, count)), few.sort(dim=1).values[:, :count])


def test_no_centres_have_no_neighbours():
    assert nearest_points(torch.rand(2, 9, 3), torch.rand(2, 0, 3), 4).shape == (2, 0, 4)


def test_points_that_lie_on_each_other_are_still_chosen_in_order():
    assert farthest_points(torch.zeros(1, 5, 3), 3).tolist() == [[0, 0, 0]]
    assert point_sampling.farthest_by_table(torch.zeros(1, 5, 3), 3).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: farthest_points(p, 11), "between 1 and the 10 points, got 11"),
        (lambda p: farthest_points(p, 0), "got 0"),
        (lambda p: farthest_points(p, 2, start=10), "0 to 9, got 10"),
        (lambda p: nearest_points(p, p, 11), "got 11"),
    ],
)
def test_numbers_out_of_range_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(cloud(1, 10))

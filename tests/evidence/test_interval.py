import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from provenn.evidence.interval import SMALLEST_BOOTSTRAP, paired_difference, paired_ratio, student

positive = st.floats(1e-3, 1e3)
pairs = st.lists(st.tuples(positive, positive), min_size=2, max_size=20)


def covered(draw, truth: float, repeats: int) -> float:
    """How often the interval of a simulated experiment holds the truth."""
    hits = 0
    for seed in range(repeats):
        low, high = draw(np.random.default_rng(seed))
        hits += low <= truth <= high
    return hits / repeats


@pytest.mark.parametrize("n", [3, 5, 10])
def test_student_s_interval_holds_the_mean_as_often_as_it_says(n):
    share = covered(lambda rng: student(rng.normal(2.0, 3.0, n).tolist())[0], 2.0, 1000)
    assert abs(share - 0.95) < 0.022  # three standard errors of a share of 1000


def test_a_paired_interval_is_not_widened_by_what_the_pairs_share():
    rng = np.random.default_rng(0)
    level = rng.normal(0, 100, 5)
    difference = rng.normal(1, 0.1, 5)
    (low, high), method = paired_difference((level + difference).tolist(), level.tolist())
    assert high - low < 1 and low < 1 < high and "paired over 5 seeds" in method


@pytest.mark.parametrize("n", [3, 8, 15, 25])
def test_the_interval_of_a_ratio_holds_it_as_often_as_it_says(n):
    def draw(rng):
        base = rng.lognormal(0, 1, n)
        return paired_ratio((base * 0.5 * rng.lognormal(0, 0.2, n)).tolist(), base.tolist())[1]

    assert covered(draw, 0.5, 500) > 0.92


@given(pairs)
def test_swapping_the_two_sides_inverts_a_ratio(values):
    system, baseline = zip(*values)
    there, (low, high), _ = paired_ratio(system, baseline)
    back, (low_back, high_back), _ = paired_ratio(baseline, system)
    assert math.isclose(there * back, 1, rel_tol=1e-9)
    assert math.isclose(low * high_back, 1, rel_tol=1e-9) and math.isclose(high * low_back, 1, rel_tol=1e-9)
    assert low <= there * (1 + 1e-12) and there <= high * (1 + 1e-12)


@given(pairs)
def test_swapping_the_two_sides_negates_a_difference(values):
    system, baseline = zip(*values)
    (low, high), _ = paired_difference(system, baseline)
    (low_back, high_back), _ = paired_difference(baseline, system)
    assert math.isclose(low, -high_back, abs_tol=1e-9) and math.isclose(high, -low_back, abs_tol=1e-9)


@given(pairs, st.floats(0.01, 100))
def test_a_ratio_does_not_depend_on_the_unit(values, scale):
    system, baseline = zip(*values)
    plain = paired_ratio(system, baseline)
    scaled = paired_ratio([scale * v for v in system], [scale * v for v in baseline])
    assert np.allclose([plain[0], *plain[1]], [scaled[0], *scaled[1]], rtol=1e-9)


@pytest.mark.parametrize("n, method", [(SMALLEST_BOOTSTRAP - 1, "Student's t"), (SMALLEST_BOOTSTRAP, "bootstrap")])
def test_the_method_is_named(n, method):
    assert method in paired_ratio([1.0] * n, [2.0] * n)[2]


def test_one_value_has_no_interval():
    assert student([1.0])[0] is None
    assert paired_difference([1.0], [2.0])[0] is None
    assert paired_ratio([1.0], [2.0])[:2] == (0.5, None)


def test_equal_values_have_an_interval_of_no_width():
    assert student([2.0, 2.0, 2.0])[0] == (2.0, 2.0)
    ratio, interval, _ = paired_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert ratio == 0.5 and np.allclose(interval, (0.5, 0.5))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_pairs_that_tie_at_one_step_prove_nothing_by_themselves(n):
    """Three seeds that each lose the same single image are no certainty that the next one would."""
    (low, high), method = paired_difference([0.991] * n, [0.994] * n)
    assert low < -0.003 < 0 < high
    assert "tie" in method


def test_many_pairs_that_tie_do_prove_something():
    assert paired_difference([0.991] * 30, [0.994] * 30)[0][1] < 0


def test_pairs_without_any_difference_agree_exactly():
    assert paired_difference([0.9, 0.8, 0.7], [0.9, 0.8, 0.7])[0] == (0.0, 0.0)


def test_what_is_not_a_number_spreads():
    (low, high), _ = student([1.0, math.nan, 2.0])
    assert math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("system, baseline", [([], []), ([1.0], []), ([1.0, 2.0], [1.0])])
def test_unequal_pairs_are_refused(system, baseline):
    for function in (paired_difference, paired_ratio):
        with pytest.raises(ValueError, match=f"got {len(system)} and {len(baseline)}"):
            function(system, baseline)


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_ratio_of_what_is_not_positive_is_refused(bad):
    with pytest.raises(ValueError, match="positive"):
        paired_ratio([1.0, 2.0], [1.0, bad])

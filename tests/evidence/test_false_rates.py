"""The simulated rates of docs/judging.md: no effect is taken for one more often than an interval of 95 % allows."""

import pytest

import plugins
from provenn.evidence import Verdict


@pytest.fixture(scope="module")
def script():
    return plugins.script("false_rates")


def test_no_effect_is_seldom_told_for_one(script):
    found = script.rates(script.BETTER, lambda rng: script.seeds(rng, 0.0, 5), 1000)
    assert found[Verdict.SUPPORTED] <= 45 and found[Verdict.CONTRADICTED] <= 45  # 25, and four standard errors
    clocks = script.rates(script.FASTER, lambda rng: script.clocks(rng, 1.0, 11), 500)
    assert clocks[Verdict.SUPPORTED] <= 28


def test_two_that_guess_are_never_told_to_be_on_par(script):
    found = script.rates(script.ON_PAR, lambda rng: script.seeds(rng, 0.0, 5, guessing=True), 300)
    assert found[Verdict.SUPPORTED] <= 15 and found[Verdict.NOT_MEASURED] >= 285

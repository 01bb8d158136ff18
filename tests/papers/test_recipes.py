"""Recipes at the papers' scale: the rates that they make are those of the code or text that each one names."""

import pytest
import torch
from torch import nn

from provenn.catalog import cards
from provenn.training.recipes import Recipe, recipe_of


def rates_by_epoch(recipe: Recipe, steps: int) -> list[float]:
    """The factor on the learning rate in each epoch, which has so many steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    factor = recipe.make_schedule(optimizer, recipe.epochs * steps, steps).lr_lambdas[0]
    rates = [[factor(epoch * steps + step) for step in range(steps)] for epoch in range(recipe.epochs)]
    assert all(len(set(epoch)) == 1 for epoch in rates), "it changes between epochs alone"
    return [epoch[0] for epoch in rates]


@pytest.mark.parametrize("steps", [1, 7, 266])
@pytest.mark.parametrize("slug, experiment", [("aaren", "forecasting_paper"), ("titans", "forecasting_paper")])
def test_forecasters_halve_the_rate_as_their_library_does(slug, experiment, steps):
    """It sets the rate of the next epoch after each: 1 · 0.5^(n − 1) after the n-th."""
    (found,) = [one for one in cards()[slug].experiments if one.id == experiment]
    assert found.at_paper is not None
    rates = rates_by_epoch(recipe_of(found.at_paper.recipe), steps)
    assert rates == [1.0, *(0.5 ** (n - 1) for n in range(1, 10))]


def test_classifiers_lower_the_rate_every_five_epochs():
    (found,) = [one for one in cards()["aaren"].experiments if one.id == "classification_paper"]
    assert found.at_paper is not None
    rates = rates_by_epoch(recipe_of(found.at_paper.recipe), 3)
    assert rates[:6] == 5 * [1.0] + [1 / 16] and rates[10] <= 1 / 256


def test_titans_take_gated_deltanets_share_of_warm_up_and_end_at_a_tenth():
    sized = [preset for preset in cards()["titans"].presets if preset.recipe.get("precision") == "bf16-mixed"]
    assert {preset.name for preset in sized} == {f"titans_{size}" for size in ("170m", "340m", "400m", "760m", "1_3b")}
    for preset in sized:
        recipe = recipe_of(preset.recipe)
        assert recipe.max_steps is not None and recipe.warmup_steps * 100 == recipe.max_steps
        assert recipe.final_lr == pytest.approx(recipe.lr / 10)

"""Recipes and the training itself, on Lightning."""

from provenn.training.augmentation import check_recipe
from provenn.training.loop import Fit, fit
from provenn.training.module import Diverged
from provenn.training.recipes import Recipe

__all__ = ["Diverged", "Fit", "Recipe", "check_recipe", "fit"]

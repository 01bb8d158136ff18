"""Recipes and the training itself, on Lightning."""

from provenn.training.augmentation import check_recipe
from provenn.training.loop import Fit, fit
from provenn.training.module import Diverged
from provenn.training.options import Hardware, Saving
from provenn.training.order import Batches
from provenn.training.recipes import Recipe
from provenn.training.stages import Stage, fit_stages, new_then_all, only, run_stages

__all__ = [
    "Batches",
    "Diverged",
    "Fit",
    "Hardware",
    "Recipe",
    "Saving",
    "Stage",
    "check_recipe",
    "fit",
    "fit_stages",
    "new_then_all",
    "only",
    "run_stages",
]

"""One module a kind of work: data in, batch, loss, metric, picture, prediction."""

from provenn.tasks.base import Task, TaskData, fingerprint, get_task, split_indices
from provenn.tasks.training import Diverged, Fit, Recipe, fit

__all__ = ["Diverged", "Fit", "Recipe", "Task", "TaskData", "fingerprint", "fit", "get_task", "split_indices"]

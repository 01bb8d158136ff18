"""One module a kind of work: data in, batch, loss, metric, picture, prediction."""

from provenn.tasks.base import Task, TaskData, fingerprint, get_task, split_indices

__all__ = ["Task", "TaskData", "fingerprint", "get_task", "split_indices"]

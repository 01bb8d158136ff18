"""One module a kind of work: data in, batch, loss, metric, picture, prediction."""

from provenn.tasks.base import (
    Portable,
    Task,
    TaskData,
    batches,
    call,
    count_examples,
    device_of,
    fingerprint,
    join_scores,
    split_indices,
)
from provenn.tasks.discovery import get_task, task_names

__all__ = [
    "Portable",
    "Task",
    "TaskData",
    "batches",
    "call",
    "count_examples",
    "device_of",
    "fingerprint",
    "get_task",
    "join_scores",
    "split_indices",
    "task_names",
]

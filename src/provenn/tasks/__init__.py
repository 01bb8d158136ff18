"""One module a kind of work: data in, batch, loss, metric, picture, prediction.

Names are loaded when they are asked for: which tasks there are, and their faces, is read without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from provenn.tasks.faces import Face, face_of

_DISCOVERY = {"get_task": "discovery", "task_names": "discovery", "Face": "faces", "face_of": "faces"}
__all__ = [
    "Face",
    "Portable",
    "Task",
    "TaskData",
    "batches",
    "call",
    "count_examples",
    "device_of",
    "face_of",
    "fingerprint",
    "get_task",
    "join_scores",
    "split_indices",
    "task_names",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.{_DISCOVERY.get(name, 'base')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

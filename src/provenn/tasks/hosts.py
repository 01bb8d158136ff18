"""The hosts of slots: networks with one open slot, in which a task compares mechanisms at equal budget.

A task's faces (`provenn.tasks.faces`) name its `Host` for each slot that it has one for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from provenn.tasks.base import TaskData

Factory = Callable[..., nn.Module]


@dataclass(frozen=True)
class Probe:
    """A second task, which shows where a candidate's quality comes from: how far back it can look.

    Args:
        task, data, sizes: what is learned, and how it is loaded.
        build: as of `Host`, for this task.
        steps: of each training, by budget.
        by_distance: of a trained model the distance, the share that is predicted right and the count, for each.
        about: what is asked, for a caption.
        chance: the share that a guess predicts right.
    """

    task: str
    data: str
    sizes: Mapping[str, Any]
    build: Callable[[Factory, dict[str, Any]], nn.Module]
    steps: Mapping[str, int]
    by_distance: Callable[[nn.Module, TaskData], list[tuple[float, float, int]]]
    about: str
    chance: float


@dataclass(frozen=True)
class Host:
    """A network with one open slot, and how it is trained.

    Args:
        task: what it learns.
        build: makes it from a mechanism's factory and the options of the data.
        baselines: what every mechanism of the slot is compared with; the first is the reference.
        recipe: arguments of `provenn.training.Recipe`, for each budget.
        lrs: the learning rates that each candidate may choose from, on validation data.
        about: the host in one phrase.
        sizes: how the task loads the data.
        files: endings of the files that are this host's, where a slot has several; "hf:" stands for data of the hub.
        probe: a second task for every candidate.
        contexts: by budget, after how many tokens the time of one token more is measured.
        example: a batch of one example of the data, whose loss is timed; by default the first one of the test.
    """

    task: str
    build: Callable[[Factory, dict[str, Any]], nn.Module]
    baselines: Callable[[], Mapping[str, Factory]]
    recipe: Mapping[str, Mapping[str, Any]]
    lrs: tuple[float, ...]
    about: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    probe: Probe | None = None
    contexts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    example: Callable[[TaskData], Any] | None = None


def budgets(recipe: Mapping[str, Any], small: int, paper: int) -> dict[str, dict[str, Any]]:
    """A recipe for each budget, by its epochs."""
    return {
        "smoke": {**recipe, "epochs": 1, "max_steps": 2},
        "small": {**recipe, "epochs": small, "max_steps": 1000},
        "paper": {**recipe, "epochs": paper},
    }

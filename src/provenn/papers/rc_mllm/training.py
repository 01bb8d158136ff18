"""The small model's training: to read entries by their boxes, and then to see where things are as well. (ours)

RCVIT tunes Qwen2-VL, which has learned before to point at what it is asked for, and to find what stands in its prompt.
A small model has to learn both. What finds an entry by its box is learned first: a model that had learned to see before
did not come upon it in as many steps again.
"""

from dataclasses import replace

from torch import nn
from torch.utils.data import ConcatDataset

from provenn.core.narrowing import of_kind
from provenn.papers.rc_mllm.task import Regions, grounding
from provenn.tasks import Task, TaskData
from provenn.training import Recipe, Stage

READING = 0.2  # share of the steps or epochs before questions about the pictures alone are among the others


def read_then_see(model: nn.Module, task: Task, data: TaskData, recipe: Recipe) -> list[Stage]:
    """The stages `reading`, on the samples, and `seeing`, on them and on questions about their pictures alone.

    Samples that do not say what their objects look like are trained on in one stage, for all the steps.

    Args:
        model, task, data, recipe: as of `provenn.training.fit_stages`.
    """
    places = grounding(of_kind(data.train, Regions, "what is trained on"))
    if not len(places):
        return [Stage("reading", task, data, recipe)]
    both = replace(data, train=ConcatDataset([data.train, places]))
    stages = []
    for name, part, share in (("reading", data, READING), ("seeing", both, 1 - READING)):
        steps = None if recipe.max_steps is None else max(1, round(share * recipe.max_steps))
        of_stage = replace(recipe, epochs=max(1, round(share * recipe.epochs)), max_steps=steps)
        stages.append(Stage(name, task, part, of_stage))
    return stages

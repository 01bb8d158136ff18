"""The four stages of FALCON's training (section 4.1 of the paper, and the authors' scripts), on data of any size."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from provenn.core.errors import UserError
from provenn.papers.falcon.model import CropEncoder
from provenn.tasks import Task, TaskData
from provenn.training import Recipe, Stage, only

Learns = Callable[[Any], Iterable[nn.Parameter]]


def four_stages(model: nn.Module, task: Task, data: TaskData, recipe: Recipe) -> list[Stage]:
    """Alignment and whole images, then crops, then ReAtten; the epochs and steps of the recipe in equal parts.

    | stage | reads | ViT | ReAtten |
    | --- | --- | --- | --- |
    | alignment | the whole image | frozen | none |
    | whole | the whole image | learns | none |
    | crops | crops | learns | none |
    | exchange | crops | frozen | a copy of self-attention, which learns |

    Registers, tables of crops and projector learn in all. So does the decoder here, which begins with no language; the
    authors freeze theirs in the first. A model of `low_resolution` has the first two stages, and one without ReAtten
    the first three. What the number of stages does not divide, the first ones have more.

    Raises:
        UserError: fewer epochs than stages.
    """
    encoder = _encoder(model)
    frozen, all_of_it = _but_the_tower, nn.Module.parameters
    stages: list[tuple[str, bool, bool, Learns]] = [
        ("alignment", True, False, frozen),
        ("whole", True, False, all_of_it),
    ]
    if not encoder.low_resolution:
        stages.append(("crops", False, False, all_of_it))
        if encoder.vit.interact is not None:
            stages.append(("exchange", False, True, frozen))
    count, steps = len(stages), recipe.max_steps
    if steps is None and recipe.epochs < count:
        raise UserError(f"a training in {count} stages takes at least {count} epochs, one a stage, got {recipe.epochs}")
    return [
        Stage(
            name,
            task,
            data,
            replace(
                recipe,
                epochs=_part(recipe.epochs, count, number),
                max_steps=None if steps is None else _part(steps, count, number),
            ),
            partial(_set, low_resolution=low, exchange=exchange, learns=learns),
        )
        for number, (name, low, exchange, learns) in enumerate(stages)
    ]


def _part(whole: int, count: int, number: int) -> int:
    """What the stage of this number takes of a whole, at least 1; the first stages take what is left over."""
    return max(1, whole // count + int(number < whole % count))


def _encoder(model: nn.Module) -> CropEncoder:
    return next(part for part in model.modules() if isinstance(part, CropEncoder))


def _but_the_tower(model: nn.Module) -> Iterator[nn.Parameter]:
    tower = set(_encoder(model).vit.tower.parameters())
    return (parameter for parameter in model.parameters() if parameter not in tower)


@contextmanager
def _set(model: nn.Module, *, low_resolution: bool, exchange: bool, learns: Learns) -> Iterator[nn.Module]:
    """Inside, the encoder reads and learns as a stage says; ReAtten then begins as a copy of the self-attention."""
    encoder = _encoder(model)
    vit, low, interact = encoder.vit, encoder.low_resolution, encoder.vit.interact
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    encoder.low_resolution, vit.interact = low_resolution, interact if exchange else None
    try:
        with only(lambda inside: (p for p in learns(inside) if asked[p]), model) as inside:
            yield inside
    finally:
        encoder.low_resolution, vit.interact = low, interact
        if not exchange:
            vit.copy_attention()

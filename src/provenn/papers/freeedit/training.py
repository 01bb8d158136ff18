"""FreeEdit's phased training: instructions, then details, then quality; and the joint one that it is compared with."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset, Subset

from provenn.core.narrowing import of_kind
from provenn.papers.freeedit.model import FreeEdit
from provenn.papers.freeedit.start import take_stable_diffusion
from provenn.tasks import Task, TaskData
from provenn.training import Recipe, Stage, only

SHARES = {"prior": 0.3, "instruction": 0.3, "details": 0.34, "quality": 0.06}  # of all steps; inferred
CLEANEST = 0.1  # share of the training that quality tuning reads
QUALITY_RATE = 0.3  # of the rate, in quality tuning
Learns = Callable[[FreeEdit], Iterable[nn.Parameter]]


def phases(model: nn.Module, task: Task, data: TaskData, recipe: Recipe, *, joint: bool = False) -> list[Stage]:
    """The stages of a training from nothing; the recipe's steps and epochs are shared out by `SHARES`.

    - prior: extractor and text transformer learn, as a model of pictures.
    - instruction: the denoiser, which begins as the extractor, and the Q-Former learn, without refer-attention.
    - details: denoiser, Q-Former and branches learn, with λ = 1. The branches begin as copies.
    - quality: the same learn on the cleanest tenth of each kind.

    The paper starts from Stable Diffusion, which has its prior: with the option `start` the first stage is left out,
    and the others share its steps. Of a `design` that freezes, the denoiser stays as stage 1 left it from details on.

    Args:
        model, task, data, recipe: as of `provenn.training.fit_stages`.
        joint: details from the first step on, in place of instruction and then details.
    """
    tuned, editor = cleanest(data), of_kind(model, FreeEdit, "the system")
    started = editor.start is not None
    if editor.start is not None:
        take_stable_diffusion(editor, editor.start, editor.start_image)
    plan: list[tuple[str, float, TaskData, str, bool]] = [("prior", SHARES["prior"], data, "prior", False)]
    if joint:
        share = SHARES["instruction"] + SHARES["details"]
        plan.append(("joint", share, data, "details", not started))
    else:
        plan.append(("instruction", SHARES["instruction"], data, "instruction", not started))
        plan.append(("details", SHARES["details"], data, "details", False))
    plan.append(("quality", SHARES["quality"], tuned, "details", False))
    stages, whole = [], 1.0
    if started:
        whole = 1 - plan.pop(0)[1]
    for name, part_of, part, phase, begins in plan:
        share = part_of / whole
        steps = None if recipe.max_steps is None else max(1, round(share * recipe.max_steps))
        epochs = max(1, round(share * recipe.epochs))
        if name == "quality":  # a tenth of the examples: as many steps as its share has
            epochs = max(1, round(share * recipe.epochs / CLEANEST))
        rate = QUALITY_RATE * recipe.lr if name == "quality" else recipe.lr
        warm = 0 if name == "quality" else recipe.warmup_steps
        of_stage = replace(recipe, epochs=epochs, max_steps=steps, lr=rate, warmup_steps=warm)
        stages.append(Stage(name, task, part, of_stage, opened(phase, begins=begins)))
    return stages


def opened(phase: str, *, begins: bool = False) -> Callable[[Any], AbstractContextManager[nn.Module]]:
    """For `Stage.learning`: what learns in a phase, and what is begun before it.

    Args:
        phase: "prior", "instruction" or "details".
        begins: whether the denoiser begins as the extractor. Without it the branches begin anew where they have not
            learned yet.
    """
    learns = {"prior": _of_prior, "instruction": _of_instruction, "details": _of_details}[phase]
    return partial(_open, phase=phase, learns=learns, begins=begins)


def _of_prior(model: FreeEdit) -> Iterator[nn.Parameter]:
    yield from model.extractor.parameters()
    yield from model.instruction.text.parameters()


def _of_instruction(model: FreeEdit) -> Iterator[nn.Parameter]:
    branch = _branch(model)
    yield from (parameter for parameter in model.denoiser.parameters() if parameter not in branch)
    yield from model.instruction.qformer.parameters()


def _of_details(model: FreeEdit) -> Iterator[nn.Parameter]:
    yield from _branch(model) if model.design.freeze else model.denoiser.parameters()
    yield from model.instruction.qformer.parameters()


def _branch(model: FreeEdit) -> set[nn.Parameter]:
    return set() if model.refer is None else set(model.refer.parameters())


@contextmanager
def _open(model: FreeEdit, *, phase: str, learns: Learns, begins: bool) -> Iterator[nn.Module]:
    if begins:
        model.take_prior()
    elif phase == "details" and model.refer is not None and not model.detailed:
        model.refer.reset()
    model.detailed = phase == "details"
    with model.in_phase(phase), only(learns, model):
        yield model


def cleanest(data: TaskData) -> TaskData:
    """The share of the training of the highest quality, by its own word, of each kind of edit.

    Removals are all clean, since nothing is repainted there: of all kinds together they alone would stay.
    """
    edits = [data.train[k] for k in range(len(data.train))]  # type: ignore[arg-type]
    quality, kinds = np.array([(float(edit.quality), int(edit.kind)) for edit in edits]).T
    best: list[int] = []
    for kind in np.unique(kinds):
        numbers = np.flatnonzero(kinds == kind)
        count = max(1, round(CLEANEST * len(numbers)))
        best += numbers[np.argsort(-quality[numbers], kind="stable")[:count]].tolist()
    best.sort()
    train: Dataset[Any] = Subset(data.train, best)
    return replace(data, train=train)

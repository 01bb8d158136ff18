"""The stages in which Bayes-PFL learns: a small CLIP where there is none, prompts with maps, then image scores."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.bayes_pfl.model import BayesPFL
from provenn.papers.bayes_pfl.training.pictures import Captioned, captioned, contrast, textures_of
from provenn.tasks.anomaly_detection import AnomalyDetection
from provenn.tasks.base import Task, TaskData
from provenn.training import Batches, Recipe, Stage, only

CLIP_BATCH, CLIP_RATE = 64, 1.5e-3
LATE = 0.25  # epochs of the second stage, as a share of those of the first


class ImageScores(AnomalyDetection):
    """The same work, whose second stage is judged by the AP of images."""

    metric = "image_ap"


def stages(model: BayesPFL, task: Task, data: TaskData, recipe: Recipe) -> list[Stage]:
    """What learns, one after the other.

    1. `clip`, of a system with `clip_steps`: both towers, from composed textures and their captions.
    2. `prompts`: prompts, distributions, attention and maps, on images with masks, by the best AP of pixels.
    3. `scores`, with `stage=2`: both mappings and the pooling, by the best AP of images.

    Args:
        model: the system.
        task: anomaly detection.
        data: with the names of its categories in `meta`.
        recipe: of the prompts; the scores have a quarter of the epochs, at a constant rate.

    Raises:
        UserError: a large CLIP with new weights, on which nothing can be learned; or a recipe of other systems, see
            `BayesPFL.check_recipe`.
    """
    model.check_recipe(recipe)
    listed = []
    if model.clip_steps:
        # The seed of the run fixes what is drawn.
        seed = torch.initial_seed() % 2**31
        make = partial(
            captioned, textures_of(data.meta["categories"]), data.meta, seed=seed, steps=model.clip_steps,
            batch=CLIP_BATCH,
        )  # fmt: skip
        listed.append(
            Stage.of_batches(
                "clip",
                _contrast,
                Batches(make, model.clip_steps),
                partial(only, _towers),
                lr=CLIP_RATE,
                weight_decay=0.01,
                decay_vectors=False,
                schedule="onecycle",
                clip=1.0,
            )
        )
    elif not model.pretrained:
        raise UserError(
            "the prompts learn upon a CLIP that is trained, and this one has new weights: give --set clip=FOLDER, a "
            "folder of Hugging Face"
        )
    listed.append(Stage("prompts", task, data, recipe, partial(_in_stage, 1)))
    if model.stage == 2:
        late = replace(
            recipe,
            epochs=max(1, round(LATE * recipe.epochs)),
            max_steps=None if recipe.max_steps is None else max(1, round(LATE * recipe.max_steps)),
            schedule="constant",
            milestones=(),
            final_lr=0.0,
            warmup_steps=0,
        )
        listed.append(Stage("scores", ImageScores(), data, late, partial(_in_stage, 2)))
    return listed


def _contrast(model: BayesPFL, batch: Captioned) -> Tensor:
    return contrast(model.clip, batch)


def _towers(model: BayesPFL) -> Sequence[nn.Parameter]:
    return list(model.clip.parameters())


@contextmanager
def _in_stage(stage: int, model: Any) -> Iterator[nn.Module]:
    with model.in_stage(stage), only(lambda network: network.of_stage(stage), model):
        yield model

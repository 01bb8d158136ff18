"""Figures of images by both protocols: a system's own scores, and the authors', from one pass over the data."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import nn
from torch.utils.data import DataLoader, Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.papers.bayes_pfl.model import BayesPFL
from provenn.papers.bayes_pfl.protocol import FEW, PIXELS, add_stretched, top_means
from provenn.tasks.base import device_of
from provenn.tasks.curves import Curve


@torch.no_grad()
def figures_by_protocol(
    model: nn.Module, dataset: Dataset, *, count: int | None = None, alpha: float = 0.5, batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """AUROC, AP and F1-max of images, the means over categories, by two protocols from one pass over the data.

    "clean" is what `provenn evaluate` says: `BayesPFL.score` of each image by itself. "official" takes the scores of
    `official_scores`. Figures of pixels are the same in both, so they are not repeated here.

    Args:
        model: a Bayes-PFL system in eval mode.
        dataset: of anomaly detection, such as `held_out(...).dataset` of the task.
        count: how many of the largest pixels count in the official score. Default: 2000, or 20 of the categories in
            `FEW`, which the authors chose for images of 518×518 pixels.
        alpha: see `official_scores`. The authors have 1 where a set has no masks.
        batch_size: images at a time.

    Raises:
        UserError: another system, no images, or a category without a normal or without a defective one.
        ValueError: a count or an α out of range.
    """
    if not isinstance(model, BayesPFL):
        raise UserError(f"{type(model).__name__} has no probability beside its map: give a system of Bayes-PFL")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    known = dataset.names  # type: ignore[attr-defined]  # a data set of anomaly detection
    categories: list[str] = []
    probabilities: list[float] = []
    local: list[float] = []
    clean: list[float] = []
    defective: list[bool] = []
    for images, numbers, labels, _ in progress.track(DataLoader(dataset, batch_size=batch_size), "both protocols"):
        names = [known[number] for number in numbers.tolist()]
        said = model.explain(images.to(device_of(model)), names if model.reads_names else None)
        maps = said.layers.mean(0)
        clean += model.score(said.probability, maps).float().cpu().tolist()
        for name, one in zip(names, maps.float().cpu().numpy(), strict=True):
            local += top_means(one[None], count or PIXELS[name in FEW]).tolist()
        categories += names
        probabilities += said.probability.float().cpu().tolist()
        defective += (labels > 0).tolist()
    if not categories:
        raise UserError("the data hold no images: give a test split")
    official = add_stretched(np.array(probabilities), np.array(local), categories, alpha)
    return {
        name: _image_figures(scores, np.array(defective), categories)
        for name, scores in (("clean", np.array(clean)), ("official", official))
    }


def _image_figures(
    scores: Float[np.ndarray, " images"], defective: Bool[np.ndarray, " images"], categories: Sequence[str]
) -> dict[str, float]:
    figures = []
    for name in dict.fromkeys(categories):
        rows, curve = np.array(categories) == name, Curve()
        curve.add(scores[rows], defective[rows])
        try:
            figures.append(curve.summary())
        except UserError as error:
            raise UserError(f"the category {name!r} cannot be judged: {error}") from None
    return {f"image_{key}": float(np.mean([each[key] for each in figures])) for key in figures[0]}

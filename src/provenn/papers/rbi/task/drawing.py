"""Pictures: S and A of a batch beside its images, and accuracy by protocol and by size of the batch."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.papers.rbi.model import BATCH, View
from provenn.papers.rbi.task import mixes, sweep
from provenn.tasks.base import Scores, count_examples, device_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 12  # images of a batch
SHOWN_PROTOCOLS = {"accuracy": "as predicted", "single": "single", "random": "random", "ordered": "ordered"}


def draw_batch(
    images: Float[Tensor, "batch channels height width"],
    view: View,
    mean: list[float],
    std: list[float],
    title: str = "",
) -> "Figure":
    """S and A of a batch as heat maps, its images along both sides.

    Args:
        images: standardised with `mean` and `std`.
        view: what `RBI.view` gives of them; of several heads the mean is shown.
        title: over it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    maps: list[tuple[str, Tensor]] = [("A: who attends (row) to whom", view.related.attention.mean(0))]
    if view.relations is not None:
        maps.insert(0, ("S: how alike the pixels are", view.relations))
    for part, (label, values) in zip(figure.subfigures(1, len(maps), squeeze=False)[0], maps, strict=True):
        _heat_map(part, label, values[: len(images), : len(images)].float().cpu().numpy(), _pixels(images, mean, std))
    gate = view.related.gate
    beta = "" if gate is None else f"β is {float(gate.mean()):.2f} on the mean"
    figure.suptitle("; ".join(part for part in (title, beta) if part), fontsize=10)
    return figure


def _heat_map(figure: Any, label: str, values: np.ndarray, pixels: list[np.ndarray]) -> None:
    count = len(values)
    ratios = [1.0] + [1.0] * count
    grid = figure.add_gridspec(count + 1, count + 1, width_ratios=ratios, height_ratios=ratios, wspace=0, hspace=0)
    for i in range(count):
        for cell in (grid[i + 1, 0], grid[0, i + 1]):
            axes = figure.add_subplot(cell)
            axes.imshow(pixels[i], cmap="gray")
            axes.set_axis_off()
    axes = figure.add_subplot(grid[1:, 1:])
    figure.colorbar(axes.imshow(values, aspect="auto", cmap="viridis"), ax=axes, shrink=0.7)
    axes.set_axis_off()
    figure.suptitle(label, fontsize=9)


def _pixels(images: Tensor, mean: list[float], std: list[float]) -> list[np.ndarray]:
    m, s = (torch.tensor(values)[:, None, None] for values in (mean, std))
    shown = (images.float().cpu() * s + m).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return [image[..., 0] if image.shape[2] == 1 else image[..., :3] for image in shown]


def draw_protocols(model: nn.Module, dataset: Dataset, scores: Scores) -> "Figure":
    """Accuracy in each protocol and by size of the batch, and S and A of a shuffled batch.

    Args:
        model: in eval mode.
        dataset: the images, in the order of the scores.
        scores: as `BatchRecognition.scores` gives them.
    """
    from matplotlib.figure import Figure

    if not mixes(model):
        figure = Figure(figsize=(5, 4), layout="constrained")
        _bars(figure.subplots(), scores)
        return figure
    figure = Figure(figsize=(13, 10), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[2, 3])[:, 0]
    left, right = upper.subplots(1, 2)
    _bars(left, scores)
    by_size = sweep(model, dataset)
    right.plot(list(by_size), list(by_size.values()), marker="o", color="#1a5fb4")
    right.set(xscale="log", xlabel="images in a batch", ylabel="accuracy, shuffled", title="size of the batch")
    right.set_xticks(list(by_size), [str(size) for size in by_size])
    system: Any = model
    order = torch.randperm(count_examples(dataset), generator=torch.Generator().manual_seed(0))
    batch = torch.stack([dataset[int(i)][0] for i in order[: getattr(model, "batch", BATCH)]])
    if hasattr(system, "view"):
        with torch.no_grad():
            view = system.view(batch.to(device_of(model)))
        encode, heads = system.relation.encode, view.related.attention.mean(0)
        shown = _pixels(batch[:SHOWN], encode.mean.tolist(), encode.std.tolist())
        maps = [("A: who attends (row) to whom, 12 of the batch", heads)]
        if view.relations is not None:
            maps.insert(0, ("S: how alike the pixels are, 12 of a batch", view.relations))
        for part, (label, values) in zip(lower.subfigures(1, len(maps), squeeze=False)[0], maps, strict=True):
            _heat_map(part, label, values[:SHOWN, :SHOWN].float().cpu().numpy(), shown)
    return figure


def _bars(axes: "Axes", scores: Scores) -> None:
    named = {label: scores[name] for name, label in SHOWN_PROTOCOLS.items()}
    values = [float(column.mean()) for column in named.values()]
    spread = [1.96 * float(column.std()) / max(len(column), 1) ** 0.5 for column in named.values()]
    axes.bar(
        list(named), values, yerr=spread, capsize=4, color=["#2e7d32", "#1a5fb4", "#62a0ea", "#b00020"][: len(named)]
    )
    axes.set(ylim=(0, 1), ylabel="accuracy", title="the same images in each protocol")

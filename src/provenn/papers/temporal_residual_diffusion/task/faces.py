"""What is shown of a video from events: events in colour, strips, drift, and the demo of the page."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core.narrowing import of_kind
from provenn.papers.temporal_residual_diffusion.model import Reconstructor
from provenn.papers.temporal_residual_diffusion.task.clips import flight, seen_by_camera
from provenn.papers.temporal_residual_diffusion.task.metrics import compared
from provenn.papers.temporal_residual_diffusion.task.videos import strip
from provenn.tasks import count_examples, device_of
from provenn.tasks.base import Scores
from provenn.tasks.demos import Trial, as_shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEMO_SIDE, DEMO_WINDOWS = 96, 8


def drawn(voxel: Tensor) -> np.ndarray:
    """A grid in colour on white: red where pixels grew brighter, blue where darker, (height, width, 3)."""
    total = voxel.sum(0).clamp(-3, 3).numpy() / 3
    up, down = np.maximum(total, 0)[..., None], np.maximum(-total, 0)[..., None]
    colours = 255 - up * np.array([35.0, 205, 195]) - down * np.array([215.0, 155, 35])
    return colours.round().astype(np.uint8)


def picture_of(voxels: Tensor, truth: Tensor, told: Tensor) -> "Figure":
    """Some windows of a clip: events, truth, frames."""
    from matplotlib.figure import Figure

    rows = {
        "events": strip([drawn(voxel) for voxel in voxels]),
        "true": strip([frame[0].numpy() for frame in truth]),
        "rebuilt": strip([frame[0].numpy() for frame in told]),
    }
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (name, image) in zip(figure.subplots(3, 1), rows.items()):
        axes.imshow(image, cmap="gray", vmin=0, vmax=None if image.ndim == 3 else 1, interpolation="nearest")
        axes.set(xticks=[], yticks=[], ylabel=name)
    return figure


def evaluated(model: nn.Module, dataset: Dataset, scores: Scores) -> "Figure":
    """The error by frame: whether it drifts; and the errors of the clips against those of holding the first frame.

    Args:
        model: what rebuilt.
        dataset: what of.
        scores: of the task.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    drift, beside = figure.subplots(1, 2)
    by_frame = scores["by_frame"]
    number = np.arange(1, by_frame.shape[1] + 1)
    drift.plot(number, np.nanmean(by_frame, 0), color="black")
    if len(by_frame) > 1:
        drift.fill_between(number, *np.nanquantile(by_frame, [0.1, 0.9], axis=0), alpha=0.2, color="black")
    drift.set(xlabel="frames after the known one", ylabel="mean square error", ylim=(0, None))
    held = []
    for index in range(count_examples(dataset)):
        frames = dataset[index][1]
        held.append(float((frames[1:] - frames[:1]).square().mean()))
    beside.scatter(held, scores["mse"], s=12, color="black")
    most = max(max(held), float(np.nanmax(scores["mse"])))
    beside.plot([0, most], [0, most], color="black", linestyle=":")
    beside.set(xlabel="error of holding the first frame", ylabel="error of the model")
    return figure


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: a camera moves over the picture, and the frames are rebuilt from its events and the first one."""
    from PIL import Image

    picture = np.asarray(as_shown(trial.file).convert("L"))
    least, side = int(np.ceil(2.3 * DEMO_SIDE)), 4 * min(picture.shape)
    top, left = (max(0, length - side) // 2 for length in picture.shape)
    picture = picture[top : top + side, left : left + side]  # of a line of pixels the middle
    if min(picture.shape) < least:
        scale = least / min(picture.shape)
        shape = round(picture.shape[1] * scale), round(picture.shape[0] * scale)
        picture = np.asarray(Image.fromarray(picture).resize(shape))
    rng = np.random.default_rng(7)
    clip = seen_by_camera(flight(picture, rng, DEMO_WINDOWS, DEMO_SIDE), rng)
    network = of_kind(trial.model, Reconstructor, "the model")
    device = device_of(network)
    voxels = [voxel[None].to(device) for voxel in clip.voxels]
    told = torch.cat([frame.cpu() for frame in network.frames(voxels, clip.frames[:1].to(device))])
    size = (0, 0)
    for name, frames in (("before", clip.frames[1:]), ("after", told)):
        image = Image.fromarray(
            np.concatenate([_grid(frames), np.concatenate([drawn(clip.voxels[0]), drawn(clip.voxels[-1])], 1)], 0)
        )
        image.save(f"{name}.png")
        size = image.size
    values, held = compared(told, clip.frames[1:]), compared(clip.frames[:1].expand_as(told), clip.frames[1:])
    words = (
        f"{int(clip.counts.sum()):,} simulated events, red where it grew brighter, blue where darker. Mean square "
        f"error {values['mse']:.4f}, of holding the first frame {held['mse']:.4f}"
    )
    return {"kind": "compared", "size": size, "names": ["What the camera passed", "Out of its events"], "text": words}


def _grid(frames: Tensor) -> np.ndarray:
    """The middle and the last frame beside one another, in colour."""
    chosen = [(255 * frames[i, 0].clamp(0, 1)).round().byte().numpy() for i in (len(frames) // 2, len(frames) - 1)]
    return np.repeat(np.concatenate(chosen, 1)[..., None], 3, 2)

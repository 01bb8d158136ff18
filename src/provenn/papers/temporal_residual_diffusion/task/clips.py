"""Short clips of a camera that moves over a picture, with the events that a simulated event camera gives of them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from provenn.data.photographs import grey_photograph
from provenn.papers.temporal_residual_diffusion.simulator import Events, Sensor, Simulator, joined
from provenn.papers.temporal_residual_diffusion.voxels import Grids

# Pictures, by what is done with them: none is in two of the three.
TRAIN = ("camera", "astronaut", "coffee", "rocket", "brick", "gravel", "coins", "page", "china")
VALIDATE = ("flower", "ihc", "cell")
TEST = ("chelsea", "grass", "moon", "motorcycle")
SIDE, WINDOWS, SUB = 32, 9, 8  # pixels, windows of a clip, renderings of a window
RATE = 30.0  # frames a second
SHOT = 0.1  # events of noise a second and pixel: about one in 300
THRESHOLDS = (0.15, 0.3)


class Clip(NamedTuple):
    """Grids and counts of windows beside the frames around them.

    Args:
        voxels: (windows, bins, height, width), over the bounds of each window.
        frames: (windows + 1, 1, height, width), intensities in 0…1.
        counts: (windows, 2, height, width), events of positive and of negative polarity.
    """

    voxels: Tensor
    frames: Tensor
    counts: Tensor


class Clips(Dataset):
    """Clips as a data set.

    Args:
        clips: of one size and length where they are to be trained on.
        percentile: whether frames are stretched from percentiles 1 and 99 before they are compared.
    """

    def __init__(self, clips: Sequence[Clip], percentile: bool = False):
        self.clips, self.percentile = list(clips), percentile

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:
        return self.clips[index]


def gathered(
    frames: Float[np.ndarray, "frames rows columns"],
    parts: Sequence[Events],
    ends: Sequence[float | int],
    grids: Grids = Grids(),  # noqa: B008  # a tuple
) -> Clip:
    """A clip of frames and of the events between them.

    Args:
        frames: one more than parts.
        parts: the events of each window.
        ends: the times of the frames.
        grids: how grids are made.
    """
    size = parts[0].size
    made = [grids.of(start, end, part) for part, start, end in zip(parts, ends[:-1], ends[1:], strict=True)]
    counts = np.zeros((len(parts), 2, *size), np.float32)
    for number, part in enumerate(parts):
        place = part.y.astype(np.int64) * size[1] + part.x
        for sign, chosen in enumerate((part.p > 0, part.p < 0)):
            counts[number, sign] = np.bincount(place[chosen], minlength=size[0] * size[1]).reshape(size)
    return Clip(
        torch.from_numpy(np.stack(made)),
        torch.from_numpy(np.asarray(frames, np.float32))[:, None],
        torch.from_numpy(counts),
    )


def flight(
    picture: np.ndarray, rng: np.random.Generator, windows: int, side: int
) -> Float[np.ndarray, "frames rows columns"]:
    """What a camera sees that moves over a picture: translation with acceleration, rotation, zoom, gain and offset.

    Its speed changes as much over a long clip as over a short one.

    Args:
        picture: grey, 0…255.
        rng: of the way.
        windows: of the clip.
        side: of the view.
    """
    rows, columns = picture.shape
    t = np.arange(windows * SUB + 1) / SUB  # in frames
    zoom = rng.uniform(1.0, min(2.5, min(rows, columns) / (2.2 * side))) * np.exp(rng.normal(0, 0.01) * t)
    angle = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.02) * t
    speed, bend = rng.normal(0, 1.2, 2), rng.normal(0, 0.08, 2) * (WINDOWS / windows)
    way = (speed[:, None] * t + bend[:, None] * t**2) * zoom
    reach = 0.75 * side * zoom.max() + np.abs(way).max(1)
    middle = [rng.uniform(min(r, length / 2), max(length - r, length / 2)) for r, length in zip(reach, (rows, columns))]
    grid = np.arange(side) - (side - 1) / 2
    down, across = np.meshgrid(grid, grid, indexing="ij")
    cos, sin = (zoom * f(angle) for f in (np.cos, np.sin))
    y = (middle[0] + way[0])[:, None, None] + cos[:, None, None] * down + sin[:, None, None] * across
    x = (middle[1] + way[1])[:, None, None] - sin[:, None, None] * down + cos[:, None, None] * across
    place = np.stack([2 * x / (columns - 1) - 1, 2 * y / (rows - 1) - 1], -1).astype(np.float32)
    source = torch.from_numpy(picture.astype(np.float32) / 255)[None, None].expand(len(t), -1, -1, -1)
    seen = F.grid_sample(source, torch.from_numpy(place), padding_mode="reflection", align_corners=True)
    gain = rng.uniform(0.6, 1.0)
    offset = rng.uniform(0, 1 - gain)
    return (gain * seen[:, 0].numpy().astype(np.float64) + offset).clip(0, 1)


def flight_over(
    name: str, rng: np.random.Generator, windows: int, side: int
) -> Float[np.ndarray, "frames rows columns"]:
    """`flight` over a bundled picture."""
    return flight(grey_photograph(name), rng, windows, side)


def seen_by_camera(
    frames: Float[np.ndarray, "frames rows columns"],
    rng: np.random.Generator,
    grids: Grids = Grids(),  # noqa: B008  # a tuple
) -> Clip:
    """A clip of frames rendered `SUB` times a window, and the events of a camera whose thresholds are drawn.

    Args:
        frames: intensities.
        rng: of the camera.
        grids: how grids are made.
    """
    positive = rng.uniform(*THRESHOLDS)
    sensor = Sensor(positive, positive * rng.normal(1, 0.1), mismatch=0.02, shot=SHOT)
    camera, step = Simulator(frames[0], 0.0, sensor, int(rng.integers(2**31))), 1 / (RATE * SUB)
    parts = [camera.step(frame, (number + 1) * step) for number, frame in enumerate(frames[1:])]
    whole = [joined(parts[start : start + SUB]) for start in range(0, len(parts), SUB)]
    return gathered(frames[::SUB], whole, [number * SUB * step for number in range(len(whole) + 1)], grids)


@lru_cache(maxsize=16)
def flights(
    names: tuple[str, ...],
    count: int,
    seed: int,
    windows: int = WINDOWS,
    side: int = SIDE,
    grids: Grids = Grids(),  # noqa: B008  # a tuple
) -> tuple[Clip, ...]:
    """So many clips over these pictures, in turn.

    Args:
        names: of bundled pictures.
        count: clips.
        seed: of ways and cameras.
        windows, side: of a clip.
        grids: how grids are made.
    """
    made = []
    for number in range(count):
        rng = np.random.default_rng([seed, number, windows, side])
        frames = flight_over(names[number % len(names)], rng, windows, side)
        made.append(seen_by_camera(frames, rng, grids))
    return tuple(made)


def spreads(clips: Sequence[Clip]) -> tuple[float, float]:
    """Standard deviations of a frame less the one before, and of frames."""
    frames = torch.stack([clip.frames for clip in clips]).double()
    return float(frames.diff(dim=1).std()), float(frames.std())

"""Voxel grids of events (Zhu et al., 2019; E2VID), and windows of a recording."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from provenn.core.errors import UserError
from provenn.papers.temporal_residual_diffusion.simulator import Events

BINS = 5
AT_ONCE = 2_000_000  # events; what is held beside the grid does not grow with a recording


def events_to_voxel(
    events: Events, bins: int = BINS, window: tuple[float | int, float | int] | None = None
) -> Float32[np.ndarray, "bins rows columns"]:
    """V(b, y, x) = Σ p · max(0, 1 − |b − t*|) with t* = (B − 1)(t − t₀)/(t₁ − t₀).

    Args:
        events: of a window.
        bins: B.
        window: t₀ and t₁; by default the times of the first and of the last event, as E2VID has it. With a window of
            its own the grids of parts of it add up to the grid of the whole.

    Raises:
        UserError: no bins, a window that has no length, or events outside it.
    """
    if bins < 1:
        raise UserError(f"a grid has at least one bin, got {bins}")
    rows, columns = events.size
    grid = np.zeros(bins * rows * columns)
    if len(events.t) == 0:
        return grid.reshape(bins, rows, columns).astype(np.float32)
    start, end = (float(events.t[0]), float(events.t[-1])) if window is None else window
    if window is not None and not end > start:
        raise UserError(f"a window ends after it begins, got {start:g} to {end:g} s")
    if events.t[0] < start or events.t[-1] > end:
        raise UserError(f"events from {events.t[0]:g} to {events.t[-1]:g} s lie outside {start:g} to {end:g} s")
    for low in range(0, len(events.t), AT_ONCE):
        part = slice(low, low + AT_ONCE)
        place = (bins - 1) * (events.t[part] - start) / ((end - start) or 1.0)
        under = np.minimum(np.floor(place), bins - 1).astype(np.int64)
        over = place - under
        pixel = events.y[part].astype(np.int64) * columns + events.x[part]
        sign = events.p[part].astype(np.float64)
        grid += np.bincount(under * rows * columns + pixel, sign * (1 - over), len(grid))
        next_one = np.minimum(under + 1, bins - 1)
        grid += np.bincount(next_one * rows * columns + pixel, np.where(under < bins - 1, sign * over, 0), len(grid))
    return grid.reshape(bins, rows, columns).astype(np.float32)


def normalised(voxel: Float32[np.ndarray, "bins rows columns"]) -> Float32[np.ndarray, "bins rows columns"]:
    """Cells that are not zero, less their mean, over their standard deviation (E2VID; E2VID+ leaves grids as they are).

    What is zero stays so. Cells that are all alike become zero.
    """
    there = voxel != 0
    if not there.any():
        return voxel
    values = voxel[there].astype(np.float64)
    spread = values.std()
    made = np.zeros_like(voxel)
    made[there] = (values - values.mean()) / (spread if spread > 0 else 1.0)
    return made


class Grids(NamedTuple):
    """How the grid of a window is made.

    Args:
        bounds: whether times are counted from the window's bounds; else from its first and last event, as E2VID does.
        normalise: whether cells that are not zero get mean 0 and standard deviation 1, as E2VID does.
    """

    bounds: bool = True
    normalise: bool = False

    def of(self, start: float | int, end: float | int, events: Events) -> Float32[np.ndarray, "bins rows columns"]:
        """The grid of the events from `start` to `end`; of a window without length it has no bounds."""
        voxel = events_to_voxel(events, BINS, (start, end) if self.bounds and end > start else None)
        return normalised(voxel) if self.normalise else voxel


def windows(
    events: Events, *, duration: float | int | None = None, count: int | None = None, stamps: np.ndarray | None = None
) -> Iterator[tuple[float, float, Events]]:
    """Parts of a recording: of a duration in seconds, of so many events, or between time stamps of frames.

    Raises:
        UserError: none or several of the three are given, or one is not above zero.
    """
    if sum(each is not None for each in (duration, count, stamps)) != 1:
        raise UserError("windows are of a duration, of a count, or between stamps: give one of the three")
    if stamps is not None:
        for start, end in pairwise(stamps.tolist()):
            yield float(start), float(end), events.between(float(start), float(end))
        return
    if len(events.t) == 0:
        return
    if duration is not None:
        if not duration > 0:
            raise UserError(f"a window lasts longer than nothing, got {duration:g} s")
        first, last = float(events.t[0]), float(events.t[-1])
        # One row of edges: a window ends where the next one begins, to the last digit.
        edges = first + duration * np.arange(int((last - first) // duration) + 3)
        edges = edges[: int(np.searchsorted(edges, last, side="right")) + 1]
        for start, end in pairwise(edges.tolist()):
            yield start, end, events.between(start, end)
        return
    if count is None or count < 1:
        raise UserError(f"a window has at least one event, got {count}")
    for low in range(0, len(events.t), count):
        part = _chosen(events, slice(low, low + count))
        yield float(part.t[0]), float(part.t[-1]), part


def without_hot_pixels(events: Events, times: float | int = 20.0) -> tuple[Events, int]:
    """Events without those of pixels that give more than `times` the mean of the pixels that give any; how many pixels.

    Args:
        events: of a recording.
        times: how many times the mean.
    """
    rows, columns = events.size
    pixel = events.y.astype(np.int64) * columns + events.x
    counts = np.bincount(pixel, minlength=rows * columns)
    active = counts > 0
    if not active.any():
        return events, 0
    hot = counts > times * counts[active].mean()
    kept = ~hot[pixel]
    return _chosen(events, kept), int(hot.sum())


def _chosen(events: Events, rows: slice | np.ndarray) -> Events:
    return Events(events.x[rows], events.y[rows], events.t[rows], events.p[rows], events.size)

"""Windows of a recording as a user says them, and its first frame."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import read_text
from provenn.data.images import read_pixels
from provenn.papers.temporal_residual_diffusion.simulator import Events
from provenn.papers.temporal_residual_diffusion.voxels import windows

MOST = 200_000  # windows of a recording


def parts_of(events: Events, window: str) -> Iterator[tuple[float, float, Events]]:
    """The windows of a recording: start and end in seconds, and the events between.

    Args:
        events: the recording.
        window: "33ms", "0.05s", "20000us"; so many events, "15000"; as many for each pixel, "0.35/pixel"; or a file of
            time stamps in seconds, one a line.

    Raises:
        UserError: none of these, stamps between which there is no event, or more windows than anybody looks at.
    """
    text = window.strip()
    if len(events.t) == 0:
        raise UserError("the recording holds no events")
    if match := re.fullmatch(r"([0-9.]+)\s*(us|ms|s)", text):
        span = _positive(match[1], window) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]
        many = (events.t[-1] - events.t[0]) / span
        if many > MOST:
            raise UserError(
                f"{window} makes {many:,.0f} windows of {events.t[-1] - events.t[0]:,.1f} s; is the unit of the times "
                "right (--events unit=us)?"
            )
        yield from windows(events, duration=span)
    elif match := re.fullmatch(r"([0-9.]+)(/pixel)?", text):
        value = _positive(match[1], window) * (events.size[0] * events.size[1] if match[2] else 1)
        yield from windows(events, count=max(1, round(value)))
    elif Path(text).is_file():
        stamps = _stamps(Path(text))
        inside = len(events.between(*stamps[[0, -1]].tolist()).t)
        if not inside:
            raise UserError(
                f"{text} has stamps from {stamps[0]:g} to {stamps[-1]:g} s, and no event lies between: events are from "
                f"{events.t[0]:g} to {events.t[-1]:g} s"
            )
        if inside < len(events.t):
            progress.say(f"{len(events.t) - inside:,} of {len(events.t):,} events lie outside the stamps of {text}")
        yield from windows(events, stamps=stamps)
    else:
        raise UserError(f"window is such as 33ms, 15000 (events), 0.35/pixel, or a file of time stamps; got {window!r}")


def _positive(text: str, window: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UserError(f"a window is larger than nothing, got {window!r}")
    return value


def _stamps(file: Path) -> np.ndarray:
    words = [line.replace(",", " ").split() for line in read_text(file).splitlines() if line.strip()]
    words = [line for line in words if line[-1] != "seconds"]  # the head of our own timestamps.csv
    try:
        stamps = np.array([float(line[-1] if line[0].endswith(".png") else line[0]) for line in words])
    except ValueError as error:
        raise UserError(f"{file}: a line is no time stamp: {error}") from None
    if len(stamps) < 2 or not np.isfinite(stamps).all() or not (np.diff(stamps) > 0).all():
        raise UserError(f"{file} holds {len(stamps)} time stamps; expected two or more, each later than the last")
    return stamps


def known_first(file: Path, size: tuple[int, int]) -> Float[Tensor, "1 1 rows columns"]:
    """A first frame from a picture.

    Raises:
        UserError: it cannot be read, or is of another size than the sensor.
    """
    frame = read_pixels(file, 1)
    if tuple(frame.shape[1:]) != size:
        raise UserError(
            f"{file} has {frame.shape[2]}×{frame.shape[1]} pixels, the sensor {size[1]}×{size[0]}: they must be equal"
        )
    return torch.from_numpy(frame.numpy().astype(np.float32) / 255)[None]

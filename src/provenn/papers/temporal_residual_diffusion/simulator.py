"""Events of a video as an event camera gives them: ESIM (Rebecq et al., 2018), and v2e's noise (Hu et al., 2021)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from provenn.core.errors import UserError

EPSILON = 1e-3  # added to an intensity before its logarithm
LINEAR = 20 / 255  # below this intensity v2e's logarithm is a straight line
ROUNDING = 1e-9  # of a level: what is as near to a threshold has reached it


class Events(NamedTuple):
    """Events in order of time.

    Args:
        x, y: columns and rows.
        t: seconds.
        p: polarities, −1 and 1.
        size: rows and columns of the sensor.
    """

    x: Int[np.ndarray, " events"]
    y: Int[np.ndarray, " events"]
    t: Float[np.ndarray, " events"]
    p: Int[np.ndarray, " events"]
    size: tuple[int, int]

    def between(self, start: float | int, end: float | int) -> "Events":
        """Those from `start` to before `end`."""
        low, high = np.searchsorted(self.t, [start, end])
        return Events(self.x[low:high], self.y[low:high], self.t[low:high], self.p[low:high], self.size)


class Sensor(NamedTuple):
    """What a pixel is like. The defaults are an ideal one, ESIM's; v2e's are named.

    Args:
        positive, negative: thresholds C₊ and C₋ of log intensity.
        mismatch: standard deviation of a pixel's thresholds (v2e 0.03).
        refractory: seconds after an event in which a pixel gives none (v2e 0.0005).
        cutoff: Hz of the low-pass of a bright pixel, less in the dark; 0 for none (v2e 300).
        leak: events of positive polarity a second and pixel that come of nothing (v2e 0.01).
        shot: events a second and pixel that come of noise, of either polarity, more in the dark (v2e 0.001).
        linear: whether the logarithm is a line below 20 of 255 (v2e).
        epsilon: added to an intensity before its logarithm; without `linear` alone.
    """

    positive: float | int = 0.2
    negative: float | int = 0.2
    mismatch: float | int = 0.0
    refractory: float | int = 0.0
    cutoff: float | int = 0.0
    leak: float | int = 0.0
    shot: float | int = 0.0
    linear: bool = False
    epsilon: float | int = EPSILON


V2E = Sensor(mismatch=0.03, refractory=0.0005, cutoff=300.0, leak=0.01, shot=0.001, linear=True)


def log_intensity(frame: Float[np.ndarray, "rows columns"], sensor: Sensor) -> Float[np.ndarray, "rows columns"]:
    """log(I + ε); of a linear sensor the logarithm of 255 I, and below 20 the line from 0 that meets it."""
    if not sensor.linear:
        return np.log(frame + sensor.epsilon)
    counts = 255 * frame
    line = counts * np.log(255 * LINEAR) / (255 * LINEAR)
    return np.where(frame > LINEAR, np.log(np.maximum(counts, 1.0)), line)


class Simulator:
    """A camera that is shown one frame after another, between which log intensity is linear in time.

    Each pixel keeps a level L_ref. Whenever log intensity has moved from it by C₊ up or by C₋ down, the pixel gives an
    event, and L_ref moves there. An event within the refractory time of the pixel's last one is lost, and L_ref moves
    all the same.

    Args:
        frame: the first one, intensities in 0…1.
        time: of it, in seconds.
        sensor: what its pixels are like.
        seed: of thresholds and noise.

    Raises:
        UserError: thresholds that are not above zero, another negative number, or a frame that is no grey image in
            0…1. Without ε it is above 0.
    """

    def __init__(
        self,
        frame: Float[np.ndarray, "rows columns"],
        time: float | int = 0.0,
        sensor: Sensor = Sensor(),  # noqa: B008  # a tuple
        seed: int = 0,
    ):
        if not (0 < sensor.positive < np.inf and 0 < sensor.negative < np.inf):
            raise UserError(f"thresholds lie above 0, got {sensor.positive:g} and {sensor.negative:g}")
        rest = ("mismatch", "refractory", "cutoff", "leak", "shot", "epsilon")
        if wrong := [name for name in rest if not 0 <= getattr(sensor, name) < np.inf]:
            raise UserError(f"{wrong[0]} of a sensor is 0 or more, got {getattr(sensor, wrong[0]):g}")
        if not np.isfinite(time):
            raise UserError(f"the first frame has a time in seconds, got {time}")
        self.sensor, self.rng, self.time = sensor, np.random.default_rng(seed), time
        self.size = frame.shape
        drawn = [
            c + sensor.mismatch * self.rng.standard_normal(frame.shape) for c in (sensor.positive, sensor.negative)
        ]
        self.positive, self.negative = (np.maximum(c, 0.01).ravel() if sensor.mismatch else c.ravel() for c in drawn)
        self.level = log_intensity(_checked(frame, frame.shape, sensor), sensor).ravel()
        self.reference = self.level.copy()
        self.last = np.full(self.level.shape, -np.inf)

    def step(self, frame: Float[np.ndarray, "rows columns"], time: float | int) -> Events:
        """The events until the next frame, sorted by time.

        Raises:
            UserError: a frame of another size, or a time that is not later.
        """
        if not self.time < time < np.inf:
            raise UserError(f"frames come one after another: {time:g} s is not after {self.time:g} s")
        before, span = self.level, time - self.time
        now = self._seen(_checked(frame, self.size, self.sensor), span)
        sensor = self.sensor
        fallen = sensor.leak * span * self.positive  # of L_ref in this time: as if log intensity rose as far
        rise, fall = now + fallen - self.reference, self.reference - now - fallen
        up = np.floor(np.maximum(rise, 0) / self.positive + ROUNDING).astype(np.int64)
        down = np.floor(np.maximum(fall, 0) / self.negative + ROUNDING).astype(np.int64)
        count = up + down  # one of the two is zero
        pixel = np.repeat(np.arange(len(count)), count)
        number = np.arange(len(pixel)) - np.repeat(np.cumsum(count) - count, count) + 1
        signed = np.where(up > 0, self.positive, -self.negative)
        level = self.reference[pixel] + number * signed[pixel]
        slope = now + fallen - before
        share = np.divide(level - before[pixel], slope[pixel], out=np.ones(len(pixel)), where=slope[pixel] != 0)
        times = self.time + span * share.clip(0, 1)
        self.reference += count * signed - fallen
        kept = self._after_refractory(pixel, number, times, count)
        pixel, times = pixel[kept], times[kept]
        polarity = np.where(up[pixel] > 0, 1, -1).astype(np.int8)
        if sensor.shot:
            pixel, times, polarity = self._with_noise(frame, span, pixel, times, polarity)
        order = np.argsort(times, kind="stable")
        pixel, times, polarity = pixel[order], times[order], polarity[order]
        self.level, self.time = now, time
        rows, columns = np.divmod(pixel, self.size[1])
        return Events(columns.astype(np.int32), rows.astype(np.int32), times, polarity, self.size)

    def _seen(self, frame: np.ndarray, span: float) -> np.ndarray:
        """Log intensity behind the low-pass, of first order, the slower the darker the pixel."""
        told = log_intensity(frame, self.sensor).ravel()
        if not self.sensor.cutoff:
            return told
        light = (255 * frame.ravel() + 20) / 275  # v2e's: a black pixel has a time constant too
        share = 1 - np.exp(-2 * np.pi * self.sensor.cutoff * light * span)
        return self.level + share * (told - self.level)

    def _after_refractory(
        self, pixel: np.ndarray, number: np.ndarray, times: np.ndarray, count: np.ndarray
    ) -> np.ndarray:
        """Which events are kept: within a step those of a pixel are evenly spaced, so every so manieth is."""
        least = self.sensor.refractory
        if not least or not len(pixel):
            np.maximum.at(self.last, pixel, times)
            return np.ones(len(pixel), bool)
        free = times - self.last[pixel] >= least
        first = np.full(len(count), np.iinfo(np.int64).max)
        np.minimum.at(first, pixel[free], number[free])
        start = np.cumsum(count) - count
        several = count > 1
        spacing = np.full(len(count), np.inf)
        spacing[several] = times[start[several] + 1] - times[start[several]]
        every = np.maximum(1, np.ceil(least / np.maximum(spacing, 1e-12) - ROUNDING))
        since = number - first[pixel]
        kept = (since >= 0) & (since % every[pixel] == 0)
        np.maximum.at(self.last, pixel[kept], times[kept])
        return kept

    def _with_noise(
        self, frame: np.ndarray, span: float, pixel: np.ndarray, times: np.ndarray, polarity: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean = self.sensor.shot * span * (1 - 0.75 * frame.ravel())
        noise = self.rng.poisson(mean)
        at = np.repeat(np.arange(len(noise)), noise)
        moment = self.time + span * self.rng.random(len(at))
        sign = self.rng.choice(np.array([-1, 1], np.int8), len(at))
        return np.concatenate([pixel, at]), np.concatenate([times, moment]), np.concatenate([polarity, sign])


def simulate_events(
    frames: Sequence[Float[np.ndarray, "rows columns"]] | Float[np.ndarray, "frames rows columns"],
    times: Sequence[float | int] | Float[np.ndarray, " frames"],
    sensor: Sensor = Sensor(),  # noqa: B008  # a tuple
    seed: int = 0,
) -> Events:
    """The events of a whole video.

    Args:
        frames: intensities in 0…1.
        times: of each, in seconds.
        sensor: what the pixels are like.
        seed: of thresholds and noise.

    Raises:
        UserError: fewer than two frames, as many times, or what `Simulator` refuses.
    """
    if len(frames) != len(times) or len(frames) < 2:
        raise UserError(f"a video has two frames or more, each with its time; got {len(frames)} and {len(times)}")
    camera = Simulator(frames[0], float(times[0]), sensor, seed)
    return joined([camera.step(frame, float(time)) for frame, time in zip(frames[1:], times[1:], strict=True)])


def joined(parts: Sequence[Events]) -> Events:
    """Events one after another.

    Raises:
        UserError: of sensors of different sizes.
    """
    sizes = {part.size for part in parts}
    if len(sizes) != 1:
        raise UserError(f"events of one sensor are joined, got the sizes {sorted(sizes)}")
    columns = [np.concatenate([part[i] for part in parts]) for i in range(4)]
    return Events(columns[0], columns[1], columns[2], columns[3], parts[0].size)


def integrated(
    frame: Float[np.ndarray, "rows columns"],
    events: Events,
    sensor: Sensor = Sensor(),  # noqa: B008  # a tuple
) -> Float[np.ndarray, "rows columns"]:
    """The frame after events, by what they say: (I + ε) exp(C₊N₊ − C₋N₋) − ε, in 0…1."""
    size = events.size[0] * events.size[1]
    place = events.y.astype(np.int64) * events.size[1] + events.x
    change = np.bincount(place, np.where(events.p > 0, sensor.positive, -sensor.negative), size).reshape(events.size)
    return ((frame + sensor.epsilon) * np.exp(change) - sensor.epsilon).clip(0, 1)


def _checked(frame: Shaped[np.ndarray, "..."], size: tuple[int, ...], sensor: Sensor) -> np.ndarray:
    if frame.ndim != 2 or not frame.size or frame.shape != tuple(size):
        raise UserError(f"frames are grey images of one size; got {frame.shape} after {tuple(size)}")
    if not np.isfinite(frame).all() or frame.min() < 0 or frame.max() > 1:
        raise UserError(f"intensities lie in 0…1, got {frame.min():g} to {frame.max():g}")
    if frame.min() == 0 and sensor.epsilon == 0 and not sensor.linear:
        raise UserError("black has no logarithm without an epsilon: give the sensor one above 0")
    return frame.astype(np.float64)

"""Against plain definitions: the simulator event by event, grids bin by bin, windows, sampling as diffusers has it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from provenn.core.errors import UserError
from provenn.papers.temporal_residual_diffusion.diffusion import Schedule
from provenn.papers.temporal_residual_diffusion.simulator import (
    V2E,
    Events,
    Sensor,
    Simulator,
    log_intensity,
    simulate_events,
)
from provenn.papers.temporal_residual_diffusion.voxels import events_to_voxel, normalised, windows


def one_by_one(frames, times, sensor):
    """The events of each pixel by themselves, one after another; L_ref falls with time by the leak."""
    made = []
    for row, column in np.ndindex(frames[0].shape):
        logs = [log_intensity(frame, sensor)[row, column] for frame in frames]
        reference, last = logs[0], -np.inf
        for start, end, before, now in zip(times, times[1:], logs, logs[1:]):
            fallen = sensor.leak * sensor.positive * (end - start)
            now += fallen
            sign = 1 if now >= before else -1
            threshold = sensor.positive if sign > 0 else sensor.negative
            while sign * (now - reference) >= threshold * (1 - 1e-9):
                reference += sign * threshold
                share = (reference - before) / (now - before)
                time = start + (end - start) * min(max(share, 0.0), 1.0)
                if time - last >= sensor.refractory:
                    made.append((column, row, time, sign))
                    last = time
            reference -= fallen
    return made


@pytest.mark.parametrize(
    "sensor",
    [
        Sensor(0.05, 0.13),
        Sensor(0.3, 0.11, linear=True),
        Sensor(0.1, 0.1, refractory=0.03),
        Sensor(0.04, 0.07, refractory=0.004),
        Sensor(0.2, 0.1, leak=2.0),
        Sensor(0.15, 0.3, leak=0.5, refractory=0.01, linear=True),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_events_are_those_of_each_pixel_by_itself(sensor, seed):
    rng = np.random.default_rng(seed)
    frames = rng.uniform(0, 1, (6, 3, 4))
    frames[3] = frames[2]  # nothing moves but what leaks
    frames[:, 0, 0] = np.round(4 * frames[:, 0, 0]) / 4
    times = np.cumsum(rng.uniform(0.01, 0.2, 6))
    events = simulate_events(frames, times, sensor)
    assert (np.diff(events.t) >= 0).all() and times[0] <= events.t[0] and events.t[-1] <= times[-1]
    told = sorted(zip(events.x.tolist(), events.y.tolist(), events.t.tolist(), events.p.tolist(), strict=True))
    expected = sorted(one_by_one(list(frames), times, sensor))
    assert len(told) == len(expected) > 20
    assert np.allclose(told, expected, atol=1e-9)


def test_v2es_low_pass_has_its_time_constant_and_its_defaults():
    assert V2E._replace(positive=0, negative=0) == Sensor(0, 0, 0.03, 0.0005, 300.0, 0.01, 0.001, True, 1e-3)
    frame, span = np.array([[0.0, 0.5, 1.0]]), 1e-4
    camera = Simulator(frame, 0.0, Sensor(cutoff=300.0))
    before = camera.level.copy()
    camera.step(frame[:, ::-1], span)
    step = np.log(frame[0, ::-1] + 1e-3) - before
    share = 1 - np.exp(-2 * np.pi * 300 * (255 * frame[0, ::-1] + 20) / 275 * span)
    assert np.allclose(camera.level - before, share * step)


@pytest.mark.parametrize(
    ("sensor", "frame", "said"),
    [
        (Sensor(float("nan")), 0.5, "thresholds lie above 0"),
        (Sensor(0.2, -0.1), 0.5, "thresholds lie above 0"),
        (Sensor(refractory=-1e-3), 0.5, "refractory of a sensor is 0 or more"),
        (Sensor(leak=float("nan")), 0.5, "leak of a sensor is 0 or more"),
        (Sensor(epsilon=0.0), 0.0, "black has no logarithm"),
        (Sensor(), 255.0, "got 255 to 255"),
    ],
)
def test_cameras_that_are_none_are_refused(sensor, frame, said):
    with pytest.raises(UserError, match=said):
        Simulator(np.full((2, 2), frame), 0.0, sensor)


def events_at(times, size=(2, 3)):
    count = len(times)
    rng = np.random.default_rng(count)
    return Events(
        rng.integers(size[1], size=count).astype(np.int32),
        rng.integers(size[0], size=count).astype(np.int32),
        np.asarray(times, float),
        rng.choice(np.array([-1, 1], np.int8), count),
        size,
    )


@pytest.mark.parametrize("window", [None, (0.0, 2.0), (0.25, 1.75)])
@pytest.mark.parametrize("bins", [1, 2, 5])
@pytest.mark.parametrize("times", [[0.25], [1.0] * 7, [0.25, 0.25, 1.75, 1.75], np.linspace(0.25, 1.75, 13)])
def test_a_grid_is_its_definition_at_its_edges_too(times, bins, window):
    events = events_at(times)
    start, end = window or (events.t[0], events.t[-1])
    expected = np.zeros((bins, *events.size))
    for x, y, t, p in zip(*events[:4], strict=True):
        at = (bins - 1) * (t - start) / ((end - start) or 1.0)
        for number in range(bins):
            expected[number, y, x] += p * max(0.0, 1 - abs(number - at))
    grid = events_to_voxel(events, bins, window)
    assert np.allclose(grid, expected, atol=1e-6) and grid.dtype == np.float32
    assert np.isfinite(normalised(grid)).all()
    sums = np.zeros(events.size)
    np.add.at(sums, (events.y, events.x), events.p)
    assert np.allclose(grid.sum(0), sums, atol=1e-6)


def test_events_beside_the_window_are_refused():
    for window in ((0.5, 2.0), (0.0, 1.0)):
        with pytest.raises(UserError, match="lie outside"):
            events_to_voxel(events_at([0.25, 1.75]), 5, window)
    with pytest.raises(UserError, match="ends after it begins"):
        events_to_voxel(events_at([0.25]), 5, (0.25, 0.25))


@pytest.mark.parametrize("duration", [0.033, 0.01, 0.1, 1 / 30, 1e-3])
@pytest.mark.parametrize("start", [0.0, 0.7, 1234.567])
def test_windows_lose_and_double_nothing_that_falls_on_their_edges(duration, start):
    times = np.sort(np.concatenate([start + duration * np.arange(300), start + np.cumsum(np.full(300, duration))]))
    events = events_at(times)
    parts = list(windows(events, duration=duration))
    assert np.array_equal(np.concatenate([part.t for *_, part in parts]), events.t)
    assert all(before[1] == after[0] for before, after in pairwise(parts))
    for begin, end, part in parts:
        assert math.isclose(end - begin, duration, rel_tol=1e-6) and len(part.t)
        events_to_voxel(part, 5, (begin, end))


# What DDIM of diffusers 0.42 gives (spacing "linspace", no added noise, x̂₀ cut to 1.5 and ε̂ computed anew).
DDIM = {
    ("linear", "noise", 2): [-1.428718, -0.372456, 0.683806, 1.5],
    ("linear", "noise", 5): [-0.716518, -0.235871, 0.244775, 0.721172],
    ("linear", "v", 2): [0.198532, 0.030579, -0.527713, -0.695906],
    ("linear", "v", 5): [-0.785122, -0.231622, 0.061974, 0.560731],
    ("cosine", "noise", 2): [-1.5, -1.494665, 1.494665, 1.5],
    ("cosine", "noise", 5): [-1.062312, -0.520494, 0.521828, 1.063646],
    ("cosine", "v", 2): [0.218608, 0.037202, -0.535225, -0.716801],
    ("cosine", "v", 5): [-1.039967, -0.350351, 0.068213, 0.676764],
}


@pytest.mark.parametrize(("kind", "predicts", "count"), DDIM)
def test_sampling_is_that_of_diffusers(kind, predicts, count):
    def said(x, k):
        return 0.995 * x - 1e-6 * k.item() if predicts == "noise" else 0.5 * torch.tanh(x) + k.item() / 4000

    noise = torch.linspace(-2, 2, 4, dtype=torch.float64).view(1, 1, 2, 2)
    told = Schedule(kind, predicts).sample(said, noise, count, bound=1.5)
    # Their schedule has single precision; of the cosine's last step that leaves five digits.
    expected = torch.tensor(DDIM[kind, predicts, count], dtype=torch.float64)
    assert torch.allclose(told.flatten(), expected, atol=1e-4 if kind == "cosine" else 5e-6)


def test_one_step_is_what_the_noisiest_says_and_full_noise_makes_the_posterior():
    schedule = Schedule("linear", "noise")
    noise, error = torch.randn(2, 1, 1, 3, 3, dtype=torch.float64).unbind()
    told = schedule.sample(lambda x, k: error, noise, 1)
    bar = schedule.values[999]
    assert torch.allclose(told, (noise - (1 - bar) ** 0.5 * error) / bar**0.5)
    # Two steps with eta 1: from x_999 to x_0, whose variance is β̃ of that jump.
    many = torch.zeros(20_000, 1, 1, 1, dtype=torch.float64)
    seen = []

    def note(x, k):
        seen.append(x)
        return torch.zeros_like(x)

    schedule.sample(note, many, 2, eta=1.0, generator=torch.Generator().manual_seed(0))
    now, then = schedule.values[999], schedule.values[0]
    expected = (1 - now / then) * (1 - then) / (1 - now)
    assert seen[1].var().item() == pytest.approx(expected, rel=0.05)


def test_the_schedule_keeps_its_precision_in_half():
    schedule = Schedule().to(torch.bfloat16)
    assert schedule.values == Schedule().values and not list(schedule.buffers())
    bar = torch.tensor(schedule.values[500])
    signal, spread = schedule.at(torch.tensor([500]), torch.zeros(1))
    assert signal.item() == pytest.approx(bar.sqrt().item()) and spread.item() == pytest.approx((1 - bar).sqrt().item())

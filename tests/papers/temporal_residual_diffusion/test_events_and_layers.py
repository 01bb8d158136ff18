"""Exact properties: the simulator, voxel grids, E2VID, convolutional LSTMs, and the diffusion formulas."""

import numpy as np
import pytest
import torch

from provenn.core.errors import UserError
from provenn.nn.diffusion import Posterior
from provenn.papers.temporal_residual_diffusion.diffusion import Schedule
from provenn.papers.temporal_residual_diffusion.layers import E2VID, ConvLSTM
from provenn.papers.temporal_residual_diffusion.simulator import (
    V2E,
    Events,
    Sensor,
    Simulator,
    integrated,
    joined,
    log_intensity,
    simulate_events,
)
from provenn.papers.temporal_residual_diffusion.voxels import (
    events_to_voxel,
    normalised,
    windows,
    without_hot_pixels,
)


def video(frames=12, side=9, seed=0):
    rng = np.random.default_rng(seed)
    steps = rng.uniform(-0.2, 0.2, (frames, side, side)).cumsum(0) + 0.5
    return steps.clip(0, 1), np.arange(frames) / 30


def counts(events, sign):
    chosen = events.p == sign
    return np.bincount(
        events.y[chosen].astype(int) * events.size[1] + events.x[chosen], minlength=events.size[0] * events.size[1]
    ).reshape(events.size)


# The simulator


def test_events_say_how_far_log_intensity_has_moved_within_a_threshold():
    frames, times = video()
    sensor = Sensor(0.3, 0.17)
    camera, parts = Simulator(frames[0], 0.0, sensor), []
    start = log_intensity(frames[0], sensor)
    for frame, time in zip(frames[1:], times[1:], strict=True):
        parts.append(camera.step(frame, time))
        told = joined(parts)
        change = sensor.positive * counts(told, 1) - sensor.negative * counts(told, -1)
        assert (np.abs(log_intensity(frame, sensor) - start - change) < 0.3 + 1e-6).all()
    assert (np.diff(told.t) >= 0).all() and told.t[0] >= 0 and told.t[-1] <= times[-1]


def test_a_ramp_gives_evenly_spaced_events_and_time_reversed_the_other_sign():
    low, high = np.full((3, 3), 0.1), np.full((3, 3), 0.8)
    change = np.log(0.8 + 1e-3) - np.log(0.1 + 1e-3)
    up, down = simulate_events([low, high], [0, 1.0]), simulate_events([high, low], [0, 1.0])
    expected = int(change // 0.2)
    assert len(up.t) == len(down.t) == 9 * expected and (up.p == 1).all() and (down.p == -1).all()
    times = up.t[(up.x == 1) & (up.y == 1)]
    assert np.allclose(times, 0.2 * np.arange(1, expected + 1) / change)
    half = simulate_events([low, high], [0, 1.0], Sensor(0.1, 0.1))
    assert len(half.t) in (9 * 2 * expected, 9 * (2 * expected + 1))


def test_what_does_not_change_gives_nothing_and_brightness_does_not_matter():
    frames, times = video()
    assert len(simulate_events([frames[0]] * 4, times[:4]).t) == 0
    plain = Sensor(epsilon=0.0)
    bright = (0.2 + 0.7 * frames).clip(0.05, 1)
    one, two = simulate_events(bright, times, plain), simulate_events(bright / 2, times, plain)
    assert len(one.t) == len(two.t) and np.array_equal(one.x, two.x) and np.allclose(one.t, two.t)


def test_a_refractory_pixel_loses_events_and_its_level_moves_all_the_same():
    low, high = np.full((1, 1), 0.1), np.full((1, 1), 0.8)
    free = simulate_events([low, high, low], [0, 1.0, 2.0])
    tired = simulate_events([low, high, low], [0, 1.0, 2.0], Sensor(refractory=0.25))
    last, kept = -np.inf, []
    for time in free.t:
        if time - last >= 0.25 - 1e-9:
            kept.append(time)
            last = time
    assert np.allclose(tired.t, kept) and 1 < len(kept) < len(free.t)


def test_noise_is_there_when_it_is_asked_for():
    dark = np.full((40, 40), 0.3)
    leaking = simulate_events([dark] * 41, np.arange(41.0), Sensor(leak=0.1))
    assert (leaking.p == 1).all() and len(leaking.t) == 40 * 40 * 4
    shots = simulate_events([dark] * 11, np.arange(11.0), Sensor(shot=0.5), seed=1)
    expected = 0.5 * (1 - 0.75 * 0.3) * 10 * 1600
    assert abs(len(shots.t) - expected) < 6 * expected**0.5 and abs(shots.p.mean()) < 0.1
    again = simulate_events([dark] * 11, np.arange(11.0), Sensor(shot=0.5), seed=1)
    assert np.array_equal(shots.t, again.t)


def test_pixels_differ_dark_ones_lag_and_the_logarithm_is_a_line_near_black():
    low, high = np.full((30, 30), 0.1), np.full((30, 30), 0.8)
    even, uneven = (simulate_events([low, high], [0, 1.0], Sensor(mismatch=m)) for m in (0, 0.03))
    assert len(set(counts(even, 1).ravel())) == 1 < len(set(counts(uneven, 1).ravel()))
    behind = simulate_events([low, high], [0, 0.001], Sensor(cutoff=30.0))
    assert 0 < len(behind.t) < len(even.t)
    slow, quick = Simulator(low, 0, Sensor(cutoff=30.0)), Simulator(low * 5, 0, Sensor(cutoff=30.0))
    shares = []
    for camera, frame in ((slow, low), (quick, low * 5)):
        before = camera.level[0]
        camera.step(frame * 1.5, 0.001)
        shares.append((camera.level[0] - before) / np.log(1.5))
    assert shares[0] < shares[1] < 1
    line = log_intensity(np.array([[0.0, 10 / 255, 20 / 255, 40 / 255]]), V2E)[0]
    assert line[0] == 0 and line[1] == pytest.approx(line[2] / 2) and line[2] == pytest.approx(np.log(20))
    assert line[3] == pytest.approx(np.log(40))


def test_integration_gives_the_video_back_within_a_threshold():
    frames, times = video()
    sensor = Sensor(0.1, 0.1)
    told = integrated(frames[0], simulate_events(frames, times, sensor), sensor)
    off = np.abs(np.log(told + 1e-3) - np.log(frames[-1] + 1e-3))
    assert (off < 0.1 + 1e-6).all()


@pytest.mark.parametrize(
    ("frames", "times", "said"),
    [
        ([np.zeros((2, 2))], [0.0], "two frames or more"),
        ([np.zeros((2, 2))] * 2, [0.0, 0.0], "is not after"),
        ([np.zeros((2, 2)), np.zeros((3, 2))], [0.0, 1.0], "of one size"),
        ([np.zeros((2, 2)), np.full((2, 2), 2.0)], [0.0, 1.0], r"lie in 0…1"),
        ([np.zeros((2, 2)), np.full((2, 2), np.nan)], [0.0, 1.0], r"lie in 0…1"),
    ],
)
def test_videos_that_are_none_are_refused(frames, times, said):
    with pytest.raises(UserError, match=said):
        simulate_events(frames, times)


# Voxel grids


def drawn(count=500, seed=0):
    rng = np.random.default_rng(seed)
    t = np.sort(rng.uniform(0, 2, count))
    return Events(rng.integers(7, size=count), rng.integers(5, size=count), t, rng.choice([-1, 1], count), (5, 7))


def test_a_grid_is_its_definition_and_its_bins_sum_to_the_polarities():
    events = drawn()
    expected = np.zeros((5, 5, 7))
    for x, y, t, p in zip(*events[:4], strict=True):
        at = 4 * (t - events.t[0]) / (events.t[-1] - events.t[0])
        for b in range(5):
            expected[b, y, x] += p * max(0, 1 - abs(b - at))
    grid = events_to_voxel(events)
    assert np.allclose(grid, expected, atol=1e-5)
    assert np.allclose(grid.sum(0), counts(events, 1) - counts(events, -1), atol=1e-5)


def test_parts_of_a_window_add_up_and_an_empty_one_is_zero(monkeypatch):
    from provenn.papers.temporal_residual_diffusion import voxels

    events = drawn()
    whole = events_to_voxel(events, window=(0, 2))
    parts = sum(events_to_voxel(events.between(a, b), window=(0, 2)) for a, b in ((0, 0.7), (0.7, 1.1), (1.1, 2.1)))
    assert np.allclose(whole, parts, atol=1e-5)
    monkeypatch.setattr(voxels, "AT_ONCE", 37)
    assert np.allclose(events_to_voxel(events, window=(0, 2)), whole, atol=1e-5)
    empty = events.between(5, 6)
    assert not events_to_voxel(empty).any() and not normalised(events_to_voxel(empty)).any()
    one = events.between(events.t[3], events.t[4])
    assert len(one.t) == 1 and np.isfinite(normalised(events_to_voxel(one))).all()


def test_a_normalised_grid_has_mean_zero_and_deviation_one_where_it_was_not_zero():
    grid = events_to_voxel(drawn(60))
    made = normalised(grid)
    assert made[grid != 0].mean() == pytest.approx(0, abs=1e-5) and made[grid != 0].std() == pytest.approx(1, abs=1e-5)
    assert not made[grid == 0].any() and (grid == 0).any()


def test_windows_hold_every_event_once():
    events = drawn()
    for given in ({"duration": 0.3}, {"count": 60}):
        parts = list(windows(events, **given))
        assert np.array_equal(np.concatenate([part.t for *_, part in parts]), events.t)
    stamps = np.array([0.0, 0.5, 1.5])
    assert [len(part.t) for *_, part in windows(events, stamps=stamps)] == [
        ((events.t >= a) & (events.t < b)).sum() for a, b in ((0, 0.5), (0.5, 1.5))
    ]
    with pytest.raises(UserError, match="give one of the three"):
        next(windows(events, count=3, duration=1.0))


def test_a_hot_pixel_goes_and_no_other():
    events = drawn(2000)
    hot = Events(*(np.concatenate([e, np.full(3000, v)]) for e, v in zip(events[:4], (3, 2, 1.0, 1))), size=events.size)
    cleaned, count = without_hot_pixels(hot)
    assert count == 1 and not ((cleaned.x == 3) & (cleaned.y == 2)).any()
    assert len(cleaned.t) == (~((events.x == 3) & (events.y == 2))).sum()


# Networks


def test_e2vid_has_the_published_parameters_and_states():
    with torch.device("meta"):
        plain, normed = E2VID(), E2VID(norm="batch")
        told, states = plain(torch.zeros(2, 5, 192, 240))
    assert sum(p.numel() for p in plain.parameters()) == 10_710_401
    assert sum(p.numel() for p in normed.parameters()) == 10_712_098
    assert told.shape == (2, 1, 192, 240)
    assert [tuple(h.shape[1:]) for h, _ in states] == [(64, 96, 120), (128, 48, 60), (256, 24, 30)]


@pytest.mark.parametrize("upsampling", ["bilinear", "transposed"])
def test_frames_of_any_size_stay_and_a_batch_keeps_its_videos_apart(upsampling):
    torch.manual_seed(0)
    network = E2VID(base=4, upsampling=upsampling).double().eval()
    x = torch.randn(3, 2, 5, 13, 18).double()
    states, alone = None, [None, None]
    for voxel in x:
        told, states = network(voxel, states)
        assert told.shape == (2, 1, 13, 18)
        for i in range(2):
            one, alone[i] = network(voxel[i : i + 1], alone[i])
            assert torch.allclose(one[0], told[i])


def test_a_convolutional_lstm_of_zeros_says_nothing_and_parts_are_the_whole():
    layer = ConvLSTM(3, 4).double()
    x = torch.randn(5, 2, 3, 6, 6).double()
    state = None
    for step in x:
        whole, state = layer(step, state)
    _, half = layer(x[1], layer(x[0])[1])
    for step in x[2:]:
        told, half = layer(step, half)
    assert torch.equal(told, whole)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    assert not layer(x[0])[0].any()


# Diffusion


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("predicts", ["noise", "v"])
def test_sampling_with_the_truth_gives_the_image_back(kind, predicts):
    schedule = Schedule(kind, predicts)
    clean, noise = torch.randn(2, 2, 1, 4, 4).double().unbind()
    k = torch.tensor([999, 999])
    for count in (1, 2, 7, 50, 1000):
        start = schedule.noisy(clean, k, noise)
        told = schedule.sample(lambda x, k: schedule.target(clean, k, true_noise(schedule, x, clean, k)), start, count)
        assert torch.allclose(told, clean, atol=1e-6)
    assert (torch.tensor(schedule.values).diff() < 0).all() and 0 < schedule.values[-1] < schedule.values[0] < 1


def true_noise(schedule, x, clean, k):
    signal, spread = schedule.at(k, x)
    return (x - signal * clean) / spread


def test_the_marginal_is_that_of_the_chain_and_the_posterior_is_bayes():
    schedule = Schedule()
    signal, variance = 1.0, 0.0
    for k in range(1000):
        before = schedule.values[k - 1] if k else 1.0
        alpha = schedule.values[k] / before
        signal, variance = signal * alpha**0.5, alpha * variance + 1 - alpha
        assert signal == pytest.approx(schedule.values[k] ** 0.5)
        assert variance == pytest.approx(1 - schedule.values[k])
    x, clean = torch.full((1, 1, 1, 1), 0.7).double(), torch.full((1, 1, 1, 1), -0.2).double()
    posterior, at = Posterior(torch.tensor(schedule.values, dtype=torch.float64), x), torch.tensor([9])
    mean, spread = posterior.mean(clean, x, at), posterior.least[9].exp().item()
    before, now = schedule.values[8], schedule.values[9]
    alpha = now / before
    precision = 1 / (1 - before) + alpha / (1 - alpha)
    expected = (before**0.5 * -0.2 / (1 - before) + alpha**0.5 * 0.7 / (1 - alpha)) / precision
    assert mean.item() == pytest.approx(expected) and spread == pytest.approx(1 / precision)


def test_what_is_cut_changes_the_noise_too():
    schedule = Schedule()
    x, said, k = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2), torch.tensor([5, 999])
    clean, error = schedule.told(x, k, said, 0.1)
    signal, spread = schedule.at(k, x)
    assert clean.abs().max() <= 0.1 and torch.allclose(signal * clean + spread * error, x, atol=1e-5)

"""The system: conditions start at nothing, residuals telescope, and a video does not depend on how it is cut."""

import numpy as np
import pytest
import torch

from provenn.core.errors import UserError
from provenn.papers.temporal_residual_diffusion.denoiser import Design, EventAttention, _squares, _whole
from provenn.papers.temporal_residual_diffusion.layers import E2VID
from provenn.papers.temporal_residual_diffusion.model import Regression, Stream, TemporalResidualDiffusion, frame_noise
from provenn.papers.temporal_residual_diffusion.simulator import simulate_events
from provenn.papers.temporal_residual_diffusion.voxels import events_to_voxel, windows


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(conditions=("low", "time", "high"), target="temporal", **options):
    design = Design(width=8, levels=4, temporal=4, events=8, steps=3)
    return TemporalResidualDiffusion(Regression(E2VID(base=4, levels=2)), design, conditions, target, **options)


def moved(network):
    """Weights that start at zero have left it."""
    for parameter in network.denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def clip(batch=2, count=4, side=16):
    return torch.randn(batch, count, 5, side, side), torch.rand(batch, count + 1, 1, side, side)


def test_conditions_start_at_nothing_and_then_learn():
    network = small()
    x, k = torch.randn(2, 1, 16, 16), torch.tensor([3, 900])
    joined, voxel = torch.randn(2, 7, 16, 16), torch.randn(2, 5, 16, 16)
    maps, _ = network.time(voxel)
    with_all = network.denoiser(x, k, joined, maps, voxel)
    assert torch.equal(with_all, network.denoiser(x, k, joined, [], None))
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    network.training_loss(clip()).backward()
    optimizer.step()
    optimizer.zero_grad()
    network.training_loss(clip()).backward()
    for part in (network.time, network.denoiser.of_time, network.denoiser.high, network.denoiser.to_events):
        assert all(p.grad is not None and p.grad.any() for name, p in part.named_parameters() if "bias" not in name)


def test_the_low_frequency_module_is_frozen_and_stays_so():
    network = small().train()
    before = {name: tensor.clone() for name, tensor in network.low.state_dict().items()}
    network.training_loss(clip()).backward()
    assert not network.low.training and all(p.grad is None for p in network.low.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.low.state_dict().items())


@pytest.mark.parametrize("target", ["temporal", "lf_residual", "frame"])
def test_the_true_residuals_give_the_video(target):
    network = small(target=target, scale=0.07)
    frames, estimates = torch.rand(5, 2, 1, 8, 8), torch.rand(5, 2, 1, 8, 8)
    told = frames[0]
    for frame, estimate in zip(frames[1:], estimates[1:], strict=True):
        told = network.framed(network.clean(frame, told, estimate), told, estimate)
        assert torch.allclose(told, frame, atol=1e-6)


def test_a_video_does_not_depend_on_what_comes_later_on_parts_or_on_the_batch():
    network = moved(small()).double()
    voxels, frames = (part.double() for part in clip(2, 4))
    grids = list(voxels.unbind(1))
    whole = list(network.frames(grids, frames[:, 0], seeds=(5, 9)))
    changed = [*grids[:2], grids[2] + 1, grids[3]]
    later = list(network.frames(changed, frames[:, 0], seeds=(5, 9)))
    assert torch.equal(whole[1], later[1]) and not torch.equal(whole[2], later[2])
    memory, cut = network.begin(frames[:, 0]), []
    for number, voxel in enumerate(grids):
        frame, memory = network.step(voxel, memory, frame_noise(frames[:, 0], number, (5, 9)))
        cut.append(frame)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    alone = list(network.frames([grid[1:] for grid in grids], frames[1:, 0], seeds=(9,)))
    assert all(torch.allclose(a[1:], b, atol=1e-8) for a, b in zip(whole, alone, strict=True))
    other = list(network.frames(grids, frames[:, 0], seeds=(6, 9)))
    assert not torch.allclose(whole[0], other[0])
    assert all(frame.min() >= 0 and frame.max() <= 1 for frame in whole)


def test_a_stream_gives_the_same_video_and_begins_anew():
    network = moved(small())
    voxels, frames = clip(1, 3)
    grids = list(voxels.unbind(1))
    whole = list(network.frames(grids, frames[:, 0], seeds=(4,)))
    stream = Stream(network, seed=4)
    for _ in range(2):
        stream.reset(frames[:, 0])
        assert all(torch.equal(a, stream.step(grid)) for a, grid in zip(whole, grids, strict=True))
    stream.reset()
    assert not torch.equal(stream.step(grids[0]), whole[0])


def test_a_recording_is_rebuilt_at_a_rate_as_its_windows_are():
    frames = np.linspace(0.1, 0.9, 13)[:, None, None] * np.ones((13, 16, 16))
    events = simulate_events(frames, np.arange(13) / 60)
    network = moved(small())
    first = torch.full((1, 1, 16, 16), 0.1)
    stream, again = Stream(network), Stream(network)
    stream.reset(first)
    again.reset(first)
    told = list(stream.reconstruct(events, fps=20.0))
    parts = list(windows(events, duration=0.05))
    assert len(told) == len(parts) >= 3
    for frame, (start, end, part) in zip(told, parts, strict=True):
        grid = torch.from_numpy(events_to_voxel(part, 5, (start, end)))[None]
        assert torch.equal(again.step(grid), frame)
    with pytest.raises(UserError, match="fps is above 0"):
        next(stream.reconstruct(events, fps=0.0))


def test_each_frame_goes_on_from_the_last_one_with_noise_of_its_own():
    network = moved(small())
    voxels, frames = clip(1, 2)
    frame, memory = network.step(voxels[:, 0], network.begin(frames[:, 0]), frame_noise(frames[:, 0], 0, (3,)))
    assert torch.equal(memory.frame, frame) and not torch.equal(frame, frames[:, 0])
    drawn = [frame_noise(frames[:, 0], number, (seed,)) for seed in (3, 4) for number in (0, 1)]
    assert len({noise.numpy().tobytes() for noise in drawn}) == 4
    assert torch.equal(frame_noise(torch.zeros(2, 1, 16, 16), 1, (3, 4)), torch.cat([drawn[1], drawn[3]]))


def test_a_regression_learns_the_frame_after_its_window(monkeypatch):
    from provenn.papers.temporal_residual_diffusion import model as of_model

    asked = []

    def noted(frame, truth, loss):
        asked.append(truth)
        return (frame - truth).square().mean()

    monkeypatch.setattr(of_model, "frame_loss", noted)
    voxels, frames = clip(2, 3)
    Regression(E2VID(6, 4, 2), closed=True).training_loss([voxels, frames])
    assert len(asked) == 3 and all(map(torch.equal, asked, frames[:, 1:].unbind(1)))


def test_each_condition_reaches_the_frame_and_can_be_left_out():
    voxels, frames = clip(1, 2)
    grids = list(voxels.unbind(1))
    for left_out in ("low", "time", "high"):
        rest = [name for name in ("low", "time", "high") if name != left_out]
        assert len(list(moved(small(rest)).frames(grids, frames[:, 0]))) == 2
    network = moved(small())
    usual = list(network.frames(grids, frames[:, 0]))
    network.conditions = ("time", "high")
    assert not torch.equal(next(iter(network.frames(grids, frames[:, 0]))), usual[0])
    network.conditions = ("low", "time", "high")
    network.denoiser.high[0].out.weight.data.zero_()
    network.denoiser.high[1].out.weight.data.zero_()
    assert not torch.equal(next(iter(network.frames(grids, frames[:, 0]))), usual[0])


def test_frames_of_any_size_and_no_events_are_taken():
    network = moved(small())
    frame = torch.rand(1, 1, 13, 21)
    told = list(network.frames([torch.zeros(1, 5, 13, 21)] * 2, frame))
    assert told[1].shape == (1, 1, 13, 21) and told[1].isfinite().all()


def test_squares_come_back_and_what_is_filled_up_is_not_attended_to():
    x = torch.randn(2, 6, 16, 24)
    assert torch.equal(_whole(_squares(x, 3), 2, 16, 24), x)
    layer = EventAttention(8, 4)
    torch.nn.init.normal_(layer.out.weight)
    x, events = torch.randn(1, 8, 8, 8), torch.randn(1, 4, 8, 8)
    inner = layer(x[..., :5], events[..., :5])
    far = torch.cat([x[..., :5], torch.zeros(1, 8, 8, 3)], -1)
    assert (
        inner.shape == (1, 8, 8, 5)
        and inner.isfinite().all()
        and not torch.allclose(layer(far, events)[..., :5], inner)
    )


def test_an_anchor_draws_to_the_low_frequency_estimate():
    network = small(anchor=1.0)
    voxels, frames = clip(1, 1)
    estimate, joined, _, memory = network.conditioned(voxels[:, 0], network.begin(frames[:, 0]))
    assert torch.equal(memory.frame, estimate) and torch.equal(joined[:, 1:2], estimate)


def test_other_targets_and_conditions_are_refused():
    with pytest.raises(UserError, match="conditions are low, time, high"):
        small(("low", "middle"))
    with pytest.raises(UserError, match="targets temporal, lf_residual, frame"):
        small(target="flow")

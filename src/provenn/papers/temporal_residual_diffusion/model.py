"""Temporal residual guided diffusion (Zhu et al., 2024, arXiv:2407.10636): events to video, a frame after the other.

Only the abstract could be read. What it names is here: a pre-trained module of low frequency, a recurrent temporal
encoder, attention to events of high frequency, and the temporal residual as the target. Their sizes are inferred.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.temporal_residual_diffusion.denoiser import Denoiser, Design, TemporalEncoder
from provenn.papers.temporal_residual_diffusion.diffusion import Schedule
from provenn.papers.temporal_residual_diffusion.layers import E2VID, FireNet
from provenn.papers.temporal_residual_diffusion.losses import LOSSES, frame_loss
from provenn.papers.temporal_residual_diffusion.simulator import Events
from provenn.papers.temporal_residual_diffusion.start import take_low
from provenn.papers.temporal_residual_diffusion.voxels import Grids, windows

TARGETS = ("temporal", "lf_residual", "frame")
CONDITIONS = ("low", "time", "high")
OWN = 0.3  # how often training is given the network's own last frame
Frames = Float[Tensor, "batch 1 height width"]
Voxels = Float[Tensor, "batch bins height width"]


class Memory(NamedTuple):
    """What is carried from frame to frame.

    Args:
        frame: the last one.
        states: of the recurrent layers; None before the first window.
    """

    frame: Tensor
    states: Any = None


class Reconstructor(nn.Module):
    """What turns windows of events into frames, one after another; of several videos, each by itself."""

    def begin(self, first: Frames) -> Memory:
        """What is carried after a first frame."""
        return Memory(first)

    def opening(self, voxel: Voxels) -> Memory:
        """What is carried before the first window, where no frame is known: one that is grey."""
        return self.begin(torch.full_like(voxel[:, :1], 0.5))

    def step(self, voxel: Voxels, memory: Memory, noise: Frames | None = None) -> tuple[Frames, Memory]:
        """The next frame, and what is carried on.

        Args:
            voxel: of the events since the last frame.
            memory: of the last one.
            noise: what a sampler begins from; others need none.
        """
        raise NotImplementedError

    def frames(self, voxels: Sequence[Tensor], first: Frames, seeds: Sequence[int] = (0,)) -> Iterator[Frames]:
        """Videos, a frame for each grid; the same seed gives the same video, whatever others are in its batch.

        Args:
            voxels: grids (batch, bins, H, W), one after another.
            first: the frame before the first grid.
            seeds: of the noise of each video of the batch.
        """
        memory = self.begin(first)
        for number, voxel in enumerate(voxels):
            with torch.no_grad():
                frame, memory = self.step(voxel, memory, frame_noise(first, number, seeds))
            yield frame

    def rebuilt(
        self, clips: Sequence[Tensor], seeds: Sequence[int] = (0,)
    ) -> Float[Tensor, "batch windows 1 rows cols"]:
        """The frames of clips, each from its true first one on.

        Args:
            clips: voxel grids (batch, windows, bins, H, W), frames (batch, windows + 1, 1, H, W), and counts of events.
            seeds: as of `frames`.
        """
        return torch.stack(list(self.frames(list(clips[0].unbind(1)), clips[1][:, 0], seeds)), 1)

    def training_loss(self, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """The mean square error of `rebuilt`, where a subclass does not say; without gradients.

        Args:
            batch: voxel grids, frames and counts of clips.
        """
        return F.mse_loss(self.rebuilt(batch, range(len(batch[0]))), batch[1][:, 1:])


class Stream:
    """A video that goes on window by window: the same frames as `Reconstructor.frames` gives at once.

    Args:
        network: what turns events into frames.
        seed: of the noise.
    """

    def __init__(self, network: Reconstructor, seed: int = 0):
        self.network, self.seed = network.eval(), seed
        self.reset()

    def reset(self, first: Frames | None = None) -> None:
        """Begin anew, after a frame that is known, or after none."""
        self.memory = None if first is None else self.network.begin(first)
        self.number = 0

    @torch.no_grad()
    def step(self, voxel: Voxels) -> Frames:
        """The frame after the events of a window."""
        if self.memory is None:
            self.memory = self.network.opening(voxel)
        noise = frame_noise(voxel[:, :1], self.number, (self.seed,))
        frame, self.memory = self.network.step(voxel, self.memory, noise)
        self.number += 1
        return frame

    def reconstruct(self, events: Events, fps: float = 30.0, grids: Grids = Grids()) -> Iterator[Frames]:  # noqa: B008  # a tuple
        """The frames after each window of a recording, which lasts 1/fps; they go on from what was seen before.

        Args:
            events: of a camera.
            fps: frames a second.
            grids: how voxel grids are made, as in training.

        Raises:
            UserError: fps that is not above zero.
        """
        if not fps > 0:
            raise UserError(f"fps is above 0, got {fps:g}")
        like = next(self.network.parameters())
        for start, end, part in windows(events, duration=1 / fps):
            yield self.step(torch.from_numpy(grids.of(start, end, part))[None].to(like))


class Regression(Reconstructor):
    """A recurrent network that says the frame itself: E2VID or FireNet, the low-frequency module.

    Args:
        network: takes grids and states.
        closed: its last frame is a further channel of its input, at first a frame that is known (ours, for short
            clips). Without it the network begins with nothing, as published.
        loss: "l1", or "structure", L1 + 0.2 (1 − SSIM) + L1 of differences of neighbours, for the published LPIPS.

    Raises:
        UserError: another loss.
    """

    def __init__(self, network: E2VID | FireNet, *, closed: bool = False, loss: str = "l1"):
        super().__init__()
        if loss not in LOSSES:
            raise UserError(f"loss is one of {', '.join(LOSSES)}, got {loss!r}")
        self.network, self.closed, self.loss = network, closed, loss

    def step(self, voxel: Voxels, memory: Memory, noise: Frames | None = None) -> tuple[Frames, Memory]:
        given = torch.cat([voxel, memory.frame], 1) if self.closed else voxel
        frame, states = self.network(given, memory.states)
        return frame, Memory(frame, states)

    def forward(self, voxel: Voxels) -> Frames:
        """The frame after one window, before which all was grey."""
        return self.step(voxel, self.opening(voxel))[0]

    def training_loss(self, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """The mean loss over the windows of clips, the network's own frames before each.

        Args:
            batch: voxel grids (batch, windows, bins, H, W) and frames (batch, windows + 1, 1, H, W).
        """
        voxels, frames = batch[0], batch[1]
        memory, losses = self.begin(frames[:, 0]), []
        for number in range(voxels.shape[1]):
            frame, memory = self.step(voxels[:, number], memory)
            losses.append(frame_loss(frame, frames[:, number + 1], self.loss))
        return torch.stack(losses).mean()


class TemporalResidualDiffusion(Reconstructor):
    """Î_t = clip(Î_{t−1} + s · x̂₀), where x₀ = (I_t − I_{t−1})/s is sampled under three conditions.

    Args:
        low: the pre-trained low-frequency module; it is frozen and stays in eval mode.
        design: sizes and sampling.
        conditions: some of "low" (its estimate joins the input), "time" (the temporal encoder) and "high" (attention to
            events). The previous frame and the voxel grid join the input always. "still" and "joined" are "time"
            without memory and "high" without attention, of equal size (ours, to compare).
        target: "temporal" (default), "lf_residual" (I_t − Î^LF_t) or "frame" (I_t − ½).
        anchor: λ, by which the previous frame is drawn to the low-frequency estimate; 0 leaves it.
        scale: s, the standard deviation of the target in training; kept with the weights.
        start: weights of `low` that a training begins with: a file, the folder of a run, or the name of a preset that
            ships. None for those that `low` has.

    Raises:
        UserError: another target or condition.
    """

    scale: Tensor

    def __init__(
        self,
        low: Regression,
        design: Design = Design(),  # noqa: B008  # a tuple
        conditions: Sequence[str] = CONDITIONS,
        target: str = "temporal",
        *,
        anchor: float | int = 0.0,
        scale: float | int = 0.1,
        start: str | None = None,
    ):
        super().__init__()
        unknown = [name for name in conditions if name not in (*CONDITIONS, "still", "joined")]
        if unknown or target not in TARGETS:
            raise UserError(
                f"conditions are {', '.join(CONDITIONS)}, targets {', '.join(TARGETS)}; "
                f"got {', '.join(conditions) or 'none'} and {target}"
            )
        if not 0 <= anchor <= 1 or not scale > 0:
            raise UserError(f"anchor lies in 0…1 and scale above 0, got {anchor:g} and {scale:g}")
        self.low = low.eval().requires_grad_(False)
        self.design, self.conditions, self.target = design, tuple(conditions), target
        self.steps, self.anchor, self.start = design.steps, float(anchor), start
        with_time = "time" in conditions or "still" in conditions
        self.time = TemporalEncoder(design.bins, design.temporal, design.levels - 1) if with_time else None
        high = "attention" if "high" in conditions else "joined" if "joined" in conditions else ""
        self.denoiser = Denoiser(2 + design.bins, design, time=with_time, high=high)
        self.schedule = Schedule(design.schedule, design.predicts)  # type: ignore[arg-type]  # which it checks
        self.register_buffer("scale", torch.tensor(float(scale)))

    def train(self, mode: bool = True) -> "TemporalResidualDiffusion":
        """As of any module; the low-frequency module stays in eval mode."""
        super().train(mode)
        self.low.eval()
        return self

    def optimizers(self, recipe: Any) -> torch.optim.Optimizer:
        """That of a `provenn.training.Recipe`; the weights of `start` are taken into the low-frequency module first."""
        if self.start is not None:
            take_low(self.low, self.start)
        return recipe.make_optimizer(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """As of every module; what is loaded takes the place of `start`."""
        told = super().load_state_dict(state_dict, *args, **options)
        self.start = None
        return told

    def opening(self, voxel: Voxels) -> Memory:
        """Where no frame is known: the low-frequency estimate of the first window, or grey where that needs one too."""
        grey = torch.full_like(voxel[:, :1], 0.5)
        if self.low.closed:
            return self.begin(grey)
        with torch.no_grad():
            return self.begin(self.low.step(voxel, Memory(grey))[0])

    def conditioned(self, voxel: Voxels, memory: Memory) -> tuple[Tensor, Tensor, list[Tensor], Memory]:
        """The low-frequency estimate, what joins the input, maps of the temporal encoder, and what is carried on."""
        of_low, of_time = memory.states or (Memory(memory.frame), None)
        with torch.no_grad():
            estimate, of_low = self.low.step(voxel, of_low)
        shown = estimate if "low" in self.conditions else torch.zeros_like(estimate)
        maps: list[Tensor] = []
        if self.time is not None:
            maps, of_time = self.time(voxel, None if "still" in self.conditions else of_time)
        previous = memory.frame
        if self.anchor:
            previous = (1 - self.anchor) * previous + self.anchor * estimate
        joined = torch.cat([shown, previous, voxel.clamp(-8, 8) / 2], 1)
        return estimate, joined, maps, Memory(previous, (of_low, of_time))

    def _base(self, previous: Frames, estimate: Frames) -> Frames:
        if self.target == "frame":
            return torch.full_like(previous, 0.5)
        return previous if self.target == "temporal" else estimate

    def clean(self, frame: Frames, previous: Frames, estimate: Frames) -> Frames:
        """x₀ of a frame: the target over its scale."""
        return (frame - self._base(previous, estimate)) / self.scale

    def framed(self, clean: Frames, previous: Frames, estimate: Frames) -> Frames:
        """The frame of x₀, in 0…1."""
        return (self._base(previous, estimate) + self.scale * clean).clamp(0, 1)

    def bound(self) -> Float[Tensor, ""]:
        """Of x₀: a frame differs by no more than one."""
        return 1 / self.scale

    def forward(self, noisy: Frames, k: Int[Tensor, " batch"], voxel: Voxels, previous: Frames) -> Frames:
        """What the denoiser says of x_k, after a frame that is known and nothing else.

        Args:
            noisy: x_k.
            k: the step of each, from 0.
            voxel: of the events since the frame.
            previous: that frame.
        """
        _, joined, maps, _ = self.conditioned(voxel, self.begin(previous))
        return self.denoiser(noisy, k, joined, maps, voxel)

    def sampled(self, noise: Frames, joined: Tensor, maps: list[Tensor], voxel: Voxels) -> Frames:
        """x̂₀ from noise, in `steps` steps."""
        return self.schedule.sample(
            lambda x, k: self.denoiser(x, k, joined, maps, voxel), noise, self.steps, bound=self.bound()
        )

    def loss_of(self, clean: Frames, joined: Tensor, maps: list[Tensor], voxel: Voxels) -> tuple[Tensor, Frames]:
        """The mean square error of what is predicted at a random step, and x̂₀ of it."""
        k, noise = torch.randint(self.schedule.steps, (len(clean),), device=clean.device), torch.randn_like(clean)
        noisy = self.schedule.noisy(clean, k, noise)
        said = self.denoiser(noisy, k, joined, maps, voxel)
        guessed, _ = self.schedule.told(noisy, k, said.detach(), self.bound())
        return F.mse_loss(said, self.schedule.target(clean, k, noise)), guessed

    @torch.no_grad()
    def step(self, voxel: Voxels, memory: Memory, noise: Frames | None = None) -> tuple[Frames, Memory]:
        """The next frame.

        Args:
            voxel: of the events since the last frame.
            memory: as `begin` or a step before gave it.
            noise: what sampling begins from, of the frame's shape.
        """
        noise = torch.zeros_like(memory.frame) if noise is None else noise
        size, pad = voxel.shape[-2:], self.design.padding(voxel)
        whole = memory
        if any(pad):
            voxel, noise = F.pad(voxel, pad), F.pad(noise, pad)
            whole = Memory(F.pad(memory.frame, pad, mode="replicate"), memory.states)
        estimate, joined, maps, told = self.conditioned(voxel, whole)
        clean = self.sampled(noise, joined, maps, voxel)
        frame = self.framed(clean, told.frame, estimate)[..., : size[0], : size[1]]
        return frame, Memory(frame, told.states)

    def training_loss(self, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """The mean square error of what is predicted, over the windows of clips.

        The previous frame is the true one, and three times in ten the network's own estimate of it (inferred): what
        x̂₀ of the last window was.

        Args:
            batch: voxel grids (batch, windows, bins, H, W) and frames (batch, windows + 1, 1, H, W).
        """
        voxels, frames = batch[0], batch[1]
        memory, losses = self.begin(frames[:, 0]), []
        for number in range(voxels.shape[1]):
            voxel, frame = voxels[:, number], frames[:, number + 1]
            estimate, joined, maps, told = self.conditioned(voxel, memory)
            loss, guessed = self.loss_of(self.clean(frame, told.frame, estimate), joined, maps, voxel)
            losses.append(loss)
            own = self.framed(guessed.detach(), told.frame, estimate)
            chosen = torch.rand(len(voxel), 1, 1, 1, device=voxel.device) < OWN
            memory = Memory(torch.where(chosen, own, frame), told.states)
        return torch.stack(losses).mean()


class ResidualRegression(TemporalResidualDiffusion):
    """The same network under the same conditions, which says x₀ at once: no noise, one step (ours, to compare)."""

    def sampled(self, noise: Frames, joined: Tensor, maps: list[Tensor], voxel: Voxels) -> Frames:
        last = torch.full((noise.shape[0],), self.schedule.steps - 1, device=noise.device)
        told = self.denoiser(torch.zeros_like(noise), last, joined, maps, voxel)
        return told.clamp(-self.bound(), self.bound())

    def loss_of(self, clean: Frames, joined: Tensor, maps: list[Tensor], voxel: Voxels) -> tuple[Tensor, Frames]:
        last = torch.full((len(clean),), self.schedule.steps - 1, device=clean.device)
        told = self.denoiser(torch.zeros_like(clean), last, joined, maps, voxel)
        return F.mse_loss(told, clean), told.detach()


def frame_noise(like: Frames, number: int, seeds: Sequence[int]) -> Frames:
    """The noise that a frame of each video begins from: by the video's seed and the number of the frame."""
    seeds = [*seeds, *range(len(seeds), len(like))]
    made = []
    for seed in seeds[: len(like)]:
        drawn = torch.Generator().manual_seed(seed * 1_000_003 + number)
        made.append(torch.randn(like.shape[1:], generator=drawn, dtype=torch.float32))
    return torch.stack(made).to(like)

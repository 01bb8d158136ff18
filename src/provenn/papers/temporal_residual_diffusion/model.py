"""Temporal residual guided diffusion (Zhu et al., 2024, arXiv:2407.10636): events to video, a frame after the other.

Only the abstract could be read. What it names is here: a pre-trained module of low frequency, a recurrent temporal
encoder, attention to events of high frequency, and the temporal residual as the target. Their sizes are inferred.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.temporal_residual_diffusion.denoiser import Denoiser, TemporalEncoder
from provenn.papers.temporal_residual_diffusion.diffusion import Kind, Predicts, Schedule
from provenn.papers.temporal_residual_diffusion.layers import E2VID, State

TARGETS = ("temporal", "lf_residual", "frame")
CONDITIONS = ("low", "time", "high")
MULTIPLE = 8
OWN = 0.3  # how often training is given the network's own last frame
Frames = Float[Tensor, "batch 1 height width"]
Voxels = Float[Tensor, "batch bins height width"]


class Memory(NamedTuple):
    """What is carried from frame to frame.

    Args:
        frame: the last one.
        low: states of the low-frequency module.
        time: states of the temporal encoder.
    """

    frame: Tensor
    low: list[State] | None
    time: list[State] | None


class TemporalResidualDiffusion(nn.Module):
    """Î_t = clip(Î_{t−1} + s · x̂₀), where x₀ = (I_t − I_{t−1})/s is sampled under three conditions.

    Args:
        low: the pre-trained low-frequency module; it is frozen and stays in eval mode.
        conditions: some of "low" (its estimate joins the input), "time" (the temporal encoder) and "high" (attention to
            events). The previous frame and the voxel grid join the input always.
        target: "temporal" (default), "lf_residual" (I_t − Î^LF_t) or "frame".
        width: of the denoiser; 64 (inferred).
        temporal: C of the temporal encoder; 32 (inferred).
        events: channels of event features; 64 (inferred).
        bins: of the voxel grid.
        steps: of sampling; 20 (inferred).
        schedule, predicts: of the diffusion; "linear" and "noise" (inferred).
        anchor: λ, by which the previous frame is drawn to the low-frequency estimate; 0 leaves it.
        scale: s, the standard deviation of the target in training; kept with the weights.

    Raises:
        UserError: another target or condition.
    """

    scale: Tensor

    def __init__(
        self,
        low: E2VID,
        conditions: Sequence[str] = CONDITIONS,
        target: str = "temporal",
        *,
        width: int = 64,
        temporal: int = 32,
        events: int = 64,
        bins: int = 5,
        steps: int = 20,
        schedule: Kind = "linear",
        predicts: Predicts = "noise",
        anchor: float | int = 0.0,
        scale: float | int = 0.1,
    ):
        super().__init__()
        unknown = [name for name in conditions if name not in CONDITIONS]
        if unknown or target not in TARGETS:
            raise UserError(f"conditions are {', '.join(CONDITIONS)}, targets {', '.join(TARGETS)}")
        self.low = low.eval().requires_grad_(False)
        self.conditions, self.target, self.steps, self.anchor = tuple(conditions), target, steps, anchor
        self.time = TemporalEncoder(bins, temporal) if "time" in conditions else None
        self.denoiser = Denoiser(
            2 + bins,
            width,
            bins,
            temporal=temporal if "time" in conditions else 0,
            events=events if "high" in conditions else 0,
        )
        self.schedule = Schedule(1000, schedule, predicts)
        self.register_buffer("scale", torch.tensor(float(scale)))

    def train(self, mode: bool = True) -> "TemporalResidualDiffusion":
        """As of any module; the low-frequency module stays in eval mode."""
        super().train(mode)
        self.low.eval()
        return self

    def first(self, frame: Frames) -> Memory:
        """What is carried after a first frame that is known."""
        return Memory(frame, None, None)

    def conditioned(self, voxel: Voxels, memory: Memory) -> tuple[Tensor, Tensor, list[Tensor], Memory]:
        """The low-frequency estimate, what joins the input, maps of the temporal encoder, and the new states."""
        with torch.no_grad():
            estimate, low = self.low(voxel, memory.low)
        shown = estimate if "low" in self.conditions else torch.zeros_like(estimate)
        maps, time = ([], None) if self.time is None else self.time(voxel, memory.time)
        previous = memory.frame
        if self.anchor:
            previous = (1 - self.anchor) * previous + self.anchor * estimate
        joined = torch.cat([shown, previous, voxel.clamp(-8, 8) / 2], 1)
        return estimate, joined, maps, Memory(previous, low, time)

    def clean(self, frame: Frames, previous: Frames, estimate: Frames) -> Frames:
        """x₀ of a frame: the target over its scale."""
        of = {"temporal": previous, "lf_residual": estimate, "frame": torch.zeros_like(frame)}[self.target]
        return (frame - of) / self.scale

    def framed(self, clean: Frames, previous: Frames, estimate: Frames) -> Frames:
        """The frame of x₀, in 0…1."""
        of = {"temporal": previous, "lf_residual": estimate, "frame": torch.zeros_like(clean)}[self.target]
        return (of + self.scale * clean).clamp(0, 1)

    @torch.no_grad()
    def step(self, voxel: Voxels, memory: Memory, noise: Frames) -> tuple[Frames, Memory]:
        """The next frame.

        Args:
            voxel: of the events since the last frame.
            memory: as `first` or a step before gave it.
            noise: what sampling begins from, of the frame's shape.
        """
        size = voxel.shape[-2:]
        pad = (0, -size[1] % MULTIPLE, 0, -size[0] % MULTIPLE)
        whole = Memory(F.pad(memory.frame, pad, mode="replicate"), memory.low, memory.time)
        estimate, joined, maps, told = self.conditioned(F.pad(voxel, pad), whole)
        grid = F.pad(voxel, pad)
        bound = 1 / float(self.scale)
        clean = self.schedule.sample(
            lambda x, k: self.denoiser(x, k, joined, maps, grid), F.pad(noise, pad), self.steps, bound=bound
        )
        frame = self.framed(clean, told.frame, estimate)[..., : size[0], : size[1]]
        return frame, Memory(frame, told.low, told.time)

    def frames(self, voxels: Sequence[Tensor], first: Frames, seed: int = 0) -> Iterator[Frames]:
        """A video, a frame for each grid; the same seed gives the same video, however it is cut into parts.

        Args:
            voxels: grids (batch, bins, H, W), one after another.
            first: the frame before the first grid.
            seed: of the noise of each frame and of each video.
        """
        memory = self.first(first)
        for number, voxel in enumerate(voxels):
            frame, memory = self.step(voxel, memory, frame_noise(first, number, seed))
            yield frame

    def training_loss(self, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """The mean square error of what is predicted, over the windows of clips.

        The previous frame is the true one, and three times in ten the network's own estimate of it (inferred): what
        x̂₀ of the last window was.

        Args:
            batch: voxel grids (batch, windows, bins, H, W) and frames (batch, windows + 1, 1, H, W).
        """
        voxels, frames = batch[0], batch[1]
        memory, losses = self.first(frames[:, 0]), []
        for number in range(voxels.shape[1]):
            voxel = voxels[:, number]
            estimate, joined, maps, told = self.conditioned(voxel, memory)
            k = torch.randint(self.schedule.steps, (len(voxel),), device=voxel.device)
            noise = torch.randn_like(frames[:, 0])
            clean = self.clean(frames[:, number + 1], told.frame, estimate)
            noisy = self.schedule.noisy(clean, k, noise)
            said = self.denoiser(noisy, k, joined, maps, voxel)
            losses.append(F.mse_loss(said, self.schedule.target(clean, k, noise)))
            with torch.no_grad():
                guessed, _ = self.schedule.told(noisy, k, said, 1 / float(self.scale))
                own = self.framed(guessed, told.frame, estimate)
                chosen = torch.rand(len(voxel), 1, 1, 1, device=voxel.device) < OWN
                previous = torch.where(chosen, own, frames[:, number + 1])
            memory = Memory(previous, told.low, told.time)
        return torch.stack(losses).mean()


def frame_noise(like: Frames, number: int, seed: int) -> Frames:
    """The noise that a frame begins from: by the seed, the number of the frame, and the place in the batch."""
    made = []
    for place in range(len(like)):
        drawn = torch.Generator().manual_seed((seed * 1_000_003 + number) * 1009 + place)
        made.append(torch.randn(like.shape[1:], generator=drawn, dtype=torch.float32))
    return torch.stack(made).to(like)

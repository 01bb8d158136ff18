"""Frames of a recording, one after another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.papers.temporal_residual_diffusion.model import (
    Reconstructor,
    Stream,
    TemporalResidualDiffusion,
)
from provenn.papers.temporal_residual_diffusion.simulator import Events
from provenn.papers.temporal_residual_diffusion.task.faces import drawn
from provenn.papers.temporal_residual_diffusion.voxels import Grids
from provenn.tasks import device_of


def grids_of(meta: dict[str, Any]) -> Grids:
    """How grids are made, as the meta says."""
    return Grids(bool(meta["bounds"]), bool(meta["normalise"]))


def grid_of(part: tuple[float, float, Events], meta: dict[str, Any]) -> Float[Tensor, "1 bins height width"]:
    """The voxel grid of a window, as the meta says."""
    return torch.from_numpy(grids_of(meta).of(*part))[None]


@contextmanager
def sampled_in(network: Reconstructor, steps: int | None) -> Iterator[None]:
    """Inside, frames are sampled in so many steps.

    Raises:
        UserError: a network that samples nothing.
    """
    if steps is None:
        yield
        return
    system = network if isinstance(network, TemporalResidualDiffusion) else None
    if system is None:
        raise UserError("steps are of sampling, and this model says its frames at once: leave out steps=")
    before, system.steps = system.steps, steps
    try:
        yield
    finally:
        system.steps = before


def rebuilt_frames(
    network: Reconstructor, meta: dict[str, Any], parts: Sequence[Any], first: Tensor | None, seed: int, paired: bool
) -> Iterator[np.ndarray]:
    """Frames of 8 bits, one after another.

    Args:
        network: what rebuilds.
        meta: of its grids.
        parts: windows, as `parts_of` gives them.
        first: the frame before; None where it is not known.
        seed: of sampling.
        paired: whether events are drawn beside.
    """
    device = device_of(network)
    stream = Stream(network, seed)
    stream.reset(None if first is None else first.to(device))
    for part in progress.track(parts, "rebuilding"):
        voxel = grid_of(part, meta).to(device)
        frame = stream.step(voxel)
        grey = (255 * frame[0, 0].cpu().clamp(0, 1)).round().byte().numpy()
        if paired:
            yield np.concatenate([drawn(voxel[0].cpu()), np.repeat(grey[..., None], 3, 2)], 1)
        else:
            yield grey

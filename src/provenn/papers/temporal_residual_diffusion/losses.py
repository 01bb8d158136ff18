"""The loss of a frame, for networks that say frames at once."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOSSES = ("l1", "structure")
Frames = Float[Tensor, "batch 1 height width"]


def frame_loss(frame: Frames, truth: Frames, loss: str) -> Float[Tensor, ""]:
    """The loss of a frame, see `Regression`."""
    plain = (frame - truth).abs().mean()
    if loss == "l1":
        return plain
    edges = sum(((frame - truth).diff(dim=axis)).abs().mean() for axis in (-2, -1))
    return plain + 0.2 * (1 - similarity(frame, truth)) + edges


def similarity(frame: Frames, truth: Frames) -> Float[Tensor, ""]:
    """The mean of SSIM, with a window of 7×7 equal weights."""
    mean = [F.avg_pool2d(x, 7, 1) for x in (frame, truth)]
    spread = [F.avg_pool2d(x * x, 7, 1) - m * m for x, m in zip((frame, truth), mean)]
    both = F.avg_pool2d(frame * truth, 7, 1) - mean[0] * mean[1]
    light = (2 * mean[0] * mean[1] + 1e-4) / (mean[0] ** 2 + mean[1] ** 2 + 1e-4)
    return (light * (2 * both + 9e-4) / (spread[0] + spread[1] + 9e-4)).mean()

"""The systems by size, and the networks that stand inside them or beside."""

from collections.abc import Mapping
from typing import Any

from provenn.papers.temporal_residual_diffusion.denoiser import Design
from provenn.papers.temporal_residual_diffusion.layers import E2VID, FireNet
from provenn.papers.temporal_residual_diffusion.model import Regression, TemporalResidualDiffusion

SMALL = Design(width=16, levels=3, temporal=6, events=16, steps=5, schedule="cosine", predicts="v")


def _regression(network: E2VID | FireNet, closed: bool = False, loss: str = "l1") -> Regression:
    return Regression(network, closed=closed, loss=loss)


def e2vid(*, norm: str = "none", upsampling: str = "bilinear", loss: str = "structure", **data: float) -> Regression:
    """E2VID at its published size: 10,710,401 parameters; with `norm="batch"` 10,712,098.

    Args:
        norm, upsampling: as of `layers.E2VID`.
        loss: "structure", for the published LPIPS, or "l1".
        data: `motion` and `contrast`, which it does not need.
    """
    return _regression(E2VID(norm=norm, upsampling=upsampling), loss=loss)


def firenet(*, loss: str = "structure", **data: float) -> Regression:
    """FireNet at its published size: 37,777 parameters.

    Args:
        loss: as of `e2vid`.
        data: `motion` and `contrast`, which it does not need.
    """
    return _regression(FireNet(), loss=loss)


def e2vid_small(*, loss: str = "l1", **data: float) -> Regression:
    """E2VID of 12 channels and two encoders, which is told its own last frame.

    Args:
        loss: as of `e2vid`.
        data: `motion` and `contrast`, which it does not need.
    """
    return _regression(E2VID(6, 12, 2), True, loss)


def _system(low: Regression, design: Design, named: Mapping[str, Any]) -> TemporalResidualDiffusion:
    scale = named["contrast"] if named["target"] == "frame" else named["motion"]
    conditions = [name for name in named["conditions"].replace(" ", "").split(",") if name]
    return TemporalResidualDiffusion(
        low, design, conditions, named["target"], anchor=named["anchor"], scale=scale, start=named["low"]
    )


def trd_small(
    *,
    conditions: str = "low,time,high",
    target: str = "temporal",
    steps: int = 5,
    anchor: float | int = 0.0,
    low: str | None = "e2vid_small",
    motion: float | int = 0.1,
    contrast: float | int = 0.25,
) -> TemporalResidualDiffusion:
    """The system at a size that trains in minutes: 16 channels, three levels; cosine schedule, v-prediction.

    Args:
        conditions: names with commas between, as of `TemporalResidualDiffusion`.
        target, anchor: as there.
        steps: of sampling.
        low: weights of the low-frequency module that a training begins with.
        motion: standard deviation of a frame less the one before: the scale of residuals.
        contrast: standard deviation of frames, the scale of the target "frame".
    """
    return _system(e2vid_small(), SMALL._replace(steps=steps), locals())


def trd_base(
    *,
    conditions: str = "low,time,high",
    target: str = "temporal",
    steps: int = 20,
    anchor: float | int = 0.0,
    low: str | None = "",
    motion: float | int = 0.1,
    contrast: float | int = 0.25,
) -> TemporalResidualDiffusion:
    """The system at the inferred size: E2VID, a denoiser of 64 to 512 channels, 20 steps of sampling.

    Args:
        conditions, target, steps, anchor, motion, contrast: as of `trd_small`.
        low: weights of a trained `e2vid`; a training needs them.
    """
    return _system(e2vid(), Design(steps=steps), locals())

"""The systems by size, and the networks that stand inside them or beside."""

from provenn.papers.temporal_residual_diffusion.denoiser import Design
from provenn.papers.temporal_residual_diffusion.layers import E2VID, FireNet
from provenn.papers.temporal_residual_diffusion.model import Regression, TemporalResidualDiffusion

SMALL = Design(width=16, levels=3, temporal=6, events=16, steps=5, schedule="cosine", predicts="v")


def e2vid(*, norm: str = "none", upsampling: str = "bilinear", loss: str = "structure", **data: float) -> Regression:
    """E2VID at its published size: 10,710,401 parameters; with `norm="batch"` 10,712,098.

    Args:
        norm, upsampling: as of `layers.E2VID`.
        loss: "structure", for the published LPIPS, or "l1".
        data: `motion` and `contrast`, which it does not need.
    """
    return Regression(E2VID(norm=norm, upsampling=upsampling), loss=loss)


def firenet(*, loss: str = "structure", **data: float) -> Regression:
    """FireNet at its published size: 37,777 parameters.

    Args:
        loss: as of `e2vid`.
        data: `motion` and `contrast`, which it does not need.
    """
    return Regression(FireNet(), loss=loss)


def e2vid_small(*, loss: str = "l1", **data: float) -> Regression:
    """E2VID of 12 channels and two encoders, which is told its own last frame.

    Args:
        loss: as of `e2vid`.
        data: `motion` and `contrast`, which it does not need.
    """
    return Regression(E2VID(6, 12, 2), closed=True, loss=loss)


def _named(conditions: str) -> list[str]:
    return [name for name in conditions.replace(" ", "").split(",") if name]


def _scale(target: str, motion: float, contrast: float) -> float:
    return contrast if target == "frame" else motion


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
    design, scale = SMALL._replace(steps=steps), _scale(target, motion, contrast)
    return TemporalResidualDiffusion(
        e2vid_small(), design, _named(conditions), target, anchor=anchor, scale=scale, start=low
    )


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
    design, scale = Design(steps=steps), _scale(target, motion, contrast)
    return TemporalResidualDiffusion(e2vid(), design, _named(conditions), target, anchor=anchor, scale=scale, start=low)

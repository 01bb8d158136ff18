"""How near a video is to the truth: error and SSIM as EVREAL has them, and what is left above the low frequencies."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

BOX = 5
NAMES = ("mse", "ssim", "high_error", "high_correlation", "high_ratio")


def above(frames: Float[Tensor, "frames 1 rows columns"]) -> Float[Tensor, "frames 1 rows columns"]:
    """x less its mean over 5×5 pixels."""
    return frames - F.avg_pool2d(F.pad(frames, (BOX // 2,) * 4, mode="replicate"), BOX, 1)


def compared(
    told: Float[Tensor, "frames 1 rows columns"], truth: Float[Tensor, "frames 1 rows columns"]
) -> dict[str, float]:
    """Means over the frames of a video.

    `mse`, and `ssim` by scikit-image with Gaussian weights of σ = 1.5 and the population's covariance. Of x − box5(x)
    the mean square error, the correlation with the truth's, and the ratio of the root mean squares: 1 is right, and
    noise counts as detail. A frame smaller than SSIM's window has none.

    Args:
        told, truth: intensities in 0…1.
    """
    from skimage.metrics import structural_similarity

    error = (told - truth).double().square().mean((1, 2, 3)).numpy()
    fine = [above(x.double()).flatten(1).numpy() for x in (told, truth)]
    power = [np.square(x).mean(1) for x in fine]
    centred = [x - x.mean(1, keepdims=True) for x in fine]
    norms = np.sqrt(np.square(centred[0]).sum(1) * np.square(centred[1]).sum(1))
    together = (centred[0] * centred[1]).sum(1)
    correlation = np.divide(together, norms, out=np.zeros_like(together), where=norms > 0)
    ssim = [
        structural_similarity(a, b, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        if min(a.shape) >= 11
        else np.nan
        for a, b in zip(told[:, 0].double().numpy(), truth[:, 0].double().numpy())
    ]
    ratio = np.sqrt(power[0].mean() / power[1].mean()) if power[1].mean() > 0 else np.nan
    high = np.square(fine[0] - fine[1]).mean(1)
    values = (error.mean(), np.mean(ssim), high.mean(), correlation.mean(), ratio)
    return dict(zip(NAMES, map(float, values), strict=True))


def by_percentile(frames: Float[Tensor, "frames 1 rows columns"]) -> Float[Tensor, "frames 1 rows columns"]:
    """Each frame stretched from its percentiles 1 and 99 to 0…1, as EVREAL does with E2VID's."""
    # Not torch's quantile, which takes no more than 2²⁴ numbers.
    ends = np.percentile(frames.numpy(), (1, 99), axis=(1, 2, 3), keepdims=True).astype(np.float32)
    low, high = (torch.from_numpy(end) for end in ends)
    return ((frames - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def fitted_thresholds(
    frames: Float[np.ndarray, "windows1 rows columns"],
    counts: Float[np.ndarray, "windows 2 rows columns"],
    epsilon: float,
) -> Sequence[float]:
    """C₊ and C₋ by least squares of the true change of log intensity on the counts of both polarities."""
    change = np.log(frames[-1] + epsilon) - np.log(frames[0] + epsilon)
    given = counts.sum(0).reshape(2, -1).T * np.array([1.0, -1.0])
    found = np.linalg.lstsq(given, change.ravel(), rcond=None)[0]
    return [float(c) for c in found.clip(0, 1)]

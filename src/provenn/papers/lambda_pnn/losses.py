"""λ-PNN's loss, which no ground truth enters: spectral fidelity at the MS's scale, spatial fidelity at the PAN's."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.papers.lambda_pnn.indices import ergas, local_correlation, q2n
from provenn.papers.lambda_pnn.sensors import RATIO, SCALE, Sensor, downgrade, low_pass, sensor_kernels, shift

WIDE = 8  # w of the windows in which MS and PAN are compared


class Weights(NamedTuple):
    """L = α · ERGAS + β · (1 − Q2ⁿ) + γ · L_struct, at the scale of reprojection.

    Args:
        ergas: α.
        khan: β.
        spatial: γ.
        l1: of the mean absolute difference at the MS's scale, which is Z-PNN's spectral term.
        threshold: count the spatial term only where it is worse than what the low-resolution data promise.
    """

    ergas: float = 0.05
    khan: float = 1.25
    spatial: float = 3.75
    l1: float = 0.0
    threshold: bool = True


def spectral_loss(
    x: Float[Tensor, "batch bands height width"],
    ms: Float[Tensor, "batch bands height2 width2"],
    kernels: Float[Tensor, "bands side side"],
    weights: Weights,
    shifts: Int[Tensor, "batch bands 2"] | None = None,
) -> Float[Tensor, ""]:
    """The fused image, seen by the sensor, must give back the MS: α · ERGAS + β · (1 − Q2ⁿ).

    The authors' code rounds what enters Q2ⁿ since October 2023, which leaves the term without a gradient; here it is
    not rounded.

    Args:
        x, ms: in counts / 2048.
        kernels: of `sensor_kernels`.
        weights: of the terms; what has weight 0 is not computed.
        shifts: as in `downgrade`.
    """
    seen = downgrade(x, kernels, shifts)
    loss = seen.new_zeros(())
    if weights.ergas:
        loss = loss + weights.ergas * ergas(seen, ms).mean()
    if weights.khan:
        loss = loss + weights.khan * (1 - q2n(SCALE * seen, SCALE * ms, round_inputs=False).mean()).to(loss.dtype)
    if weights.l1:
        loss = loss + weights.l1 * (seen - ms).abs().mean()
    return loss


def promised(
    upsampled: Float[Tensor, "batch bands height width"],
    pan: Float[Tensor, "batch 1 height width"],
    kernels: Float[Tensor, "bands side side"],
) -> Float[Tensor, "batch bands height width"]:
    """T = 1 − ρ(LP(PAN), MS↑; w = 8): what correlation the low-resolution data promise; no gradient.

    LP is the first band's kernel, reflected at the border.
    """
    with torch.no_grad():
        return 1 - local_correlation(low_pass(pan, kernels[:1], "reflect"), upsampled, WIDE)


def spatial_loss(
    x: Float[Tensor, "batch bands height width"],
    pan: Float[Tensor, "batch 1 height width"],
    threshold: Float[Tensor, "batch bands height width"] | None,
) -> Float[Tensor, ""]:
    """Mean over all pixels of X · [X > T], X = 1 − max(ρ(y, PAN; w = 2), −1); without T, of X.

    Pixels that are left out count as 0, and the mask has no gradient.
    """
    distance = 1 - local_correlation(x, pan, RATIO // 2).clamp_min(-1)
    if threshold is not None:
        distance = distance * (distance > threshold)
    return distance.mean().to(x.dtype)


def fusion_loss(
    x: Float[Tensor, "batch bands height width"],
    ms: Float[Tensor, "batch bands height2 width2"],
    stack: Float[Tensor, "batch channels height width"],
    sensor: Sensor,
    weights: Weights | None = None,
    shifts: Int[Tensor, "batch bands 2"] | None = None,
) -> Float[Tensor, ""]:
    """The whole loss of a fused image. Any fusion network can be trained by it.

    Args:
        x: the fused image.
        ms: the multispectral image.
        stack: MS↑ and PAN, as the network is given them.
        sensor: whose gains blur.
        weights: of the terms; the paper's for WV3 by default.
        shifts: as in `downgrade`.

    >>> from provenn.papers.lambda_pnn.sensors import sensor_of, upsample
    >>> ms, pan = torch.rand(1, 3, 32, 32), torch.rand(1, 1, 128, 128)
    >>> y = upsample(ms).requires_grad_()
    >>> loss = fusion_loss(y, ms, torch.cat([y.detach(), pan], 1), sensor_of("photographs", 3))
    >>> loss.backward(); bool(y.grad.abs().sum() > 0)
    True
    """
    weights = Weights() if weights is None else weights
    kernels = sensor_kernels(sensor.gains)
    loss = spectral_loss(x, ms, kernels, weights, shifts)
    if weights.spatial:
        upsampled, pan = stack[:, :-1], stack[:, -1:]
        threshold = promised(upsampled, pan, kernels) if weights.threshold else None
        loss = loss + weights.spatial * spatial_loss(x, pan, threshold)
    return loss


def band_shifts(
    upsampled: Float[Tensor, "batch bands height width"], pan: Float[Tensor, "batch 1 height width"], sensor: Sensor
) -> Int[Tensor, "batch bands 2"]:
    """How far each band lies from the PAN, in half pixels down and to the right, from −4 to 4.

    The pair that maximises the mean of ρ (w = 8, 3 pixels of border cut) between the band and the low-passed PAN, moved
    by it. All 81 pairs of one image are one batch.

    Args:
        upsampled: MS↑.
        pan: on the same grid.
        sensor: whose PAN gain blurs.
    """
    blurred = low_pass(pan, sensor_kernels((sensor.pan_gain,), pan=True))
    steps = torch.arange(-4, 5, device=pan.device)
    pairs = torch.cartesian_prod(steps, steps)
    found = []
    for bands, low in zip(upsampled, blurred):
        moved = shift(low.expand(1, 81, -1, -1), pairs[None])[0, :, None, 3:-3, 3:-3]
        agreement = torch.stack(
            [local_correlation(moved, band[None, None, 3:-3, 3:-3], WIDE).mean(dim=(1, 2, 3)) for band in bands]
        )
        found.append(pairs[agreement.argmax(dim=1)])
    return torch.stack(found)

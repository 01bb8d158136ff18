"""Sensors: how a satellite blurs and samples each band, and the interpolation that goes back to the fine grid."""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

RATIO = 4  # PAN pixels a multispectral one, in each direction
OFFSET = 2  # multispectral pixel k lies on PAN pixel 4k + 2
SIDE = 41  # of a sensor's kernels
SCALE = 2048.0  # counts of 11 bits; images are divided by it
# One side of the 23-tap interpolator with its centre, before doubling (Aiazzi et al., 2002).
TAPS = (
    *(0.5, 0.305334091185, 0.0, -0.072698593239, 0.0, 0.021809577942, 0.0, -0.005192756653, 0.0),
    *(0.000807762146, 0.0, -0.000060081482),
)


class Sensor(NamedTuple):
    """Gains of a sensor at the Nyquist frequency of the multispectral grid.

    Args:
        gains: of each band, in (0, 1).
        pan_gain: of the panchromatic band.
        rgb: which bands are red, green and blue, for pictures and for the choice of tiles.
    """

    gains: tuple[float, ...]
    pan_gain: float
    rgb: tuple[int, int, int]


SENSORS = {
    "WV3": Sensor((0.325, 0.355, 0.360, 0.350, 0.365, 0.360, 0.335, 0.315), 0.14, (4, 2, 1)),
    "WV2": Sensor((*[0.35] * 7, 0.27), 0.11, (4, 2, 1)),
    "GE1": Sensor((0.23,) * 4, 0.16, (2, 1, 0)),
    "QB": Sensor((0.34, 0.32, 0.30, 0.22), 0.15, (2, 1, 0)),
    "IKONOS": Sensor((0.26, 0.28, 0.29, 0.28), 0.17, (2, 1, 0)),
    "photographs": Sensor((0.23,) * 3, 0.16, (2, 1, 0)),
}


def sensor_of(name: str | Sequence[float | int], bands: int) -> Sensor:
    """A sensor by its name, or one with these gains.

    Raises:
        ValueError: no such sensor, other bands, or gains outside (0, 1).
    """
    if isinstance(name, str):
        if name not in SENSORS:
            raise ValueError(f"no sensor is called {name!r}; there are {', '.join(SENSORS)}, or give a gain a band")
        sensor = SENSORS[name]
    else:
        gains = tuple(float(gain) for gain in name)
        if not all(0 < gain < 1 for gain in gains):
            raise ValueError(f"gains at the Nyquist frequency lie between 0 and 1, got {gains}")
        sensor = Sensor(gains, 0.15, (2, 1, 0) if len(gains) > 2 else (0, 0, 0))
    if len(sensor.gains) != bands:
        raise ValueError(f"the sensor {name!r} has {len(sensor.gains)} bands, the image {bands}")
    return sensor


@cache
def sensor_kernels(
    gains: tuple[float, ...], *, pan: bool = False, symmetric: bool = False
) -> Float[Tensor, "bands side side"]:
    """A low-pass kernel a band whose frequency response has the sensor's gain at Nyquist; float64.

    A Gaussian of σ = (width / 2R) / √(−2 ln g) is read as the response and transformed. A Kaiser window (β = 0.5)
    along one axis follows, as in the authors' code, so that a kernel is not quite symmetric.

    Args:
        gains: g of each band.
        pan: the panchromatic kernel, whose Gaussian is wider by 41/40, and which is neither cut at 0 nor normalised.
        symmetric: apply the window along both axes. Ours.

    >>> [round(float(k[20, 20]), 6) for k in sensor_kernels((0.325, 0.355))]
    [0.041594, 0.045138]
    """
    place = np.arange(SIDE) - (SIDE - 1) / 2
    window = np.kaiser(SIDE, 0.5)
    kernels = []
    for gain in gains:
        sigma = (SIDE if pan else SIDE - 1) / (2 * RATIO) / math.sqrt(-2 * math.log(gain))
        response = np.exp(-(place[:, None] ** 2 + place**2) / (2 * sigma**2))
        response[response < np.finfo(float).eps] = 0
        turned = np.rot90(np.fft.fftshift(np.rot90(response, 2)), 2)
        kernel = np.rot90(np.fft.fftshift(np.fft.ifft2(turned)), 2).real * window
        if symmetric:
            kernel = kernel * window[:, None]
        if not pan:
            kernel = kernel.clip(0)
            kernel = kernel / kernel.sum()
        kernels.append(kernel)
    return torch.from_numpy(np.stack(kernels))


def low_pass(
    x: Float[Tensor, "batch bands height width"], kernels: Float[Tensor, "bands side side"], mode: str = "replicate"
) -> Float[Tensor, "batch bands height width"]:
    """Each band through its kernel, at the same size.

    Args:
        x: of as many bands as there are kernels, or of one.
        kernels: of odd side.
        mode: what lies beyond the border: `replicate` or `reflect`.
    """
    reach = kernels.shape[-1] // 2
    weight = kernels.to(x)[:, None]
    return F.conv2d(F.pad(x, (reach,) * 4, mode=mode), weight, groups=x.shape[1])


def downgrade(
    x: Float[Tensor, "batch bands height width"],
    kernels: Float[Tensor, "bands side side"],
    shifts: Int[Tensor, "batch bands 2"] | None = None,
) -> Float[Tensor, "batch bands height2 width2"]:
    """The fused image as the sensor sees it: blurred, shifted by half pixels, every fourth pixel from 2 on.

    Args:
        x: on the grid of the PAN.
        kernels: of `sensor_kernels`.
        shifts: rows and columns of each band in half pixels; None shifts nothing.
    """
    blurred = low_pass(x, kernels)
    if shifts is not None and bool(shifts.any()):
        blurred = shift(blurred, shifts).to(x.dtype)
    return blurred[..., OFFSET::RATIO, OFFSET::RATIO]


def upsample(ms: Float[Tensor, "batch bands height width"]) -> Float[Tensor, "batch bands height4 width4"]:
    """The 23-tap interpolator, twice by a factor of 2, in float64 with a circular border.

    It interpolates: `upsample(ms)[..., 2::4, 2::4]` is `ms`, bit for bit.

    >>> ms = torch.rand(1, 3, 8, 8)
    >>> bool((upsample(ms)[..., 2::4, 2::4] == ms).all())
    True
    """
    half = 2 * torch.tensor(TAPS, dtype=torch.float64, device=ms.device)
    taps = torch.cat([half.flip(0)[:-1], half])
    bands, x = ms.shape[1], ms.double()
    across = taps.expand(bands, 1, 1, -1)
    for first in (1, 0):
        spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        spread[..., first::2, first::2] = x
        rows = F.conv2d(_wrapped(spread, (11, 11, 0, 0)), across, groups=bands)
        x = F.conv2d(_wrapped(rows, (0, 0, 11, 11)), across.mT, groups=bands)
    return x.to(ms.dtype)


def _wrapped(x: Tensor, pads: tuple[int, int, int, int]) -> Tensor:
    """Continued around the border, also where the border is wider than the image."""
    left, right, top, bottom = pads
    rows = torch.arange(-top, x.shape[-2] + bottom, device=x.device) % x.shape[-2]
    columns = torch.arange(-left, x.shape[-1] + right, device=x.device) % x.shape[-1]
    return x[..., rows[:, None], columns]


def shift(
    x: Float[Tensor, "batch bands height width"], shifts: Int[Tensor, "batch bands 2"]
) -> Float[Tensor, "batch bands height width"]:
    """Each band moved by half pixels down and to the right, with zeros beyond the border; float64.

    Half pixels come from the odd taps of the 23-tap interpolator.

    Args:
        x: any bands.
        shifts: rows and columns in half pixels, from −4 to 4.
    """
    batch, bands, height, width = x.shape
    moved = x.double().reshape(1, batch * bands, height, width)
    kernels = _shift_kernels(moved.device)
    for axis in (0, 1):
        # Half pixels first, then whole ones, each cut at the border, as in the authors' code.
        for part in (0, 1):
            taps = kernels[part][shifts[..., axis].flatten() + 4][:, None]
            reach = taps.shape[-1] // 2
            weight, pads = (taps[..., None], (reach, 0)) if axis == 0 else (taps[:, :, None], (0, reach))
            moved = F.conv2d(moved, weight, padding=pads, groups=batch * bands)
    return moved.reshape(batch, bands, height, width)


@cache
def _shift_kernels(device: torch.device) -> tuple[Tensor, Tensor]:
    """Taps for the half and for the whole pixels of each shift from −4 to 4."""
    half = 2 * torch.tensor(TAPS, dtype=torch.float64)
    odd = torch.cat([half.flip(0)[:-1], half])[::2]
    halves, wholes = torch.zeros(9, 13, dtype=torch.float64), torch.zeros(9, 5, dtype=torch.float64)
    for i, steps in enumerate(range(-4, 5)):
        if steps % 2:
            halves[i, :12] = odd
        else:
            halves[i, 6] = 1
        wholes[i, 2 - steps // 2] = 1
    return halves.to(device), wholes.to(device)

"""How good a codec is: PSNR, MS-SSIM, rates of the codecs that Pillow writes, and the mean difference of two curves."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, features
from torch import Tensor

SHARES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the five scales of MS-SSIM
SMALLEST = 161  # side that MS-SSIM takes: 11 pixels are left at the fifth scale
Numbers = Sequence[float | int]
Pixels = UInt8[np.ndarray, "height width 3"]
Measure = Callable[[np.ndarray, np.ndarray], float]


def psnr(image: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio of RGB in dB: 10 log₁₀(255² / mean squared error).

    >>> psnr(np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8))
    0.0
    """
    error = float(np.mean((image.astype(np.float64) - reference) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ms_ssim(
    x: Float[Tensor, "batch channels height width"], y: Float[Tensor, "batch channels height width"], top: float = 1.0
) -> Float[Tensor, " batch"]:
    """Multi-scale structural similarity (Wang et al., 2003): ∏ₛ csₛ^wₛ, and the luminance of the last scale.

    Windows are Gaussian, 11×11 with σ = 1.5, without borders; scales are means of 2×2. The mean is over the channels.

    Args:
        x, y: of one shape, both sides at least 161.
        top: the largest value.

    Raises:
        ValueError: a side is below 161.
    """
    if min(x.shape[-2:]) < SMALLEST:
        raise ValueError(f"MS-SSIM needs at least {SMALLEST} pixels a side, got {x.shape[-2]}×{x.shape[-1]}")
    channels = x.shape[1]
    gauss = torch.exp(-((torch.arange(11, device=x.device, dtype=x.dtype) - 5) ** 2) / (2 * 1.5**2))
    gauss = (gauss / gauss.sum()).expand(channels, 1, -1)

    def mean(t: Tensor) -> Tensor:
        t = F.conv2d(t, gauss[:, :, :, None], groups=channels)
        return F.conv2d(t, gauss[:, :, None, :], groups=channels)

    c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
    product = x.new_ones(x.shape[:2])
    for scale, share in enumerate(SHARES):
        if scale:
            odd = [side % 2 for side in x.shape[-2:]]
            x, y = (F.avg_pool2d(t, 2, padding=odd) for t in (x, y))
        mx, my = mean(x), mean(y)
        vx, vy, both = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
        value = (2 * both + c2) / (vx + vy + c2)
        if scale == len(SHARES) - 1:
            value = value * (2 * mx * my + c1) / (mx * mx + my * my + c1)
        product = product * value.mean((2, 3)).clamp(min=0) ** share
    return product.mean(1)


def similarity(image: Pixels, reference: Pixels) -> float:
    """MS-SSIM of two pictures of 8 bits."""
    x, y = (torch.from_numpy(np.array(t)).permute(2, 0, 1)[None].double() for t in (image, reference))
    return float(ms_ssim(x, y, 255.0))


def similarity_in_db(image: Pixels, reference: Pixels) -> float:
    """MS-SSIM as −10 log₁₀(1 − MS-SSIM)."""
    return in_db(similarity(image, reference))


def in_db(value: float) -> float:
    """−10 log₁₀(1 − MS-SSIM): how the field shows it.

    >>> in_db(0.99)
    20.0
    """
    return math.inf if value >= 1 else round(-10 * math.log10(1 - value), 10)


def bd_rate(rates: Numbers, qualities: Numbers, than: Numbers, qualities_of_that: Numbers) -> float:
    """Bjøntegaard's mean difference of rates at equal quality, in per cent; below 0 the first codec needs fewer bits.

    The logarithm of the rate is interpolated over quality by piecewise cubics (PCHIP), and the difference of the two is
    averaged over the qualities that both reach.

    Args:
        rates, qualities: of the first codec, at least two points, with qualities that differ.
        than, qualities_of_that: of the second.

    Raises:
        ValueError: fewer points, a rate that is not positive, or qualities that do not overlap.

    >>> round(bd_rate([1, 2, 4], [30, 33, 36], [2, 4, 8], [30, 33, 36]), 6)
    -50.0
    """
    from scipy.interpolate import PchipInterpolator

    curves = []
    for rate, quality in ((rates, qualities), (than, qualities_of_that)):
        order = np.argsort(quality)
        x, y = np.asarray(quality, float)[order], np.asarray(rate, float)[order]
        if len(x) < 2 or len(x) != len(y) or (np.diff(x) <= 0).any() or (y <= 0).any():
            raise ValueError(f"a curve needs two points of different quality and rates above 0, got {list(zip(y, x))}")
        curves.append((x, PchipInterpolator(x, np.log(y)).antiderivative()))
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if low >= high:
        raise ValueError(f"the curves share no quality: {curves[0][0].tolist()} and {curves[1][0].tolist()}")
    areas = [float(area(high) - area(low)) for _, area in curves]
    return 100 * math.expm1((areas[0] - areas[1]) / (high - low))


# What Pillow writes: format, the name of its knob, values from small files to large ones, further options.
PILLOW: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any]]] = {
    "JPEG": ("JPEG", "quality", (10, 25, 50, 75, 90), {}),
    "WebP": ("WEBP", "quality", (5, 25, 50, 75, 90), {"method": 4}),
    "JPEG 2000": ("JPEG2000", "quality_layers", ([120], [60], [30], [15], [8]), {"irreversible": True}),
    "AVIF": ("AVIF", "quality", (20, 35, 50, 65, 80), {"speed": 8}),
}


class Coded(NamedTuple):
    """What comes out of a codec.

    Args:
        pixels: the decoded picture.
        bits: of its file.
    """

    pixels: np.ndarray
    bits: float


def through_pillow(pixels: Pixels, kind: str, **options: Any) -> Coded:
    """A picture written by Pillow in that format, and read again."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    size = file.tell()
    with Image.open(file) as opened:
        return Coded(np.asarray(opened.convert("RGB")), 8.0 * size)


def mean_point(
    pictures: Sequence[np.ndarray],
    code: Callable[[np.ndarray], Coded],
    measure: Measure = psnr,
) -> tuple[float, float]:
    """Bits a pixel and quality of a codec, means over the pictures."""
    rows = [
        (coded.bits / pixels[..., 0].size, measure(coded.pixels, pixels))
        for pixels in pictures
        for coded in [code(pixels)]
    ]
    rate, quality = np.mean(rows, axis=0)
    return float(rate), float(quality)


def pillow_curve(
    name: str, pictures: Sequence[np.ndarray], measures: Sequence[Measure] = (psnr,)
) -> list[tuple[float, ...]]:
    """Bits a pixel and qualities of a codec of `PILLOW`, means over the pictures, a point for each setting.

    A codec that this Pillow was built without gives no points.
    """
    kind, knob, values, options = PILLOW[name]
    needed = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}.get(kind)
    if needed is not None and not features.check(needed):
        return []
    points = []
    for value in values:
        rows = []
        for pixels in pictures:
            coded = through_pillow(pixels, kind, **{knob: value}, **options)
            rows.append([coded.bits / pixels[..., 0].size, *(measure(coded.pixels, pixels) for measure in measures)])
        points.append(tuple(np.mean(rows, axis=0).tolist()))
    return points


def rate_at(quality: float | int, rates: Numbers, qualities: Numbers) -> float | None:
    """The rate of a curve at a quality, its logarithm interpolated; None where the curve does not reach it.

    >>> rate_at(31.5, [1, 4], [30, 33])
    2.0
    """
    order = np.argsort(qualities)
    x, y = np.asarray(qualities, float)[order], np.log(np.asarray(rates, float))[order]
    return float(np.exp(np.interp(quality, x, y))) if x[0] <= quality <= x[-1] else None

"""Bicubic resizing as the super-resolution field computes it: MATLAB's `imresize`, antialiased."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def bicubic(x: Float[Tensor, "*batch height width"], size: tuple[int, int]) -> Float[Tensor, "*batch height2 width2"]:
    """Resize by the cubic kernel with a = −1/2 (Keys, 1981), stretched by the factor of reduction when shrinking.

    y(i) = Σ_j w(i, j) x(j), w(i, j) ∝ k(r·(u_i − j)), u_i = (i + 1/2)/scale − 1/2, r = min(1, scale), Σ_j w(i, j) = 1.
    Beyond the border the image continues by its mirror image, the last row and column repeated.

    `torch.nn.functional.interpolate(mode="bicubic", antialias=True)` agrees away from the borders; there it leaves the
    missing neighbours out. Without `antialias` it takes another kernel, and no antialiasing.

    Args:
        x: images of floating-point numbers.
        size: height and width of the result, in pixels.
    """
    if min(size) < 1 or min(x.shape[-2:]) < 1:
        raise ValueError(f"sizes must be at least 1, got {tuple(x.shape[-2:])} to {size}")
    for dim, length in zip((-2, -1), size):
        x = _along(x, dim, length)
    return x


def _along(x: Tensor, dim: int, length: int) -> Tensor:
    count = x.shape[dim]
    if count == length:
        return x
    scale = length / count
    reach = 4 / min(scale, 1.0)
    centre = (torch.arange(length, dtype=torch.float64) + 0.5) / scale - 0.5
    taps = torch.arange(math.ceil(reach) + 2)
    index = (centre - reach / 2).floor().long()[:, None] + taps
    weight = _cubic((centre[:, None] - index) * min(scale, 1.0))
    weight = weight / weight.sum(dim=1, keepdim=True)
    index = index % (2 * count)
    index = torch.where(index < count, index, 2 * count - 1 - index).to(x.device)
    column = [1] * x.dim()
    column[dim] = length
    result = torch.zeros((), dtype=x.dtype, device=x.device)
    for tap in taps[weight.abs().amax(dim=0) > 0].tolist():
        result = result + weight[:, tap].to(x).view(column) * x.index_select(dim, index[:, tap])
    return result


def _cubic(distance: Tensor) -> Tensor:
    d = distance.abs()
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d <= 1, near, torch.where(d <= 2, far, 0.0))

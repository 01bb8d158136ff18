"""Indices of fidelity, with a reference and without: of losses, of reports and of tests."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from provenn.papers.lambda_pnn.sensors import RATIO

BLOCK = 32  # side of Q2ⁿ's blocks
TINY = 1e-20
MARGIN = 16  # pixels of the PAN beyond its border; the bicubic kernel reaches 8


def ergas(
    x: Float[Tensor, "batch bands height width"], reference: Float[Tensor, "batch bands height width"]
) -> Float[Tensor, " batch"]:
    """Relative error over the bands: (100/R) √(mean_b MSE_b / mean(reference_b)²); 0 is best.

    >>> float(ergas(torch.full((1, 2, 4, 4), 1.25), torch.ones(1, 2, 4, 4))[0])
    6.25
    """
    error = (x - reference).square().mean(dim=(2, 3)) / reference.mean(dim=(2, 3)).square()
    return 100 / RATIO * error.mean(dim=1).sqrt()


def sam(
    x: Float[Tensor, "batch bands height width"], reference: Float[Tensor, "batch bands height width"]
) -> Float[Tensor, " batch"]:
    """Mean angle between the spectra of the same pixels, in degrees; pixels without light in either count as 0.

    >>> x, y = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), torch.tensor([1.0, 1.0]).view(1, 2, 1, 1)
    >>> round(float(sam(x, y)[0]), 4)
    45.0
    """
    x, y = x.double(), reference.double()
    across = (x.square().sum(1) * y.square().sum(1)).sqrt()
    cosine = ((x * y).sum(1) / across.clamp_min(torch.finfo(torch.float64).tiny)).clamp(-1, 1)
    return torch.where(across > 0, cosine.acos().rad2deg(), 0.0).mean(dim=(1, 2))


@cache
def structure(size: int) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Indices and signs of the product of two hypercomplex units, e_i e_j = sign · e_index (Cayley–Dickson).

    (a, b)(c, d) = (a c − d̄ b, d a + b c̄): complex numbers for 2, quaternions for 4, octonions for 8.

    Args:
        size: a power of two.
    """
    if size == 1:
        return ((0,),), ((1,),)
    half = size // 2
    index, sign = structure(half)

    def product(i: int, j: int) -> tuple[int, int]:
        upper_i, upper_j, a, b = i >= half, j >= half, i % half, j % half
        if upper_i and upper_j:  # −d̄ b
            return index[b][a], -sign[b][a] * _conjugated(b)
        if upper_j:  # d a
            return half + index[b][a], sign[b][a]
        if upper_i:  # b c̄
            return half + index[a][b], sign[a][b] * _conjugated(b)
        return index[a][b], sign[a][b]

    table = [[product(i, j) for j in range(size)] for i in range(size)]
    return tuple(tuple(k for k, _ in row) for row in table), tuple(tuple(s for _, s in row) for row in table)


def _conjugated(unit: int) -> int:
    return -1 if unit else 1


def product_of(pairs: Float[Tensor, "*batch size size2"]) -> Float[Tensor, "*batch size"]:
    """Σ_ij pairs_ij e_i e_j: the hypercomplex product where `pairs` is the outer product of two numbers.

    >>> i, j = torch.eye(4).double()[1], torch.eye(4).double()[2]
    >>> product_of(torch.outer(i, j)).tolist()  # i j = k
    [0.0, 0.0, 0.0, 1.0]
    """
    index, sign = structure(pairs.shape[-1])
    flat = (pairs * torch.tensor(sign, dtype=pairs.dtype, device=pairs.device)).flatten(-2)
    places = torch.tensor(index, device=pairs.device).flatten().expand(flat.shape)
    return flat.new_zeros(*pairs.shape[:-1]).scatter_add(-1, places, flat)


def q2n(
    x: Float[Tensor, "batch bands height width"],
    reference: Float[Tensor, "batch bands height width"],
    *,
    round_inputs: bool = True,
) -> Float[Tensor, " batch"]:
    """Q2ⁿ (Garzelli and Nencini, 2009): agreement of two images whose pixels are hypercomplex numbers; 1 is best.

    On blocks of 32×32 pixels, both normalised by the reference's mean and deviation, the second conjugated:
    q = cov(z₁, z₂) · 2|z̄₁||z̄₂| / (|z̄₁|² + |z̄₂|²) · 2 / (var z₁ + var z₂), and the mean over blocks of |q|. Float64.
    All blocks and products are one batch: the mean of z₁ ⊗ z₂ needs the B × B sums of products of bands alone.

    Args:
        x, reference: on the scale of the sensor's counts (× 2048), as the index is defined on whole numbers. Bands are
            filled up with zeros to a power of two. A side that is no power of two is continued by its border; the
            authors' code continues the other side, which for a square is the same.
        round_inputs: to whole numbers, as the index has it. A rounded image has no gradient: a loss sets False.

    >>> x = 2048 * torch.rand(1, 3, 64, 64)
    >>> round(float(q2n(x, x)[0]), 12)
    1.0
    """
    images = [_in_blocks(image.double(), round_inputs) for image in (reference, x)]
    mean = images[0].mean(dim=-1, keepdim=True)
    spread = images[0].std(dim=-1, keepdim=True)
    spread = torch.where(spread == 0, 1e-10, spread)
    z1, z2 = ((image - mean) / spread + 1 for image in images)
    z1, z2 = (_filled(z) for z in (z1, z2))
    z2 = torch.cat([z2[..., :1, :], -z2[..., 1:, :]], dim=-2)
    n = z1.shape[-1]
    unbiased = n / (n - 1)
    m1, m2 = z1.mean(-1), z2.mean(-1)
    power1, power2 = m1.square().sum(-1), m2.square().sum(-1)
    bias = 2 * (power1 * power2).sqrt() / (power1 + power2)
    variance = unbiased * (z1.square().sum(-2).mean(-1) + z2.square().sum(-2).mean(-1) - power1 - power2)
    covariance = unbiased * (product_of(z1 @ z2.mT / n) - product_of(m1[..., :, None] * m2[..., None, :]))
    flat = variance == 0
    q = covariance * (bias * 2 / torch.where(flat, 1.0, variance))[..., None]
    q = torch.where(q == 0, 1e-30, q)
    modulus = torch.where(flat, bias, q.square().sum(-1).sqrt())
    return modulus.flatten(1).mean(dim=1)


def _in_blocks(x: Float[Tensor, "batch bands height width"], rounded: bool) -> Float[Tensor, "batch blocks bands n"]:
    height, width = (2 ** math.ceil(math.log2(side)) for side in x.shape[-2:])
    missing = [height - x.shape[-2], width - x.shape[-1]]
    if any(missing):
        top, left = (gap // 2 for gap in missing)
        x = F.pad(x, (left, missing[1] - left, top, missing[0] - top), mode="replicate")
    gaps = [-side % BLOCK for side in x.shape[-2:]]
    if any(gap >= side for gap, side in zip(gaps, x.shape[-2:])):
        raise ValueError(f"Q2ⁿ needs more than {BLOCK // 2} pixels on each side, got {tuple(x.shape[-2:])}")
    if any(gaps):
        x = F.pad(x, (0, gaps[1], 0, gaps[0]), mode="reflect")
    x = x.round() if rounded else x
    batch, bands, height, width = x.shape
    x = x.reshape(batch, bands, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, bands, BLOCK**2)


def _filled(z: Float[Tensor, "*batch bands n"]) -> Float[Tensor, "*batch bands2 n"]:
    """Bands of zeros up to a power of two: normalised they are 0 / 1e-10 + 1."""
    missing = 2 ** math.ceil(math.log2(z.shape[-2])) - z.shape[-2]
    return torch.cat([z, torch.ones_like(z[..., :1, :]).expand(*z.shape[:-2], missing, -1)], -2) if missing else z


def local_correlation(
    a: Float[Tensor, "batch bands height width"], b: Float[Tensor, "batch2 bands2 height width"], half_width: int
) -> Float[Tensor, "batch3 bands3 height width"]:
    """ρ: correlation of two images, high-passed, in a window of 2w × 2w around each pixel; float64.

    ã = a − box(a)/4w², pixel by pixel, and ρ = box(ã b̃) / (√(box(ã²) box(b̃²)) + 1e-20). A window covers i − w + 1 to
    i + w; beyond the border lies zero. The cost does not depend on w: sums are differences of cumulative ones.

    Args:
        a, b: of as many images and bands, or one of them of one.
        half_width: w.
    """
    a, b = (x.double() - _box(x.double(), half_width) / (2 * half_width) ** 2 for x in (a, b))
    energies = [_box(x.square(), half_width).clamp_min(TINY) for x in (a, b)]
    return _box(a * b, half_width) / ((energies[0] * energies[1]).sqrt() + TINY)


def _box(x: Tensor, w: int) -> Tensor:
    """Sums over i − w + 1 … i + w in both directions."""
    sums = F.pad(x, (w, w, w, w)).cumsum(-1).cumsum(-2)
    return sums[..., 2 * w :, 2 * w :] - sums[..., : -2 * w, 2 * w :] - sums[..., 2 * w :, : -2 * w] + sums[
        ..., : -2 * w, : -2 * w
    ]  # fmt: skip


def d_rho(
    x: Float[Tensor, "batch bands height width"], pan: Float[Tensor, "batch 1 height width"]
) -> Float[Tensor, " batch"]:
    """D_ρ: mean of 1 − ρ between each band and the PAN in windows of 4×4; 0 is best."""
    return (1 - local_correlation(x, pan, RATIO // 2).clamp(-1, 1)).mean(dim=(1, 2, 3))


def universal_index(
    x: Float[Tensor, "batch bands height width"], y: Float[Tensor, "batch bands2 height width"], block: int
) -> Float[Tensor, "batch bands3"]:
    """Q (Wang and Bovik, 2002), the mean over all windows of block × block pixels of each band; 1 is best."""
    x, y = torch.broadcast_tensors(x.double(), y.double())
    mx, my, mxx, myy, mxy = (F.avg_pool2d(z, block, 1) for z in (x, y, x * x, y * y, x * y))
    means = mx.square() + my.square()
    spread = mxx + myy - means
    flat = spread.abs() < 1e-12 * (mxx + myy).clamp_min(torch.finfo(torch.float64).tiny)
    bias = torch.where(means > 0, 2 * mx * my / means.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return torch.where(flat, bias, 2 * (mxy - mx * my) / torch.where(flat, 1.0, spread) * bias).mean(dim=(2, 3))


def d_s(
    x: Float[Tensor, "batch bands height width"],
    pan: Float[Tensor, "batch 1 height width"],
    ms: Float[Tensor, "batch bands height2 width2"],
) -> Float[Tensor, " batch"]:
    """D_S: how much each band's Q to the PAN differs between the scales, |Q(y, PAN) − Q(MS, PAN↓)|; 0 is best.

    Blocks of 32 and 8 pixels. PAN↓ is MATLAB's antialiased bicubic, as in the authors' code: mirrored at the border
    with the edge repeated, where torch's cuts the kernel off.
    """
    wide = _mirrored(pan.double(), MARGIN)
    sides = [side // RATIO for side in wide.shape[-2:]]
    small = F.interpolate(wide, sides, mode="bicubic", antialias=True, align_corners=False)
    cut = MARGIN // RATIO
    small = small[..., cut:-cut, cut:-cut]
    fine, coarse = universal_index(x, pan, BLOCK), universal_index(ms, small, BLOCK // RATIO)
    return (fine - coarse).abs().mean(dim=1)


def _mirrored(x: Float[Tensor, "batch bands height width"], margin: int) -> Float[Tensor, "batch bands height2 width2"]:
    """Continued by its mirror image, the edge repeated."""
    for axis in (-2, -1):
        place = torch.arange(-margin, x.shape[axis] + margin, device=x.device)
        place = torch.where(place < 0, -1 - place, place)
        x = x.index_select(axis, torch.where(place >= x.shape[axis], 2 * x.shape[axis] - 1 - place, place))
    return x


def d_s_r(
    x: Float[Tensor, "batch bands height width"], pan: Float[Tensor, "batch 1 height width"]
) -> Float[Tensor, " batch"]:
    """D_S^(R) = 1 − R² of the PAN regressed on the bands, without a constant; 0 is best."""
    bands, target = x.double().flatten(2).mT, pan.double().flatten(2).mT
    fitted = bands @ torch.linalg.lstsq(bands, target).solution
    return ((target - fitted).var(dim=(1, 2)) / target.var(dim=(1, 2))).to(torch.float64)

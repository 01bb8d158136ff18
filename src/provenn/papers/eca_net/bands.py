"""Tiles of a multispectral sensor of which some bands fail: a gate has to look at neighbouring channels.

Synthetic, and so only an argument about the mechanism: the channels are ordered and the faults contiguous, which suits
a local filter. In a trained network nothing orders the channels but training itself.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BANDS, MATERIALS, SIDE = 64, 8, 8


def smooth_curves(count: int, length: float, generator: torch.Generator) -> Float[Tensor, "count bands"]:
    """Unit-variance curves over the bands, correlated over `length` bands (a Gaussian process)."""
    distance = torch.arange(BANDS)[:, None] - torch.arange(BANDS)
    covariance = torch.exp(-0.5 * (distance.double() / length) ** 2) + 1e-6 * torch.eye(BANDS, dtype=torch.float64)
    root = torch.linalg.cholesky(covariance).float()
    return torch.randn(count, BANDS, generator=generator) @ root.T


def bad_bands(
    tiles: int, *, seed: int, materials: int = 0
) -> tuple[Float[Tensor, "tiles bands side side"], Int[Tensor, " tiles"], Bool[Tensor, "tiles bands"]]:
    """Tiles of one material each, the material's index, and which bands failed.

    pixel = speckle × spectrum × illumination + noise; speckle ~ Γ(4, ¼), noise ~ N(0, 0.05²), the spectrum belongs to
    the material and the illumination to the tile. In every tile one run of 6 to 19 bands fails: each of its bands gains
    an offset ~ N(0, 1) and noise ~ N(0, 1.5²).

    Args:
        tiles: how many.
        seed: draws the tiles.
        materials: draws the eight spectra; training and test tiles of one experiment share it.
    """
    spectra = (0.15 * smooth_curves(MATERIALS, 6.0, torch.Generator().manual_seed(materials))).exp()
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    material = torch.randint(MATERIALS, (tiles,), generator=generator)
    illumination = (0.3 * smooth_curves(tiles, 20.0, generator)).exp()
    shape = (tiles, BANDS, SIDE, SIDE)
    # A gamma of shape 4 is the sum of four exponentials.
    speckle = -torch.rand(4, *shape, generator=generator).prod(0).clamp_(min=1e-38).log() / 4
    x = speckle * (spectra[material] * illumination)[:, :, None, None]
    x += 0.05 * torch.randn(shape, generator=generator)
    length = torch.randint(6, 20, (tiles, 1), generator=generator)
    start = (torch.rand(tiles, 1, generator=generator) * (BANDS - length + 1)).long()
    band = torch.arange(BANDS)
    failed = (band >= start) & (band < start + length)
    fault = torch.randn(tiles, BANDS, 1, 1, generator=generator) + 1.5 * torch.randn(shape, generator=generator)
    return x + failed[:, :, None, None] * fault, material, failed

"""Random features, φ with E[φ(q)·φ(k)] = e^{q·k} (Choromanski et al., 2021, arXiv:2009.14794)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def orthogonal_gaussian(
    features: int, dim: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Float[Tensor, "features dim"]:
    """Rows that are each N(0, I) and orthogonal to each other in blocks of `dim`.

    Directions come from the QR decomposition of Gaussian blocks, lengths from other Gaussian rows (χ_dim): rows of
    length √dim, as some codes have them, or of length 1 would bias the kernel.

    Args:
        features: m, how many rows.
        dim: d, their width.
        generator: where the draw comes from; by default torch's own.

    >>> w = orthogonal_gaussian(4, 8)
    >>> torch.allclose(w @ w.T, torch.diag((w * w).sum(1)), atol=1e-4)
    True
    """
    if features < 1 or dim < 1:
        raise ValueError(f"features and dim must be at least 1, got features={features} and dim={dim}")
    blocks = math.ceil(features / dim)
    gaussian = torch.randn(blocks, dim, dim, generator=generator, device=device)
    lengths = torch.randn(features, dim, generator=generator, device=device).norm(dim=-1, keepdim=True)
    q, r = torch.linalg.qr(gaussian)
    # With the signs of R's diagonal Q is uniform over all rotations; QR as computed prefers some.
    rows = (q * torch.sign(r.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)).mT.flatten(0, 1)
    return rows[:features] * lengths


def gaussian(
    features: int, dim: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Float[Tensor, "features dim"]:
    """Rows that are independent N(0, I): what the kernel's expectation is over."""
    if features < 1 or dim < 1:
        raise ValueError(f"features and dim must be at least 1, got features={features} and dim={dim}")
    return torch.randn(features, dim, generator=generator, device=device)


def spherical(
    features: int, dim: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Float[Tensor, "features dim"]:
    """Independent rows, uniform on the sphere of radius √dim (arXiv:2106.12566, section 4.3)."""
    return math.sqrt(dim) * F.normalize(gaussian(features, dim, generator=generator, device=device), dim=-1)


def positive_exponents(
    x: Float[Tensor, "*batch tokens dim"], w: Float[Tensor, "*draws features dim"]
) -> Float[Tensor, "*batch tokens features"]:
    """log(√m φ(x)) of positive random features: w·x − ‖x‖²/2, to be shifted before exp where shifts cancel."""
    return x @ w.mT - x.square().sum(dim=-1, keepdim=True) / 2


def positive_features(
    x: Float[Tensor, "*batch tokens dim"], w: Float[Tensor, "*draws features dim"]
) -> Float[Tensor, "*batch tokens features"]:
    """PRF: φ(x) = e^{−‖x‖²/2} / √m · e^{w·x}; unbiased, positive, of a variance that grows as e^{‖q+k‖²}."""
    return positive_exponents(x, w).exp() / math.sqrt(w.shape[-2])


def trigonometric_features(
    x: Float[Tensor, "*batch tokens dim"], w: Float[Tensor, "*draws features dim"]
) -> Float[Tensor, "*batch tokens both"]:
    """TRF: φ(x) = e^{‖x‖²/2} / √m · [sin w·x, cos w·x]; unbiased, but products of two can be negative."""
    angles = x @ w.mT
    scale = (x.square().sum(dim=-1, keepdim=True) / 2).exp() / math.sqrt(w.shape[-2])
    return torch.cat([angles.sin(), angles.cos()], dim=-1) * scale


def elu_features(x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
    """φ(x) = elu(x) + 1, drawn from nothing (Katharopoulos et al., 2020, arXiv:2006.16236)."""
    return F.elu(x) + 1

"""Where, or when, a token is."""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def sinusoidal_encoding(positions: Shaped[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape dim"]:
    """sin and cos of position · 10000^(−2j/dim), interleaved (Vaswani et al., 2017, section 3.5).

    Args:
        positions: indices, or times in any unit.
        dim: features; even.

    >>> sinusoidal_encoding(torch.tensor([0]), 4).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    rates = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(10_000) / dim))
    # Long streams reach positions at which float32 no longer tells neighbouring angles apart.
    angles = (positions.double().unsqueeze(-1) * rates.double()).remainder(2 * math.pi).float()
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)

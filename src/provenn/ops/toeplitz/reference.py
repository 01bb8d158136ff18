"""What a Toeplitz product is: dense matrices, straight from the definition (arXiv:2106.12566, section 3.2).

A kernel c holds one number an offset δ = j − i, from query i to key j. Its last axes are the offsets: 2n − 1 of them,
−(n−1) to n−1; with `causal=True` the n offsets −(n−1) to 0; on a grid of H×W tokens (2H−1)×(2W−1) of them.
"""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor


def toeplitz_matrix(c: Float[Tensor, "#heads *offsets"], *, causal: bool = False) -> Float[Tensor, "#heads n n"]:
    """C_ij = c_{j−i}, and 0 where causal and j > i; tokens of a grid are counted row by row."""
    if causal:
        c = torch.cat([c, torch.zeros_like(c[:, 1:])], dim=1)
    sides = [(size + 1) // 2 for size in c.shape[1:]]
    positions = list(itertools.product(*(range(side) for side in sides)))

    def entry(i: tuple[int, ...], j: tuple[int, ...]) -> int:
        flat = 0
        for a, b, side in zip(i, j, sides):
            flat = flat * (2 * side - 1) + b - a + side - 1
        return flat

    return c.flatten(1)[:, torch.tensor([[entry(i, j) for j in positions] for i in positions])]


def dense_matmul(
    c: Float[Tensor, "#heads *offsets"], x: Float[Tensor, "batch heads n channels"], *, causal: bool = False
) -> Float[Tensor, "batch heads n channels"]:
    """y_i = Σ_j c_{j−i} x_j."""
    return toeplitz_matrix(c, causal=causal) @ x


def dense_sums(
    c: Float[Tensor, "#heads *offsets"],
    q: Float[Tensor, "batch heads n features"],
    k: Float[Tensor, "batch heads n features"],
    v: Float[Tensor, "batch heads n channels"],
    *,
    causal: bool = False,
) -> Float[Tensor, "batch heads n channels"]:
    """y_i = Σ_j c_{j−i} (q_i·k_j) v_j, the sums of kernelized attention with relative positions (equation 10)."""
    return (q @ k.mT * toeplitz_matrix(c, causal=causal)) @ v

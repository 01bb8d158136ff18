"""Where, or when, a token is."""

import math

import torch
import torch.nn.functional as F
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
    # Long streams reach positions at which float32 no longer distinguishes neighbouring angles.
    angles = (positions.double().unsqueeze(-1) * rates.double()).remainder(2 * math.pi).float()
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def rotation(
    positions: Shaped[Tensor, "*leading tokens"], dim: int, dtype: torch.dtype, base: float | int = 10_000
) -> tuple[Float[Tensor, "*leading tokens half"], Float[Tensor, "*leading tokens half"]]:
    """The cosines and sines of `rotate`, in float32 at least: what queries and keys of the same positions share.

    Args:
        positions, base: as in `rotate`.
        dim: width of a head; even.
        dtype: of what is turned.
    """
    if dim % 2:
        raise ValueError(f"rotary positions need an even head width, got {dim}")
    rates = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(base) / dim))
    # In float64 up to the remainder: of a position of 10⁵, float32 leaves two digits of the angle.
    angles = (
        (positions.double().unsqueeze(-1) * rates.double())
        .remainder(2 * math.pi)
        .to(torch.promote_types(dtype, torch.float32))
    )
    return angles.cos(), angles.sin()


def turn(
    x: Float[Tensor, "*batch tokens dim"],
    cos: Float[Tensor, "*leading tokens half"],
    sin: Float[Tensor, "*leading tokens half"],
) -> Float[Tensor, "*batch tokens dim"]:
    """`rotate` by cosines and sines as `rotation` gives them."""
    # Partners are half a head apart, as in Llama and RAT's code; RoFormer itself pairs neighbours.
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rotate(
    x: Float[Tensor, "*batch tokens dim"], positions: Shaped[Tensor, "*leading tokens"], base: float | int = 10_000
) -> Float[Tensor, "*batch tokens dim"]:
    """Turn the pair (x_j, x_{j + dim/2}) by position · base^(−2j/dim): rotary positions (Su et al., 2021, RoFormer).

    The product of two vectors so turned depends on the difference of their positions alone.

    Args:
        x: queries or keys of a head.
        positions: of the tokens, any real numbers; dimensions before the tokens broadcast to those of `x`.
        base: of the wave lengths.

    >>> rotate(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).tolist()
    [[1.0, 0.0]]
    """
    return turn(x, *rotation(positions, x.shape[-1], x.dtype, base))


def shift_distances(
    farthest_first: Float[Tensor, "*batch queries keys"],
) -> Float[Tensor, "*batch queries keys"]:
    """From scores by distance, keys − 1 first and 0 last, to scores by key, without an index (Dai et al., 2019, B).

    Queries are the last of the keys. Row i moves to the left by queries − 1 − i columns: a column of zeros goes in
    front, and the matrix is read in rows that are one shorter. What then stands above the diagonal is of no use: a
    causal mask hides it.

    >>> shift_distances(torch.tensor([[2, 1, 0], [2, 1, 0], [2, 1, 0]]).float()).tril().tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 1.0, 0.0]]
    """
    queries, keys = farthest_first.shape[-2:]
    padded = F.pad(farthest_first, (1, 0)).flatten(-2)
    return padded[..., queries:].unflatten(-1, (queries, keys))

"""What a point looks like in a few numbers that nobody learned: shares of colour names, at the height where it lies."""

import numpy as np
from jaxtyping import Float, Float32

from provenn.core.errors import UserError
from provenn.data.clouds import Cloud

# Basic colour terms (Berlin and Kay, 1969) with a typical value of each, red, green and blue from 0 to 1.
COLOURS: dict[str, tuple[float, float, float]] = {
    "black": (0.05, 0.05, 0.05),
    "white": (0.95, 0.95, 0.95),
    "grey": (0.5, 0.5, 0.5),
    "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.6, 0.15),
    "blue": (0.1, 0.25, 0.85),
    "yellow": (0.95, 0.9, 0.1),
    "orange": (1.0, 0.55, 0.05),
    "purple": (0.5, 0.1, 0.6),
    "pink": (1.0, 0.6, 0.75),
    "brown": (0.45, 0.25, 0.1),
}
SPREAD = 0.15  # of a colour around its typical value
HEIGHTS = (0.1, 0.5, 1.0, 2.0)  # metres above the lowest point, between bands
FEATURES = len(COLOURS) * (len(HEIGHTS) + 1)


def point_features(
    points: Float[np.ndarray, "points 3"], colours: Float[np.ndarray, "points 3"]
) -> Float32[np.ndarray, "points features"]:
    """Eleven times the shares of eleven colour names, at that of five heights which a point has; 0 at the others.

    A share is exp(−|c − c_name|² / 2σ²) over the sum of all names; eleven times it is 1 where all are alike. The mean
    over a group of points is then a table of heights and colours: what is low and red, or high and grey.

    Args:
        points: in metres, up being z.
        colours: red, green and blue from 0 to 1.

    >>> colours = np.array([[0.85, 0.1, 0.1], [0.5, 0.5, 0.5]])
    >>> found = point_features(np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.7]]), colours)
    >>> [(int(k) // 11, list(COLOURS)[k % 11]) for k in found.argmax(1)]
    [(0, 'red'), (2, 'grey')]
    """
    typical = np.array(list(COLOURS.values()), dtype=np.float32)
    squares = np.square(colours.astype(np.float32)[:, None] - typical).sum(-1)
    shares = np.exp((squares.min(1, keepdims=True) - squares) / (2 * SPREAD**2))
    shares *= len(COLOURS) / shares.sum(1, keepdims=True)
    bands = np.searchsorted(HEIGHTS, points[:, 2] - points[:, 2].min(), side="right")
    table = np.zeros((len(points), len(HEIGHTS) + 1, len(COLOURS)), dtype=np.float32)
    table[np.arange(len(points)), bands] = shares
    return table.reshape(len(points), -1)


def sampled(cloud: Cloud, count: int, seed: int = 0) -> Float32[np.ndarray, "count channels"]:
    """Points of a cloud in random order, each with its coordinates and `point_features`.

    A cloud of fewer points gives some of them twice.

    Args:
        cloud: with colours.
        count: how many.
        seed: of the choice.

    Raises:
        UserError: it has no colours.
    """
    if cloud.colours is None:
        raise UserError("the cloud has no colours, which the model reads: expected red, green and blue of each point")
    features = point_features(cloud.points, cloud.colours)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(cloud))[:count]
    if len(order) < count:
        order = np.concatenate([order, draw.integers(0, len(cloud), count - len(order))])
    return np.concatenate([cloud.points, features], axis=1)[order]

"""What a point looks like in a few numbers that nobody learned: shares of colour names, and how high it lies."""

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
FEATURES = len(COLOURS) + len(HEIGHTS) + 1


def point_features(
    points: Float[np.ndarray, "points 3"], colours: Float[np.ndarray, "points 3"]
) -> Float32[np.ndarray, "points features"]:
    """Shares of eleven colour names, exp(−|c − c_name|² / 2σ²) over their sum, and which of five heights it has.

    Args:
        points: in metres, up being z.
        colours: red, green and blue from 0 to 1.

    >>> colours = np.array([[0.85, 0.1, 0.1], [0.5, 0.5, 0.5]])
    >>> found = point_features(np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.7]]), colours)
    >>> [list(COLOURS)[k] for k in found[:, :11].argmax(1)], found[:, 11:].argmax(1).tolist()
    (['red', 'grey'], [0, 2])
    """
    squares = np.square(colours[:, None] - np.array(list(COLOURS.values()))).sum(-1)
    logs = (squares.min(1, keepdims=True) - squares) / (2 * SPREAD**2)
    shares = np.exp(logs)
    bands = np.searchsorted(HEIGHTS, points[:, 2] - points[:, 2].min(), side="right")
    heights = np.eye(len(HEIGHTS) + 1)[bands]
    return np.concatenate([shares / shares.sum(1, keepdims=True), heights], axis=1).astype(np.float32)


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

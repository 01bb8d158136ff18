"""What a detector of anomalies says of an image."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Anomalies(NamedTuple):
    """Scores of images and of their pixels, the larger the more anomalous; of any range.

    Args:
        score: of each image.
        heat: of each pixel, at the size of the images.
    """

    score: Float[Tensor, " batch"]
    heat: Float[Tensor, "batch height width"]

"""Images as the two models take them."""

from collections.abc import Sequence

from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

Pixels = UInt8[Tensor, "3 _ _"]  # images of a list have any sizes


def resized(image: Float[Tensor, "3 height width"], tall: int, wide: int) -> Float[Tensor, "3 tall wide"]:
    """An image at another size, averaged where it becomes smaller."""
    if tuple(image.shape[1:]) == (tall, wide):
        return image
    return F.interpolate(image[None], (tall, wide), mode="bilinear", antialias=True)[0]


def standardised(image: Float[Tensor, "3 height width"], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x − mean) / std of a channel, of x in 0…1."""
    return (image - image.new_tensor(mean)[:, None, None]) / image.new_tensor(std)[:, None, None]

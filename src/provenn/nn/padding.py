"""Images of any size for networks that want multiples of something."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


def mirror_pad(
    x: Float[Tensor, "batch channels height width"],
    bottom: int,
    right: int,
    mode: Literal["symmetric", "reflect"] = "symmetric",
) -> Float[Tensor, "batch channels height2 width2"]:
    """Continue an image below and to the right by its mirror image, as often as needed.

    Args:
        x: the image.
        bottom, right: rows and columns to add.
        mode: `symmetric` repeats the last row and column, `reflect` does not.
    """
    if mode not in ("symmetric", "reflect"):
        raise ValueError(f"mode must be 'symmetric' or 'reflect', got {mode!r}")
    for dim, extra in ((2, bottom), (3, right)):
        size = x.shape[dim]
        period = 2 * size if mode == "symmetric" else max(1, 2 * size - 2)
        # A tensor, since ONNX divides by no size that is still open; nor is there a way past this where `extra` is 0.
        index = torch.arange(size + extra, device=x.device) % torch.full((), period, device=x.device)
        back = period - 1 - index if mode == "symmetric" else period - index
        x = x.index_select(dim, torch.where(index < size, index, back))
    return x


class PadToMultiple(nn.Module):
    """Run a fully convolutional network on images of any size: pad, run, crop.

    Args:
        model: a network whose input sides must be multiples of `multiple`.
        multiple: what the padded sides are multiples of.
        scale: how many times larger the output is than the input.
        mode: as in `mirror_pad`.
        always: add a whole `multiple` where nothing is missing, as some published evaluation scripts do.

    Shapes: (batch, channels, height, width) to (batch, channels, scale · height, scale · width).
    """

    def __init__(
        self,
        model: nn.Module,
        multiple: int,
        scale: int = 1,
        *,
        mode: Literal["symmetric", "reflect"] = "symmetric",
        always: bool = False,
    ):
        super().__init__()
        if multiple < 1 or scale < 1:
            raise ValueError(f"multiple and scale must be at least 1, got {multiple} and {scale}")
        self.model, self.multiple, self.scale, self.mode, self.always = model, multiple, scale, mode, always

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height2 width2"]:
        height, width = x.shape[2:]
        # Written as a product, which a tracer of open sizes can see to be a multiple.
        bottom, right = (
            ((side + (0 if self.always else -1)) // self.multiple + 1) * self.multiple - side
            for side in (height, width)
        )
        y = self.model(mirror_pad(x, bottom, right, self.mode))
        return y[..., : height * self.scale, : width * self.scale]

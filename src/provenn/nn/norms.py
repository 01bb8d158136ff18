"""Normalisations that several papers share."""

from jaxtyping import Float
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a map, at each pixel (eps 1e-5 by default, biased variance).

    Shapes: (batch, channels, height, width) to the same.
    """

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        # Published code often writes mean and variance out; the fused norm on channels-last maps gives the same.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

"""Small networks with one open slot, in which mechanisms are compared."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.attention import pack, packed_positions
from provenn.nn.positions import sinusoidal_encoding
from provenn.nn.transformer import TransformerEncoder


class SeriesHost(nn.Module):
    """Classes of series through a causal encoder whose token mixer is open: embed, encode, mean over tokens, linear.

    Args:
        mixer: makes the token mixer of each layer for a width.
        channels: measurements a token.
        num_classes: size of the output.
        dim, layers, feedforward, dropout: of the encoder.

    Shapes: (batch, tokens, channels), mask (batch, tokens) True where a token is no padding, to (batch, num_classes).
    """

    def __init__(
        self,
        mixer: Callable[[int], nn.Module],
        *,
        channels: int,
        num_classes: int,
        dim: int = 64,
        layers: int = 2,
        feedforward: int = 128,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.embed = nn.Linear(channels, dim)
        self.encoder = TransformerEncoder(dim, mixer, layers=layers, feedforward=feedforward, dropout=dropout)
        self.head = nn.Linear(dim, num_classes)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        else:
            packed = packed_positions(mask)  # positions begin at a series' first token
            x, mask = pack(x, packed), pack(mask, packed)
        # Padding may be NaN, which would pass a mask of attention: 0 · NaN is NaN.
        embedded = self.embed(x.masked_fill(~mask[..., None], 0))
        positions = torch.arange(x.shape[1], device=x.device)
        hidden = self.encoder(embedded + sinusoidal_encoding(positions, embedded.shape[-1]).to(embedded), mask=mask)
        valid = mask[..., None].to(hidden)
        return self.head((hidden * valid).sum(1) / valid.sum(1).clamp_min(1))


class ResidualHost(nn.Module):
    """Classes of images through a tower of residual branches without normalisation, whose join is open.

    The image is pooled to 8×8, embedded, passed through `depth` branches W₂ ReLU(W₁ x), and classified by a linear map.

    Args:
        join: makes the join of each branch for a width; one that has `initialise(branch, depth)` is asked to.
        num_classes, in_channels: of the images.
        dim: width of the stream.
        depth: number of branches.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes).
    """

    def __init__(
        self, join: Callable[[int], nn.Module], *, num_classes: int, in_channels: int, dim: int = 64, depth: int = 24
    ):
        super().__init__()
        self.depth = depth
        self.embed = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64 * in_channels, dim))
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)) for _ in range(depth)
        )
        self.joins = nn.ModuleList(join(dim) for _ in range(depth))
        for residual_join, branch in zip(self.joins, self.branches):
            initialise: Callable[[nn.Module, int], None] | None = getattr(residual_join, "initialise", None)
            if initialise is not None:
                initialise(branch, depth)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        x = self.embed(x)
        for join, branch in zip(self.joins, self.branches):
            x = join(x, branch, self.depth)
        return self.head(x)

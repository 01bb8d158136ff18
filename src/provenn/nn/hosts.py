"""Small networks with one open slot, in which mechanisms are compared."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

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
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        embedded = self.embed(x.masked_fill(~mask[..., None], 0))
        positions = torch.arange(x.shape[1], device=x.device)
        hidden = self.encoder(embedded + sinusoidal_encoding(positions, embedded.shape[-1]).to(embedded), mask=mask)
        valid = mask[..., None].to(hidden)
        return self.head((hidden * valid).sum(1) / valid.sum(1).clamp_min(1))

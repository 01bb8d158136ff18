"""What `provenn inspect nprf` shows: how near each head is to the softmax that it approximates."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.papers.nprf.diagnosis import diagnose_model


def inspect(model: nn.Module, x: Tensor) -> dict[str, Float[Tensor, " heads"]]:
    """The mean L1 distance of each head's attention rows from exact softmax: 0 is exact, 2 is the most."""
    return {name: torch.tensor(found.distance) for name, found in diagnose_model(model, x).items()}

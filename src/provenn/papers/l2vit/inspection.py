"""How far attention spreads over an input of yours, for `provenn inspect`."""

from jaxtyping import Float
from torch import Tensor, nn

from provenn.papers.l2vit.concentration import entropies


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, " tokens"]]:
    """The entropy of each token's row of attention over the whole map, mean of the heads: 1 is uniform."""
    return {name: rows[0].mean(dim=0) for name, rows in entropies(model, x).items()}

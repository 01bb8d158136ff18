"""Which heads an input of yours uses, for `provenn inspect`."""

from jaxtyping import Float
from torch import Tensor, nn

from provenn.papers.moh.layers import head_load


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, " heads"]]:
    """The share of the tokens that use each head, the shared heads first."""
    return head_load(model, x)

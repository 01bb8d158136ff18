"""Where the gates look in a photograph of yours, for `provenn inspect`."""

from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.narrowing import of_kind
from provenn.papers.pressure_ulcer.model import ResidualAttentionUNet


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, "height width"]]:
    """The gate α of each skip, from the coarsest to the finest.

    Raises:
        UserError: the network has no gates.
    """
    maps = of_kind(model, ResidualAttentionUNet, "the model").attention_maps(x)
    if not maps:
        raise UserError("these weights have no gates to look at: train with --set attention=gate")
    return {f"decoder.{level}.gate": alpha[0, 0].detach() for level, alpha in enumerate(maps)}

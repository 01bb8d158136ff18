"""What ECA does with an input of yours, for `provenn inspect`."""

from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.channel_gates import record_gates


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, " gated"]]:
    """The gate of each channel, in the channels' order."""
    return {name: gate[0] for name, gate in record_gates(model, x).items()}

"""Where guided attention looks in a slice of yours, for `provenn inspect`."""

from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.narrowing import of_kind
from provenn.papers.ms_guided_attention.model import GuidedAttentionNet


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, "height width"]]:
    """The mean size of A over its channels, of each step and scale from fine to coarse."""
    maps = of_kind(model, GuidedAttentionNet, "the model").attention_maps(x)
    return {
        f"step {step}.scale {scale}": part[0].detach()
        for step, scales in enumerate(maps, 1)
        for scale, part in enumerate(scales, 1)
    }

"""Harmonious attention (Li et al., 2018, arXiv:1802.08122, section 3.1): its channel part, and both parts.

Parameters and outputs are those of torchreid's code. Hard attention, which cuts regions for branches of its own, is no
gate of a map, and is left out.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_whole
from provenn.nn.channel_gates import PooledGate, spatial_mean


def _check(channels: int, reduction: int) -> None:
    check_whole(channels=channels, reduction=reduction)
    if channels < 1 or reduction < 1:
        raise ValueError(f"channels and reduction must be at least 1, got {channels} and {reduction}")


class HarmoniousChannelAttention(PooledGate):
    """HAC: x · σ(f₂(f₁(means))), each f a 1×1 convolution with bias, a batch norm and a ReLU.

    The channel part of harmonious attention (Li et al., 2018, arXiv:1802.08122). `HarmoniousAttention` multiplies a
    spatial part before σ. After the last ReLU no gate is below 1/2.

    Args:
        channels: C.
        reduction: r of the bottleneck.

    Parameters: 2C²/r + 3(C + C/r). Slot: channel-gate.
    """

    def __init__(self, channels: int, reduction: int = 16):
        _check(channels, reduction)
        super().__init__(channels)
        inner = max(channels // reduction, 1)
        self.squeeze, self.excite = nn.Linear(channels, inner), nn.Linear(inner, channels)
        self.bn1, self.bn2 = nn.BatchNorm1d(inner), nn.BatchNorm1d(channels)

    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        return self.bn2(self.excite(self.bn1(self.squeeze(context)).relu())).relu()


class HarmoniousAttention(nn.Module):
    """HA: x · σ(f₅(s · c)), a spatial part s of one map times a channel part c, mixed by a 1×1 convolution.

        s = f₄(resized(f₃(mean over channels))),  c = f₂(f₁(means over space))

    Each f is a convolution with bias, a batch norm and a ReLU: f₃ has 3×3 weights and stride 2, the others 1×1. The map
    of f₃ is resized bilinearly, with corners aligned, to the size of x, so any size goes. Soft attention of Li et al.
    (2018, arXiv:1802.08122, section 3.1). No gate is below 1/2.

    Args:
        channels: C.
        reduction: r of the channel part's bottleneck.

    Shapes: (batch, channels, height, width) to the same. Parameters: 2C²/r + 3(C + C/r) + C² + 3C + 16. Slot:
    channel-gate.
    """

    def __init__(self, channels: int, reduction: int = 16):
        _check(channels, reduction)
        super().__init__()
        inner = max(channels // reduction, 1)
        self.channel = nn.Sequential(*_layers(channels, inner), *_layers(inner, channels))
        self.spatial = nn.Sequential(*_layers(1, 1, size=3, stride=2))
        self.scale = nn.Sequential(*_layers(1, 1))
        self.mix = nn.Sequential(*_layers(channels, channels))

    def gate(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Of each channel at each position, from 1/2 to 1."""
        coarse = self.spatial(x.mean(1, keepdim=True))
        by_position = self.scale(F.interpolate(coarse, size=x.shape[2:], mode="bilinear", align_corners=True))
        by_channel = self.channel(spatial_mean(x)[:, :, None, None])
        return self.mix(by_position * by_channel).sigmoid()

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return x * self.gate(x)


def _layers(given: int, made: int, *, size: int = 1, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(given, made, size, stride, padding=size // 2), nn.BatchNorm2d(made), nn.ReLU()]

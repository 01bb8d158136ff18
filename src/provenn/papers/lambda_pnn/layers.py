"""The residual attention of λ-PNN: a channel gate and a spatial gate, after CBAM (Woo et al., 2018)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole


class ChannelGate(nn.Module):
    """s · f with s = σ(M(mean f) + M(max f)), M = Linear(C → C/r), ReLU, Linear(C/r → C), shared by both pools.

    Args:
        channels: C.
        reduction: r; 4 in the paper, where CBAM has 16. C/r is cut off to a whole number, at least 1.

    Shapes: (batch, channels, height, width) to the same. Slot: channel-gate.

    Raises:
        ValueError: fewer than one channel, or a reduction below 1.
    """

    def __init__(self, channels: int, reduction: int = 4):
        check_whole(channels=channels, reduction=reduction)
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(f"channels and reduction must be at least 1, got {channels} and {reduction}")
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        logits = self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3)))
        return x * logits.sigmoid()[:, :, None, None]


class SpatialGate(nn.Module):
    """t · f with t = σ(conv7×7([max_c f, mean_c f])), reflected at the border, with a bias and no batch norm.

    Args:
        kernel_size: odd; 7 in the paper.

    Shapes: (batch, channels, height, width) to the same. Sides of at most `kernel_size // 2` pixels, which cannot be
    reflected, are continued by their border.

    Raises:
        ValueError: an even kernel.
    """

    def __init__(self, kernel_size: int = 7):
        check_whole(kernel_size=kernel_size)
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.conv = ReflectConv(2, 1, kernel_size, whole=True)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        pooled = torch.stack([x.amax(dim=1), x.mean(dim=1)], dim=1)
        return x * self.conv(pooled).sigmoid()


class ReflectConv(nn.Conv2d):
    """A convolution of stride 1 that keeps the size, reflected at the border.

    A side that is too short to be reflected is continued by its border.

    Args:
        channels, out_channels, kernel_size: as in `torch.nn.Conv2d`.
        whole: compute in the type of the weights under autocast too: for few outputs, whose gradients are sums over
            all pixels and overflow in float16.
    """

    def __init__(self, channels: int, out_channels: int, kernel_size: int, *, whole: bool = False):
        super().__init__(channels, out_channels, kernel_size)
        self.whole = whole

    def forward(self, input: Float[Tensor, "batch _ height width"]) -> Float[Tensor, "batch _ height width"]:
        reach = self.kernel_size[0] // 2
        mode = "reflect" if min(input.shape[-2:]) > reach else "replicate"
        kind = input.device.type
        if self.whole and kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return super().forward(nn.functional.pad(input.to(self.weight.dtype), (reach,) * 4, mode=mode))
        return super().forward(nn.functional.pad(input, (reach,) * 4, mode=mode))


class CBAM(nn.Module):
    """The channel gate, then the spatial gate; λ-PNN adds it to its input, y = CBAM(f) + f.

    Args:
        channels, reduction: of `ChannelGate`.
        kernel_size: of `SpatialGate`.

    Shapes: (batch, channels, height, width) to the same. Slot: channel-gate.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(self, channels: int, reduction: int = 4, kernel_size: int = 7):
        super().__init__()
        self.channel, self.spatial = ChannelGate(channels, reduction), SpatialGate(kernel_size)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return self.spatial(self.channel(x))


class Residual(nn.Module):
    """f + conv3×3(GELU(conv3×3(f))), without a norm.

    Args:
        channels: of the input and of the output.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(ReflectConv(channels, channels, 3), nn.GELU(), ReflectConv(channels, channels, 3))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return x + self.body(x)

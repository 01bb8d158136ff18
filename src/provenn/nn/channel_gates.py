"""Gates on the channels of a feature map: the slot `channel-gate`, and the baselines that papers measure against."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole

Gate = Callable[[int], nn.Module]
"""What a host asks for: given a number of channels, a module that keeps the shape of its input."""


def spatial_mean(x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels"]:
    """The mean of every channel; where it will be differentiated, as a sum over a count.

    The gradient of a sum is a view, that of `mean` a map as large as `x`: a training step writes and reads one less.
    Sums of half precision are taken in float32, where they cannot overflow.
    """
    space = tuple(range(2, x.ndim))
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.mean(dim=space)
    total = x.sum(dim=space, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / math.prod(x.shape[2:])).to(x.dtype)


class PooledGate(nn.Module, ABC):
    """Scale each channel by a gate computed from the mean of every channel.

    ω = σ(W(y)), y = mean over space of x, output = ω · x. A subclass says what W is, in `interact`.

    Args:
        channels: C, the number of feature maps.

    Shapes: (batch, channels, *space) to the same, with one or more axes of space. Slot: channel-gate.

    Raises:
        ValueError: when `channels` is below 1, or the input has no axis of space or another number of channels.
    """

    def __init__(self, channels: int):
        check_whole(channels=channels)
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        self.channels = channels

    @abstractmethod
    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        """The logits of the gate, W(y)."""

    def gate(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels"]:
        """The gate ω in (0, 1) that `forward` applies to each channel of `x`."""
        if x.ndim < 3 or x.shape[1] != self.channels:
            raise ValueError(f"expected (batch, {self.channels} channels, *space), got {tuple(x.shape)}")
        return self.interact(spatial_mean(x)).sigmoid()

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        return x * self.gate(x).view(*x.shape[:2], *[1] * (x.ndim - 2))


class SqueezeExcitation(PooledGate):
    """Gate the channels through a bottleneck of two linear layers.

    ω = σ(W₂ ReLU(W₁ y)), W₁: C → C/r, W₂: C/r → C   (Hu et al., 2018, arXiv:1709.01507, equation 3)

    Args:
        channels: C, the number of feature maps.
        reduction: r, how many times narrower the bottleneck is; it is never narrower than one channel.
        bias: whether the two layers have one. The released SENets do; the counts that papers print leave it out.

    Parameters: 2C²/r, and C + C/r more with biases. Slot: channel-gate.
    """

    def __init__(self, channels: int, reduction: int = 16, bias: bool = False):
        check_whole(channels=channels, reduction=reduction)
        super().__init__(channels)
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        hidden = max(channels // reduction, 1)
        self.squeeze = nn.Linear(channels, hidden, bias=bias)
        self.excite = nn.Linear(hidden, channels, bias=bias)

    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        return self.excite(self.squeeze(context).relu())


class CBAM(nn.Module):
    """Gate the channels by their mean and maximum, then the positions by the mean and maximum over channels.

    x' = σ(MLP(avg x) + MLP(max x)) · x,  x'' = σ(conv₇ₓ₇[avg x'; max x']) · x'   (Woo et al., 2018, arXiv:1807.06521,
    equations 1 to 3)

    Args:
        channels: C, the number of feature maps.
        reduction: r of the MLP, which both statistics share.
        kernel_size: side of the spatial convolution, odd.

    Shapes: (batch, channels, height, width) to the same. Parameters: 2C²/r + 2 · kernel_size². Slot: channel-gate.
    """

    def __init__(self, channels: int, reduction: int = 16, kernel_size: int = 7):
        check_whole(channels=channels, reduction=reduction, kernel_size=kernel_size)
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(f"channels and reduction must be at least 1, got {channels} and {reduction}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the map keeps its size, got {kernel_size}")
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False)
        )
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        by_channel = self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3)))
        x = x * by_channel.sigmoid()[:, :, None, None]
        by_position = self.conv(torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1))
        return x * by_position.sigmoid()


def record_gates(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gates, each (batch, channels), that every pooled gate inside a model applies when the model is given `x`.

    >>> sorted(record_gates(nn.Sequential(SqueezeExcitation(8)), torch.ones(1, 8, 4, 4)))
    ['0']
    """
    gates: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, args, _, name=name: gates.update({name: module.gate(args[0])}))
        for name, module in model.named_modules()
        if isinstance(module, PooledGate)
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return gates

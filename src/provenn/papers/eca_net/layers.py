"""The ECA module and the family it grew from (Wang et al., 2020, arXiv:1910.03151), section 3."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.channel_gates import PooledGate


class SEVar1(PooledGate):
    """Gate each channel by its own mean: ω = σ(y). No parameters (table 2)."""

    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        return context


class SEVar2(PooledGate):
    """Gate each channel by its own mean and its own weight: ω = σ(w ⊙ y). C parameters (table 2)."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weight = nn.Parameter(torch.empty(channels).uniform_(-1, 1))

    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        return self.weight * context


class SEVar3(PooledGate):
    """Gate each channel by the means of all: ω = σ(Wy). C² parameters (table 2)."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.linear = nn.Linear(channels, channels, bias=False)

    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        return self.linear(context)


class SEGroupConv(PooledGate):
    """Gate each channel by the means of its group: ω = σ(Wy) with W block-diagonal (SE-GC, table 2).

    Args:
        channels: C, the number of feature maps.
        groups: G, how many blocks W has; must divide C.

    Parameters: C²/G.
    """

    def __init__(self, channels: int, groups: int):
        check_whole(channels=channels, groups=groups)
        super().__init__(channels)
        if groups < 1 or channels % groups:
            raise ValueError(f"groups must divide the {channels} channels, got {groups}")
        self.conv = nn.Conv1d(channels, channels, 1, groups=groups, bias=False)

    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        return self.conv(context[:, :, None])[:, :, 0]


def adaptive_kernel_size(channels: int, gamma: float = 2.0, b: float = 1.0) -> int:
    """How many neighbours a channel interacts with: odd, and growing with log2 of the channels.

    k = ψ(C) = |log2(C)/γ + b/γ|_odd   (equation 12), where |t|_odd truncates t and goes up to the next odd number.

    Args:
        channels: C, at least 1.
        gamma: γ, how slowly k grows.
        b: offset of the logarithm.

    >>> [adaptive_kernel_size(c) for c in (64, 128, 256, 512, 2048)]
    [3, 5, 5, 5, 7]
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    if gamma == 0:
        raise ValueError("gamma must not be 0")
    size = int(abs((math.log2(channels) + b) / gamma))
    return size if size % 2 else size + 1


class EfficientChannelAttention(PooledGate):
    """Gate each channel by its neighbours, with no reduction of dimension: the ECA module.

    ω_i = σ(Σ_j w^j y_{i+j−(k+1)/2}), y = mean over space of x, output = ω · x   (equation 9). All channels share the k
    weights; beyond the first and the last channel stand zeros.

    Args:
        channels: C, the number of feature maps.
        kernel_size: k, how many neighbouring channels interact, odd; by default ψ(C), `adaptive_kernel_size(channels)`.
        scale: factor of the gate. 1 is the paper's. With 2 and a filter of zeros the module is the identity, which lets
            `add_eca` enter a trained network without changing its output.

    Shapes: (batch, channels, *space) to the same, with one or more axes of space. Parameters: k. Slot: channel-gate.

    Raises:
        ValueError: when `kernel_size` is even or below 1: an even filter has no centre and would shift the gates.

    >>> EfficientChannelAttention(256)(torch.ones(2, 256, 7, 7)).shape
    torch.Size([2, 256, 7, 7])
    """

    def __init__(self, channels: int, kernel_size: int | None = None, scale: float = 1.0):
        check_whole(channels=channels, kernel_size=kernel_size)
        check_finite(scale=scale)
        super().__init__(channels)
        k = adaptive_kernel_size(channels) if kernel_size is None else _odd(kernel_size)
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)
        self.scale = scale

    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        # The examples as the rows of one image, which the filter's height of 1 keeps apart: a processor convolves it
        # up to ten times as fast as a batch of signals with one channel. An image without rows is refused.
        batch, channels = context.shape
        if batch == 0:
            return self.conv(context[:, None])[:, 0]
        weight = self.conv.weight
        rows = context.view(1, 1, batch, channels)
        return F.conv2d(rows, weight.view(1, 1, 1, -1), padding=(0, weight.shape[2] // 2)).view(batch, channels)

    def gate(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels"]:
        """The gate that `forward` applies to each channel of `x`, in (0, scale)."""
        omega = super().gate(x)
        return omega if self.scale == 1 else self.scale * omega

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.conv.kernel_size[0]}"


class UnsharedChannelAttention(PooledGate):
    """Gate each channel by its neighbours through a filter of its own: ECA-NS.

    ω_i = σ(Σ_j w_i^j y_{i+j−(k+1)/2})   (equation 7)

    Args:
        channels: C, the number of feature maps.
        kernel_size: k, odd; by default ψ(C).

    Shapes: (batch, channels, *space) to the same. Parameters: k · C. Slot: channel-gate.
    """

    def __init__(self, channels: int, kernel_size: int | None = None):
        check_whole(channels=channels, kernel_size=kernel_size)
        super().__init__(channels)
        self.kernel_size = adaptive_kernel_size(channels) if kernel_size is None else _odd(kernel_size)
        self.conv = nn.Conv1d(channels, channels, self.kernel_size, groups=channels, bias=False)

    def interact(self, context: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch channels"]:
        half = self.kernel_size // 2
        windows = F.pad(context, (half, half)).unfold(1, self.kernel_size, 1)
        return self.conv(windows)[:, :, 0]


def _odd(kernel_size: int) -> int:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
    return kernel_size

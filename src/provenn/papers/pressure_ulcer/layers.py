"""Residual blocks and attention gates of the pressure ulcer network (Chae et al., 2021, arXiv:2101.09433), inferred.

Of the paper only the abstract could be read. Each block here is the usual public form of what the abstract names.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.nn.channel_gates import CBAM, SqueezeExcitation
from provenn.nn.segmentation import resize

ATTENTIONS = ("gate", "cbam", "se", "none")
SCALES = ("fine", "coarse")
NORMS = ("batch", "group")
GROUPS = 8  # of a group norm, where the channels divide by it


def make_norm(channels: int, norm: str = "batch") -> nn.Module:
    """A batch norm, or a group norm of eight groups for batches of few images.

    Raises:
        ValueError: another norm.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(GROUPS if channels % GROUPS == 0 else 1, channels)


def convolution(channels: int, out: int, kernel_size: int, norm: str = "batch", stride: int = 1) -> nn.Sequential:
    """A convolution without bias, Kaiming-normal, and a norm; with stride 1 the map keeps its size."""
    conv = nn.Conv2d(channels, out, kernel_size, stride, kernel_size // 2 if stride == 1 else 0, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, make_norm(out, norm))


class Block(nn.Module):
    """Two 3×3 convolutions, with a shortcut around them.

    u = ReLU(BN(conv(x))), v = A(BN(conv(u))), y = ReLU(v + s); s = x, or BN(conv1×1(x)) where the width changes

    Inferred: the abstract names a residual U-Net and no block. Without `residual` s = 0, the block of a plain U-Net.

    Args:
        channels: c, of the input.
        out: d, of the output; by default c.
        residual: with the shortcut.
        attention: A: "cbam" (Woo et al., 2018), "se" (Hu et al., 2018), each with a reduction of 16, or "none".
        norm: "batch" or "group".

    Shapes: (batch, c, height, width) to (batch, d, height, width). A shortcut of one width has no parameters. With the
    scale of the last norm at zero y = ReLU(s).

    Raises:
        ValueError: channels below 1, or an unknown attention or norm.
    """

    def __init__(
        self,
        channels: int,
        out: int | None = None,
        *,
        residual: bool = True,
        attention: str = "none",
        norm: str = "batch",
    ):
        check_whole(channels=channels, out=out)
        super().__init__()
        out = channels if out is None else out
        if channels < 1 or out < 1:
            raise ValueError(f"channels and out must be at least 1, got {channels} and {out}")
        if attention not in ("cbam", "se", "none"):
            raise ValueError(f"attention of a block must be 'cbam', 'se' or 'none', got {attention!r}")
        self.first = convolution(channels, out, 3, norm)
        self.second = convolution(out, out, 3, norm)
        kinds: dict[str, Callable[[int], nn.Module]] = {"cbam": CBAM, "se": SqueezeExcitation, "none": nn.Identity}
        self.attention = kinds[attention](out)
        self.residual = residual
        self.shortcut: nn.Module = nn.Identity()
        if residual and channels != out:
            self.shortcut = convolution(channels, out, 1, norm)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out height width"]:
        v = self.attention(self.second(self.first(x).relu()))
        return (v + self.shortcut(x)).relu() if self.residual else v.relu()


class AttentionGate(nn.Module):
    """An additive gate on the skip of a U-Net (Oktay et al., 2018, arXiv:1804.03999); its place here is inferred.

    α = σ(BN(ψᵀ ReLU(BN(W_g g) + BN(W_x x)))), x̂ = α · x

    One α a pixel, shared by the channels. All convolutions are 1×1 and have no bias, since a norm follows.

    Args:
        channels: F_l, of the skip x.
        gating: F_g, of the signal g from the decoder; by default F_l.
        hidden: F_int; by default half of F_l.
        scale: "fine": g has the size of x. "coarse": g has half of it, W_x is a 2×2 convolution of stride 2, and the
            logits of α are upsampled, as in the original.
        norm: "batch" or "group".

    Shapes: x (batch, F_l, height, width) and g to the size of x. Parameters at F_g = F_l = C, F_int = C/2 and scale
    "fine": C² + 2.5 C + 2.

    Raises:
        ValueError: sizes below 1, or an unknown scale or norm.
    """

    def __init__(
        self,
        channels: int,
        gating: int | None = None,
        hidden: int | None = None,
        *,
        scale: str = "fine",
        norm: str = "batch",
    ):
        check_whole(channels=channels, gating=gating, hidden=hidden)
        super().__init__()
        gating = channels if gating is None else gating
        hidden = max(1, channels // 2) if hidden is None else hidden
        if min(channels, gating, hidden) < 1:
            raise ValueError(f"channels, gating and hidden must be at least 1, got {channels}, {gating}, {hidden}")
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        step = 1 if scale == "fine" else 2
        self.of_signal = convolution(gating, hidden, 1, norm)
        self.of_skip = convolution(channels, hidden, step, norm, stride=step)
        self.score = convolution(hidden, 1, 1, norm)

    def gate(
        self, x: Float[Tensor, "batch channels height width"], g: Float[Tensor, "batch gating _ _"]
    ) -> Float[Tensor, "batch 1 height width"]:
        """The gate α of each pixel, in (0, 1)."""
        logits = self.score((self.of_signal(g) + self.of_skip(x)).relu())
        return (logits if logits.shape[2:] == x.shape[2:] else resize(logits, x.shape[2:])).sigmoid()

    def forward(
        self, x: Float[Tensor, "batch channels height width"], g: Float[Tensor, "batch gating _ _"]
    ) -> Float[Tensor, "batch channels height width"]:
        return x * self.gate(x, g)


class Rise(nn.Module):
    """One level up in the decoder: upsample, gate the skip, join, convolve.

    Upsampling is bilinear by 2, then conv3×3, a norm and ReLU.

    Args:
        channels: of the skip and of the result; what comes from below has twice as many.
        gated: with an attention gate on the skip.
        gate_scale: as `scale` of `AttentionGate`.
        residual, norm: as in `Block`.
    """

    def __init__(self, channels: int, *, gated: bool, gate_scale: str, residual: bool, norm: str):
        super().__init__()
        self.up = convolution(2 * channels, channels, 3, norm)
        self.coarse = gate_scale == "coarse"
        gating = 2 * channels if self.coarse else channels
        self.gate = AttentionGate(channels, gating, scale=gate_scale, norm=norm) if gated else None
        self.block = Block(2 * channels, channels, residual=residual, norm=norm)

    def forward(
        self, below: Float[Tensor, "batch twice h w"], skip: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        raised = self.raised(below, skip)
        if self.gate is not None:
            skip = self.gate(skip, below if self.coarse else raised)
        return self.block(torch.cat([skip, raised], dim=1))

    def raised(self, below: Tensor, skip: Tensor) -> Tensor:
        """What comes from below at the size of the skip."""
        return self.up(resize(below, skip.shape[2:])).relu()

    def attention(self, below: Tensor, skip: Tensor) -> Tensor | None:
        """The gate's α, where there is one."""
        if self.gate is None:
            return None
        return self.gate.gate(skip, below if self.coarse else self.raised(below, skip))

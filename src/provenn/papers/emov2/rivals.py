"""Blocks that the i2RMB is held against: RepViT's convolution and MobileViTV2's attention, in one frame.

The frame is EMOv2's: its stem, three stages of two blocks, its last norm and classifier. The first block of a stage
changes the shape. Only the blocks differ, and their sizes are such that all networks have as many parameters.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.narrowing import of_kind
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.channel_gates import SqueezeExcitation
from provenn.papers.emov2.model import EMOv2

Maps = Float[Tensor, "batch channels height width"]
Stage = Callable[[int, int, int, int], nn.Module]
"""Makes a stage of two blocks, given its index, the channels before and in it, and the stride of its first block."""

WIDTHS, STRIDES = (16, 32, 64), (1, 2, 2)  # of emov2_small two thirds
# For equal parameters; the published networks have a ratio of 2, and 2, 4 and 3 units.
EXPANSION = 2.1  # of RepViT's channel mixer
UNITS = (2, 3, 4)  # of MobileViTV2's attention, in each stage


def conv_norm(channels: int, out: int, kernel_size: int = 1, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias and its batch norm."""
    padding = kernel_size // 2
    conv = nn.Conv2d(channels, out, kernel_size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


# RepViT (Wang et al., 2023, arXiv:2307.09283), section 3; the structure is that of THU-MIG/RepViT, model/repvit.py.


class ParallelDepthwise(nn.Module):
    """BN(BN(dw3×3(x)) + dw1×1(x) + x): three branches that are one depth-wise 3×3 convolution in eval mode.

    Args:
        channels: C.

    Shapes: (batch, channels, height, width) to the same.
    """

    def __init__(self, channels: int):
        check_whole(channels=channels)
        super().__init__()
        self.conv = conv_norm(channels, channels, 3, groups=channels)
        self.point = nn.Conv2d(channels, channels, 1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Maps) -> Maps:
        return self.norm(self.conv(x) + self.point(x) + x)


class RepViTBlock(nn.Module):
    """RepViT's block: a token mixer of depth-wise convolutions, then a channel mixer.

        y = mixer(x),   output = y + BN(conv1×1(GELU(BN(conv1×1(y)))))

    Where the shape stays, the mixer is `ParallelDepthwise` and, with `gate`, squeeze-and-excitation. Where it changes,
    the mixer is BN(dw3×3), with the stride, and BN(conv1×1). The last batch norm starts at zero, as in the authors'
    code.

    Args:
        channels, out: of the input and the output.
        stride: of the depth-wise convolution.
        gate: whether a block that keeps the shape has squeeze-and-excitation; every second of a stage has.
        expansion: of the channel mixer; its width is rounded down.

    Shapes: (batch, channels, height, width) to (batch, out, ⌈height / stride⌉, ⌈width / stride⌉).
    """

    def __init__(self, channels: int, out: int, *, stride: int = 1, gate: bool = False, expansion: float | int = 2):
        check_whole(channels=channels, out=out, stride=stride)
        check_finite(expansion=expansion)
        super().__init__()
        hidden = int(expansion * out)
        if stride == 1 and channels == out:
            excitation = SqueezeExcitation(channels, reduction=4, bias=True) if gate else nn.Identity()
            self.tokens = nn.Sequential(ParallelDepthwise(channels), excitation)
        else:
            depthwise = conv_norm(channels, channels, 3, stride=stride, groups=channels)
            self.tokens = nn.Sequential(depthwise, conv_norm(channels, out))
        shrink = conv_norm(hidden, out)
        nn.init.zeros_(of_kind(shrink[1], nn.BatchNorm2d, "norm").weight)
        self.channels = nn.Sequential(conv_norm(out, hidden), nn.GELU(), shrink)

    def forward(self, x: Maps) -> Float[Tensor, "batch out height2 width2"]:
        y = self.tokens(x)
        return y + self.channels(y)


def repvit_stage(index: int, channels: int, width: int, stride: int) -> nn.Sequential:
    """A block that changes the shape and one that keeps it; the first of these has the gate, as in every stage."""
    blocks = (
        RepViTBlock(channels, width, stride=stride, expansion=EXPANSION),
        RepViTBlock(width, width, gate=True, expansion=EXPANSION),
    )
    return nn.Sequential(*blocks)


# MobileViTV2 (Mehta and Rastegari, 2022, arXiv:2206.02680), section 3; the structure is that of apple/ml-cvnets.

Patches = Float[Tensor, "batch channels pixels patches"]


class SeparableAttention(nn.Module):
    """MobileViTV2's separable self-attention, linear in the patches.

        c = Σ_n softmax_n(W_I x)_n · (W_K x)_n,   output = W_O (ReLU(W_V x) · c)

    The softmax runs over the patches n, for each of a patch's pixels by itself; its score is one number.

    Args:
        channels: C.

    Shapes: (batch, channels, pixels of a patch, patches) to the same.
    """

    def __init__(self, channels: int):
        check_whole(channels=channels)
        super().__init__()
        self.sizes = (1, channels, channels)
        self.qkv = nn.Conv2d(channels, sum(self.sizes), 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Patches) -> Patches:
        score, key, value = self.qkv(x).split(self.sizes, dim=1)
        context = (key * score.softmax(dim=-1)).sum(dim=-1, keepdim=True)
        return self.out(value.relu() * context)


class AttentionUnit(nn.Module):
    """x ← x + attention(norm(x)), x ← x + conv1×1(SiLU(conv1×1(norm(x)))); the norm is over channels and cells.

    Args:
        channels: C.
        expansion: of the feed-forward part.

    Shapes: (batch, channels, pixels of a patch, patches) to the same.
    """

    def __init__(self, channels: int, expansion: int = 2):
        check_whole(channels=channels, expansion=expansion)
        super().__init__()
        self.attention = nn.Sequential(nn.GroupNorm(1, channels), SeparableAttention(channels))
        self.feed_forward = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.Conv2d(channels, expansion * channels, 1),
            nn.SiLU(),
            nn.Conv2d(expansion * channels, channels, 1),
        )

    def forward(self, x: Patches) -> Patches:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class MobileViTV2Block(nn.Module):
    """MobileViTV2's block: a depth-wise 3×3 convolution, attention between patches of half the width, a projection.

    Args:
        channels: C; attention has half as many.
        units: of attention, one after the other.
        patch: side of a patch, in cells.

    Shapes: (batch, channels, height, width) to the same; both sides are multiples of `patch`.
    """

    def __init__(self, channels: int, units: int, *, patch: int = 2):
        check_whole(channels=channels, units=units, patch=patch)
        super().__init__()
        width = channels // 2
        self.patch = patch
        local = conv_norm(channels, channels, 3, groups=channels)
        self.local = nn.Sequential(local, nn.SiLU(), nn.Conv2d(channels, width, 1, bias=False))
        self.units = nn.Sequential(*(AttentionUnit(width) for _ in range(units)), nn.GroupNorm(1, width))
        self.project = conv_norm(width, channels)

    def forward(self, x: Maps) -> Maps:
        size = (x.shape[-2], x.shape[-1])
        if size[0] % self.patch or size[1] % self.patch:
            raise ValueError(f"height and width must be multiples of {self.patch}, got {size[0]}×{size[1]}")
        y = self.local(x)
        # Pixels of a patch side by side, and the patches behind one another: attention is between the patches.
        cut = F.unfold(y, self.patch, stride=self.patch).unflatten(1, (y.shape[1], -1))
        return self.project(F.fold(self.units(cut).flatten(1, 2), size, self.patch, stride=self.patch))


def mobilevit_stage(index: int, channels: int, width: int, stride: int) -> nn.Sequential:
    """MobileNetV2's block with SiLU, of ratio 2, and MobileViTV2's: stages 3 to 5 of the published network."""
    hidden = 2 * channels
    shape = nn.Sequential(
        *(conv_norm(channels, hidden), nn.SiLU()),
        *(conv_norm(hidden, hidden, 3, stride=stride, groups=hidden), nn.SiLU()),
        conv_norm(hidden, width),
    )
    return nn.Sequential(shape, MobileViTV2Block(width, UNITS[index]))


def framed(stage: Stage | None, *, num_classes: int = 10, in_channels: int = 1) -> EMOv2:
    """EMOv2 of two thirds of `emov2_small`'s widths; with `stage`, those stages in place of its own.

    Stem, strides, the last norm and the classifier stay. Shrunk against the published networks are depth (two blocks
    a stage, three stages) and width. Weights start as torch starts them, and γ of the i2RMB at 1.

    Args:
        stage: `repvit_stage`, `mobilevit_stage`, or None for the i2RMB with spanning attention.
        num_classes, in_channels: as in `EMOv2`.

    Shapes: (batch, in_channels, height, width), multiples of 8, to (batch, num_classes).
    """
    network = EMOv2(
        depths=(2, 2, 2),
        widths=WIDTHS,
        exp_ratios=(2, 2, 2),
        head_dims=(8, 8, 16),
        modes=("spanning",) * 3,
        kernel_sizes=(3, 3, 3),
        norms=("layer",) * 3,
        strides=STRIDES,
        stem_stride=1,
        window=4,
        layer_scale=1.0,
        num_classes=num_classes,
        in_channels=in_channels,
    )
    if stage is not None:
        before = (WIDTHS[0] // 2, *WIDTHS)
        stages = [stage(i, before[i], width, stride) for i, (width, stride) in enumerate(zip(WIDTHS, STRIDES))]
        network.stages = nn.ModuleList(stages)
    return network

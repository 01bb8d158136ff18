"""Networks that the paper compares with: U-Net, Attention U-Net and DANet, at any width."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.nn.padding import mirror_pad
from provenn.nn.segmentation import resize
from provenn.papers.ms_guided_attention.layers import ChannelAttention, PositionAttention
from provenn.papers.ms_guided_attention.model import BACKBONES, cross_entropy, make_backbone


class UNet(nn.Module):
    """U-Net (Ronneberger et al., 2015, arXiv:1505.04597) with padded convolutions.

    Without norms, at a width of 64 and five levels, it has the 31,030,853 parameters of the paper's Table VIII.
    With `gated` it is Attention U-Net (Oktay et al., 2018, arXiv:1804.03999) in its common public form, norms and
    upsampling by convolution included: 34,877,681.

    Args:
        num_classes, in_channels: as of the image.
        width: channels of the finest level.
        depth: levels.
        norm: batch norms after the convolutions.
        gated: an attention gate on every skip.
        skips: how many skips there are, counted from the finest; all by default.
        dice: weight of soft Dice beside cross-entropy in training.

    Raises:
        ValueError: a number out of its bounds.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes, height, width), of any size.
    """

    def __init__(
        self,
        num_classes: int = 5,
        in_channels: int = 1,
        *,
        width: int = 64,
        depth: int = 5,
        norm: bool = False,
        gated: bool = False,
        skips: int | None = None,
        dice: float = 0.0,
    ):
        check_whole(num_classes=num_classes, in_channels=in_channels, width=width, depth=depth)
        if min(num_classes, in_channels, width) < 1:
            raise ValueError(
                f"num_classes, in_channels and width must be at least 1, got {num_classes}, {in_channels} and {width}"
            )
        if not 2 <= depth <= 8:
            raise ValueError(f"depth must be from 2 to 8, got {depth}")
        if skips is not None and not 0 <= skips < depth:
            raise ValueError(f"skips must be from 0 to {depth - 1}, one less than depth, got {skips}")
        if not (math.isfinite(dice) and dice >= 0):
            raise ValueError(f"dice must be a finite number, not negative, got {dice}")
        super().__init__()
        norm, self.dice, self.multiple = norm or gated, dice, 2 ** (depth - 1)
        self.skips = depth - 1 if skips is None else skips
        widths = [width * 2**level for level in range(depth)]
        ins = [in_channels, *widths[:-1]]
        self.encoder = nn.ModuleList(_twice(a, b, norm) for a, b in zip(ins, widths))
        self.up = nn.ModuleList(
            _upsampled(2 * c, c) if gated else nn.ConvTranspose2d(2 * c, c, 2, stride=2) for c in widths[:-1]
        )
        self.gates = nn.ModuleList(_Gate(c) for c in widths[:-1] if gated)
        self.decoder = nn.ModuleList(
            _twice(2 * c if level < self.skips else c, c, norm) for level, c in enumerate(widths[:-1])
        )
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes height width"]:
        return self.decoded(self.encoded(x), x.shape[2:])

    def encoded(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The map of each level, from fine to coarse."""
        bottom, right = (((side - 1) // self.multiple + 1) * self.multiple - side for side in x.shape[2:])
        x, levels = mirror_pad(x, bottom, right), []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else nn.functional.max_pool2d(x, 2))
            levels.append(x)
        return levels

    def decoded(self, levels: list[Tensor], size: Any) -> Float[Tensor, "batch classes height width"]:
        """The logits from the map of each level."""
        x = levels[-1]
        for level in reversed(range(len(self.up))):
            x = self.up[level](x)
            if level < self.skips:
                skip = self.gates[level](x, levels[level]) if len(self.gates) else levels[level]
                x = torch.cat([skip, x], 1)
            x = self.decoder[level](x)
        return self.head(x)[..., : size[0], : size[1]]


def _twice(channels: int, out: int, norm: bool) -> nn.Sequential:
    parts: list[nn.Module] = []
    for before in (channels, out):
        parts += [nn.Conv2d(before, out, 3, padding=1), *([nn.BatchNorm2d(out)] if norm else []), nn.ReLU()]
    return nn.Sequential(*parts)


def _upsampled(channels: int, out: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, 3, padding=1)
    return nn.Sequential(nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(out), nn.ReLU())


class _Gate(nn.Module):
    """α = σ(BN(ψ(ReLU(BN(W_g g) + BN(W_x x))))), with half as many channels inside; α · x."""

    def __init__(self, channels: int):
        super().__init__()
        inner = max(1, channels // 2)
        self.signal = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner))
        self.skip = nn.Sequential(nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner))
        self.score = nn.Sequential(nn.Conv2d(inner, 1, 1), nn.BatchNorm2d(1))

    def forward(self, signal: Tensor, skip: Tensor) -> Tensor:
        return skip * self.score((self.signal(signal) + self.skip(skip)).relu()).sigmoid()


class DualAttention(nn.Module):
    """DANet (Fu et al., 2019, arXiv:1809.02983): position and channel attention after a dilated trunk.

    The last two stages keep the size of the second, with dilations of 2 and 4. Its channel attention takes the maximum
    less the energy, as its authors' code does. Three predictions are supervised: of the sum of both branches, and of
    each. With a trunk of 101 layers it has 66,426,961 parameters. The 68,475,961 of the paper's Table VIII are these
    and the 2,049,000 of a classifier for ImageNet, which nothing uses.

    Args:
        num_classes, in_channels, backbone: as in `GuidedAttentionNet`.
        dim: channels of the two attention branches; a quarter of the trunk's by default.
        dropout: share of channels that are left out before a prediction in training.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes, height, width), of any size.
    """

    def __init__(
        self,
        num_classes: int = 5,
        in_channels: int = 1,
        *,
        backbone: str = "resnet101",
        dim: int | None = None,
        dropout: float = 0.1,
    ):
        check_whole(num_classes=num_classes, in_channels=in_channels)
        if min(num_classes, in_channels, 1 if dim is None else dim) < 1:
            raise ValueError(
                f"num_classes, in_channels and dim must be at least 1, got {num_classes}, {in_channels} and {dim}"
            )
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        super().__init__()
        self.trunk = make_backbone(backbone, in_channels)
        for stage, dilation in (("layer3", 2), ("layer4", 4)):
            for part in self.trunk.get_submodule(stage).modules():
                if isinstance(part, nn.Conv2d):
                    part.stride = (1, 1)
                    if part.kernel_size == (3, 3):
                        part.dilation = part.padding = (dilation, dilation)
        self.multiple = self.trunk.strides[1]
        width = self.trunk.widths[-1]
        dim = max(1, width // 4) if dim is None else dim
        branches = (PositionAttention(dim), ChannelAttention(dim, cam="max_minus"))
        self.branches = nn.ModuleList(
            nn.Sequential(_conv_bn_relu(width, dim), attention, _conv_bn_relu(dim, dim)) for attention in branches
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(dim, num_classes, 1)) for _ in range(3)
        )

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes height width"]:
        return self._logits(x, heads=1)[0]

    def training_loss(self, batch: Any) -> Float[Tensor, ""]:
        """The sum of the cross-entropies of the three predictions."""
        images, masks = batch
        return torch.stack([cross_entropy(logits, masks.long()) for logits in self._logits(images, heads=3)]).sum()

    def _logits(self, x: Tensor, heads: int) -> list[Tensor]:
        height, width = x.shape[2:]
        bottom, right = (((side - 1) // self.multiple + 1) * self.multiple - side for side in x.shape[2:])
        padded = mirror_pad(x, bottom, right)
        last = self.trunk.features(padded)[-1]
        position, channel = (branch(last) for branch in self.branches)
        seen = (position + channel, position, channel)[:heads]
        logits = [head(part) for head, part in zip(self.heads, seen)]
        return [resize(part, padded.shape[2:])[..., :height, :width] for part in logits]


def _conv_bn_relu(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())

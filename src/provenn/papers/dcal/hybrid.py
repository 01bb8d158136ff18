"""The hybrid stem of R50-ViT (Dosovitskiy et al., 2021, arXiv:2010.11929): a ResNet makes the map of tokens."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.vit import ViT

DEPTHS, WIDTHS = (3, 4, 9), (64, 128, 256)  # ResNet-50 whose fourth stage has moved into the third: stride 16
EXPANSION = 4
GROUPS = 32  # of the group norms
PATCH = 16


class StandardisedConv(nn.Conv2d):
    """A convolution whose filters have a mean of 0 and a variance of 1, with TensorFlow's padding "same", no bias.

    y = x ∗ (W − mean W) / √(var W + ε), mean and variance over each filter, ε = 1e-8

    Shapes: (batch, channels, height, width), sides that `stride` divides, to (batch, out, height / stride, …).
    """

    def __init__(self, channels: int, out: int, side: int, stride: int = 1):
        super().__init__(channels, out, side, stride, bias=False)
        missing = max(side - stride, 0)
        self.margins = (missing // 2, missing - missing // 2) * 2
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        return F.conv2d(F.pad(x, self.margins), (self.weight - mean) * (variance + 1e-8).rsqrt(), stride=self.stride)


class NormedConv(nn.Module):
    """A standardised convolution and a group norm: a shortcut that changes the shape."""

    def __init__(self, channels: int, out: int, side: int, stride: int):
        super().__init__()
        self.conv, self.norm = StandardisedConv(channels, out, side, stride), nn.GroupNorm(GROUPS, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class HybridBottleneck(nn.Module):
    """y = ReLU(shortcut(x) + GN(conv1×1(ReLU(GN(conv3×3(ReLU(GN(conv1×1(x))))))))), with the stride in the 3×3."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        out = EXPANSION * width
        self.conv1, self.norm1 = StandardisedConv(channels, width, 1), nn.GroupNorm(GROUPS, width)
        self.conv2, self.norm2 = StandardisedConv(width, width, 3, stride), nn.GroupNorm(GROUPS, width)
        self.conv3, self.norm3 = StandardisedConv(width, out, 1), nn.GroupNorm(GROUPS, out)
        self.downsample = nn.Identity() if channels == out else NormedConv(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm1(self.conv1(x)).relu()
        branch = self.norm2(self.conv2(branch)).relu()
        return (self.norm3(self.conv3(branch)) + self.downsample(x)).relu()


class Stage(nn.Module):
    """Bottlenecks of one width, the first of which may halve the resolution."""

    def __init__(self, channels: int, width: int, depth: int, stride: int):
        super().__init__()
        blocks = [HybridBottleneck(channels, width, stride)]
        blocks += [HybridBottleneck(EXPANSION * width, width, 1) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ResNetStem(nn.Module):
    """ResNet-50 up to a stride of 16, in stages of 3, 4 and 9 bottlenecks, under timm's parameter names.

    Shapes: (batch, in_channels, height, width), multiples of 16, to (batch, 1024, height / 16, width / 16).
    Parameters: 11,894,848 of colour images.
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.stem = NormedConv(in_channels, WIDTHS[0], 7, 2)
        inputs = (WIDTHS[0], *(EXPANSION * width for width in WIDTHS))
        self.stages = nn.Sequential(
            *(
                Stage(channels, width, depth, 1 if number == 0 else 2)
                for number, (channels, width, depth) in enumerate(zip(inputs, WIDTHS, DEPTHS))
            )
        )

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch maps rows columns"]:
        # Values are not negative here, so a margin of zeros is none to a maximum.
        return self.stages(F.max_pool2d(F.pad(self.stem(x).relu(), (0, 1, 0, 1)), 3, 2))


class HybridEmbed(nn.Module):
    """Cells of a ResNet's map to tokens by one linear map, as a convolution under timm's name."""

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        self.backbone = ResNetStem(in_channels)
        self.proj = nn.Conv2d(EXPANSION * WIDTHS[-1], dim, 1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim rows columns"]:
        return self.proj(self.backbone(x))


class R50ViT(ViT):
    """A vision transformer whose patches of 16×16 are cells of a ResNet's map: R50+ViT-B/16 of the ViT paper.

    The ResNet has group norms and standardised filters. Images of other sides are filled with zeros, as in `ViT`.

    Args:
        patch: must be 16, the stride of the ResNet.
        options: as of `ViT`, without `stem`.

    Raises:
        ValueError: another patch, or what `ViT` refuses.
    """

    def __init__(self, *, patch: int = PATCH, **options: Any):
        if patch != PATCH:
            raise ValueError(f"patch must be {PATCH} with the ResNet's stem, got {patch}")
        super().__init__(patch=patch, **options)
        self.patch_embed = HybridEmbed(self.in_channels, self.dim)  # type: ignore[assignment]  # a third stem

"""The backbones: DenseNet and ConvNeXt as they were published, and a small network of convolutions."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.backbone import crop_features, pad_to_multiple
from provenn.nn.vit import ViT


class DenseLayer(nn.Module):
    """conv3×3(ReLU(BN(conv1×1(ReLU(BN(x)))))), of all maps before it."""

    def __init__(self, channels: int, growth: int, expansion: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, expansion * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(expansion * growth)
        self.conv2 = nn.Conv2d(expansion * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


class DenseBlock(nn.Module):
    """Layers whose outputs all later ones see: [x, f₁(x), f₂([x, f₁]), …]."""

    def __init__(self, layers: int, channels: int, growth: int, expansion: int):
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth, expansion))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat([x, layer(x)], 1)
        return x


class Transition(nn.Module):
    """Half the channels, and half the resolution."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(self.norm(x).relu()), 2)


class DenseNet(nn.Module):
    """A densely connected network (Huang et al., 2017, arXiv:1608.06993), under torchvision's parameter names.

    Args:
        blocks: layers of each block.
        growth: maps that a layer adds.
        stem: maps of the first convolution.
        num_classes: logits; 0 leaves the classifier out.
        in_channels: of the image.
        expansion: width of a layer's bottleneck, over `growth`.
        small: a first convolution of 3×3 at full resolution and no pooling, for images of 8 to 64 pixels.

    Shapes: (batch, in_channels, height, width), at least 32×32 of four blocks, or 4×4 of three and `small`, to
    (batch, num_classes), or without classes to the mean of the last map. `dim` is the width of that.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (6, 12, 24, 16),
        *,
        growth: int = 32,
        stem: int = 64,
        num_classes: int = 1000,
        in_channels: int = 3,
        expansion: int = 4,
        small: bool = False,
    ):
        sizes = {"growth": growth, "stem": stem, "in_channels": in_channels, "expansion": expansion}
        check_whole(num_classes=num_classes, **sizes)
        if not blocks or min(*blocks, *sizes.values()) < 1 or num_classes < 0:
            raise ValueError(
                f"sizes must be at least 1 and num_classes at least 0, got {blocks}, {sizes}, {num_classes}"
            )
        super().__init__()
        self.least = 2 ** (len(blocks) - 1 if small else len(blocks) + 1)
        side, stride = (3, 1) if small else (7, 2)
        parts: dict[str, nn.Module] = {
            "conv0": nn.Conv2d(in_channels, stem, side, stride, padding=side // 2, bias=False),
            "norm0": nn.BatchNorm2d(stem),
            "relu0": nn.ReLU(),
        }
        if not small:
            parts["pool0"] = nn.MaxPool2d(3, stride=2, padding=1)
        channels = stem
        for i, layers in enumerate(blocks, 1):
            parts[f"denseblock{i}"] = DenseBlock(layers, channels, growth, expansion)
            channels += layers * growth
            if i < len(blocks):
                parts[f"transition{i}"] = Transition(channels, channels // 2)
                channels //= 2
        parts["norm5"] = nn.BatchNorm2d(channels)
        self.dim = channels
        self.features = nn.Sequential()
        for name, part in parts.items():
            self.features.add_module(name, part)
        self.classifier = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        if min(x.shape[2:]) < self.least:
            raise ValueError(f"expected images of at least {self.least}×{self.least} pixels, got {tuple(x.shape)}")
        return self.classifier(self.features(x).relu().mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    """x + γ · W₂ GELU(W₁ LN(dwconv7×7(x))), channels last inside."""

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma, self.drop = nn.Parameter(torch.full((dim,), 1e-6)), nn.Dropout(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).permute(0, 3, 1, 2)
        return x + y * self.drop(y.new_ones(y.shape[0], 1, 1, 1))


class MapNorm(nn.LayerNorm):
    """A layer norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A ConvNeXt (Liu et al., 2022, arXiv:2201.03545), under the authors' parameter names.

    Args:
        depths, dims: blocks and channels of each stage.
        num_classes: logits; 0 leaves the classifier out.
        in_channels: of the image.
        patch: side and stride of the stem.
        drop_path: of the last block, rising linearly from 0.

    Shapes: (batch, in_channels, height, width), any sides, to (batch, num_classes). It is a
    `provenn.nn.backbone.Backbone`.

    Raises:
        ValueError: stages that do not fit each other, or sizes below 1.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        patch: int = 4,
        drop_path: float | int = 0.0,
    ):
        check_whole(num_classes=num_classes, in_channels=in_channels, patch=patch)
        check_finite(drop_path=drop_path)
        if not len(depths) == len(dims) >= 1 or min(*depths, *dims, in_channels, patch) < 1 or num_classes < 0:
            raise ValueError(f"depths and dims must name the same stages, got {depths}, {dims}, {num_classes}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        super().__init__()
        self.in_channels = in_channels
        self.widths, self.strides = list(dims), [patch << i for i in range(len(dims))]
        stem = nn.Sequential(nn.Conv2d(in_channels, dims[0], patch, patch), MapNorm(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in pairwise(dims):
            down = nn.Sequential(MapNorm(before, eps=1e-6), nn.Conv2d(before, after, 2, 2))
            self.downsample_layers.append(down)
        rates = [drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(dim, rates.pop(0)) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The map of each stage, from fine to coarse."""
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected images of {self.in_channels} channels, got {x.shape[1]}")
        size, maps = (x.shape[2], x.shape[3]), []
        x = pad_to_multiple(x, self.strides[-1])
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
            maps.append(x)
        return crop_features(maps, self.strides, size)

    def embed(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """What the classifier is given: the mean of the last map, normalised."""
        return self.norm(self.features(x)[-1].mean((2, 3)))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.head(self.embed(x))


DENSENETS: dict[int, dict[str, Any]] = {
    121: {"blocks": (6, 12, 24, 16)},
    169: {"blocks": (6, 12, 32, 32)},
    201: {"blocks": (6, 12, 48, 32)},
}
CONVNEXTS: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
}


def densenet(layers: int, **options: Any) -> DenseNet:
    """DenseNet-121, -169 or -201: 7,978,856, 14,149,480 and 20,013,928 parameters."""
    return DenseNet(**{**DENSENETS[layers], **options})


def convnext(size: str, **options: Any) -> ConvNeXt:
    """ConvNeXt "tiny" or "base": 28,589,128 and 88,591,464 parameters."""
    return ConvNeXt(**{**CONVNEXTS[size], **options})


def vit_b16(image_size: int = 224, **options: Any) -> ViT:
    """ViT-B/16 for square images: 86,567,656 parameters."""
    return ViT(dim=768, depth=12, heads=12, patch=16, image=(image_size, image_size), **options)


class SmallCNN(nn.Module):
    """Convolutions of 3×3 with batch norm, ReLU and a pooling of 2 each, 2×2 means of what is left, and a linear layer.

    It keeps where in an image things are, which a mean over the map would not.

    Args:
        widths: channels of each convolution; the last is the width of the features, too.
        in_channels: of the image.

    Shapes: (batch, in_channels, height, width), at least 8×8 for three convolutions, to (batch, widths[-1]).

    Raises:
        ValueError: sizes below 1, or an image that is smaller.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128), *, in_channels: int = 3):
        check_whole(in_channels=in_channels)
        if not widths or min(*widths, in_channels) < 1:
            raise ValueError(f"widths and in_channels must be at least 1, got {widths} and {in_channels}")
        super().__init__()
        self.dim, self.least = widths[-1], 2 ** len(widths)
        parts: list[nn.Module] = []
        for before, after in zip((in_channels, *widths), widths):
            conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
            parts += [conv, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.stages = nn.Sequential(*parts)
        self.project = nn.Linear(4 * self.dim, self.dim)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        if min(x.shape[2:]) < self.least:
            raise ValueError(f"expected images of at least {self.least}×{self.least} pixels, got {tuple(x.shape)}")
        return self.project(F.adaptive_avg_pool2d(self.stages(x), 2).flatten(1))

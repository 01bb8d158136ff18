"""Segmentation heads: from a backbone's maps to logits of every class at every pixel."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.backbone import Backbone, FeaturePyramid


def resize(x: Float[Tensor, "batch channels _ _"], size: Sequence[int]) -> Float[Tensor, "batch channels _ _"]:
    """Bilinear interpolation to (height, width), corners not aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def full_logits(model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "..."]:
    """A segmentation model's logits in the size of the images: bilinear, corners aligned where the model says so.

    A model that was trained with aligned corners says `align_corners = True`.
    """
    aligned = bool(getattr(model, "align_corners", False))
    return F.interpolate(model(images), size=images.shape[-2:], mode="bilinear", align_corners=aligned)


def conv_bn_relu(channels: int, out: int, kernel_size: int = 1, dilation: int = 1) -> nn.Sequential:
    """ReLU(BN(conv(x))), the map's size kept."""
    padding = dilation * (kernel_size // 2)
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel_size, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


class SemanticFPNHead(nn.Module):
    """Panoptic FPN's semantic branch (Kirillov et al., 2019, arXiv:1901.02446, section 3.1).

    Each level of a feature pyramid is convolved 3×3 and doubled until it is as fine as the finest; the levels are
    summed.

    Args:
        widths, strides: of the backbone's maps, from fine to coarse.
        num_classes: logits a pixel.
        dim: channels of the pyramid; the branches have half as many.
        dropout: before the last map.

    Shapes: maps (batch, widths[i], h_i, w_i) to (batch, num_classes, h_0, w_0).
    """

    def __init__(
        self, widths: Sequence[int], strides: Sequence[int], num_classes: int, *, dim: int = 256, dropout: float = 0.1
    ):
        super().__init__()
        self.pyramid = FeaturePyramid(widths, strides, dim)
        branch = max(1, dim // 2)
        self.branches = nn.ModuleList()
        for stride in strides:
            doublings = (stride // strides[0]).bit_length() - 1
            self.branches.append(
                nn.ModuleList(conv_bn_relu(branch if k else dim, branch, 3) for k in range(max(1, doublings)))
            )
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(branch, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "batch classes height width"]:
        levels = self.pyramid(maps)
        sizes = [level.shape[-2:] for level in levels]
        total = next(self.branches[0].children())(levels[0])
        for i in range(1, len(levels)):
            x = levels[i]
            for k, convolve in enumerate(self.branches[i].children()):
                x = resize(convolve(x), sizes[max(0, i - k - 1)])
            total = total + resize(x, sizes[0])
        return self.classify(self.dropout(total))


class SegFormerHead(nn.Module):
    """SegFormer's head of linear maps (Xie et al., 2021, arXiv:2105.15203, equation 4).

    Every map goes to `dim` channels and to the finest size; all of them together through one more map.

    Args, shapes: as in `SemanticFPNHead`.
    """

    def __init__(
        self, widths: Sequence[int], strides: Sequence[int], num_classes: int, *, dim: int = 256, dropout: float = 0.1
    ):
        super().__init__()
        self.maps = nn.ModuleList(conv_bn_relu(width, dim) for width in widths)
        self.fuse = conv_bn_relu(dim * len(widths), dim)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "batch classes height width"]:
        size = maps[0].shape[-2:]
        joined = torch.cat([resize(convolve(x), size) for convolve, x in zip(self.maps, maps, strict=True)], dim=1)
        return self.classify(self.dropout(self.fuse(joined)))


class DeepLabV3Head(nn.Module):
    """Atrous spatial pyramid pooling of the coarsest map (Chen et al., 2017, arXiv:1706.05587, section 3.3).

    Args: as in `SemanticFPNHead`; `dilations` of the three 3×3 convolutions.

    Shapes: maps to (batch, num_classes, h, w) of the last one.
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        dim: int = 256,
        dropout: float = 0.1,
        dilations: Sequence[int] = (12, 24, 36),
    ):
        super().__init__()
        self.whole = conv_bn_relu(widths[-1], dim)
        self.branches = nn.ModuleList(
            [conv_bn_relu(widths[-1], dim), *(conv_bn_relu(widths[-1], dim, 3, dilation) for dilation in dilations)]
        )
        self.fuse = conv_bn_relu(dim * (len(dilations) + 2), dim, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "batch classes height width"]:
        x = maps[-1]
        whole = self.whole(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        joined = torch.cat([whole, *(branch(x) for branch in self.branches)], dim=1)
        return self.classify(self.dropout(self.fuse(joined)))


class PSPHead(nn.Module):
    """Pyramid pooling of the coarsest map (Zhao et al., 2017, arXiv:1612.01105, section 3.2).

    Args: as in `SemanticFPNHead`; `pools` sides of the pooled maps.

    Shapes: maps to (batch, num_classes, h, w) of the last one.
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        dim: int = 512,
        dropout: float = 0.1,
        pools: Sequence[int] = (1, 2, 3, 6),
    ):
        super().__init__()
        self.pools = tuple(pools)
        self.maps = nn.ModuleList(conv_bn_relu(widths[-1], dim) for _ in pools)
        self.fuse = conv_bn_relu(widths[-1] + dim * len(pools), dim, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "batch classes height width"]:
        x = maps[-1]
        pooled = [
            resize(convolve(F.adaptive_avg_pool2d(x, side)), x.shape[2:])
            for side, convolve in zip(self.pools, self.maps, strict=True)
        ]
        return self.classify(self.dropout(self.fuse(torch.cat([x, *pooled], dim=1))))


HEADS: dict[str, Callable[..., nn.Module]] = {
    "semantic_fpn": SemanticFPNHead,
    "segformer": SegFormerHead,
    "deeplabv3": DeepLabV3Head,
    "pspnet": PSPHead,
}


class Segmenter(nn.Module):
    """A backbone and a segmentation head.

    Args:
        backbone: gives its pyramid; see `provenn.nn.backbone.Backbone`.
        num_classes: logits a pixel.
        head: "semantic_fpn", "segformer", "deeplabv3" or "pspnet".
        options: of the head, such as `dim`.

    Attributes:
        strides: of the backbone's maps.

    Shapes: images (batch, channels, height, width) to logits (batch, num_classes, h, w), of the finest map's size
    (of the coarsest one's for the last two heads).
    """

    def __init__(self, backbone: nn.Module, num_classes: int, head: str = "semantic_fpn", **options: int | float):
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise ValueError(f"{type(backbone).__name__} gives no pyramid: a backbone has features, strides and widths")
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.backbone, self.strides = backbone, list(backbone.strides)
        self.head = HEADS[head](backbone.widths, backbone.strides, num_classes, **options)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes _ _"]:
        return self.head(self.backbone.features(x))

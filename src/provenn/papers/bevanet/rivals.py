"""What BEVANet is held against as whole networks: PIDNet and DDRNet, for any width and depth.

All three share the stem, basic blocks and bottlenecks, pyramid pooling and heads; PIDNet's losses are BEVANet's. What
is theirs alone is how the branches are made and how they meet.
"""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_whole
from provenn.nn.segmentation import resize
from provenn.papers.bevanet.fusion import PAG
from provenn.papers.bevanet.losses import IGNORED, boundaries, boundary_loss, hard_pixel_loss
from provenn.papers.bevanet.model import (
    AUXILIARY,
    BOUNDARY,
    CONFIDENT,
    BasicBlock,
    Bottleneck,
    Image,
    SegmentationHead,
    TrainingLogits,
    _stack,
)
from provenn.papers.bevanet.pooling import DAPPM, PAPPM

Maps = Float[Tensor, "batch channels height width"]
Logits = Float[Tensor, "batch classes _ _"]


def conv_norm(channels: int, out: int, kernel_size: int = 1, stride: int = 1) -> nn.Sequential:
    """A convolution without bias and its batch norm."""
    conv = nn.Conv2d(channels, out, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


def stem_of(in_channels: int, planes: int) -> nn.Sequential:
    """Two convolutions to a quarter of the image."""
    layers: list[nn.Module] = []
    for channels in (in_channels, planes):
        layers += [nn.Conv2d(channels, planes, 3, stride=2, padding=1), nn.BatchNorm2d(planes), nn.ReLU()]
    return nn.Sequential(*layers)


class LightBag(nn.Module):
    """Light boundary-guided fusion of PIDNet-S: BN(conv1×1((1 − e) · i + p)) + BN(conv1×1(i + e · p)), e = σ(d).

    Args:
        channels: of all maps.

    Shapes: three of (batch, channels, height, width) to one.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.detail, self.semantic = conv_norm(channels, channels), conv_norm(channels, channels)

    def forward(self, detail: Maps, semantic: Maps, boundary: Maps) -> Maps:
        edge = boundary.sigmoid()
        return self.detail((1 - edge) * semantic + detail) + self.semantic(semantic + edge * detail)


class Rival(nn.Module):
    """What both have: weights that start as the authors' do, and the form without training heads."""

    align_corners = True  # of the logits, on the way to the size of the image, as in BEVANet
    auxiliary_head: nn.Module | None
    boundary_head: nn.Module | None

    def start(self) -> None:
        """Kaiming's start for all convolutions, as in the authors' code."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def without_training_heads(self) -> "Rival":
        """A copy that has the main output alone, in eval mode."""
        model = copy.deepcopy(self).eval()
        model.auxiliary_head = model.boundary_head = None
        return model


def enlarged(logits: Sequence[Tensor], target: Tensor) -> list[Tensor]:
    """Logits in the size of the masks."""
    return [F.interpolate(x.float(), target.shape[-2:], mode="bilinear", align_corners=True) for x in logits]


class PIDNet(Rival):
    """PIDNet-S (Xu et al., 2023, arXiv:2206.02066): a branch for details, one for context, one for boundaries.

    The structure is that of XuJiacong/PIDNet, models/pidnet.py. Details take twice from the context where the two
    agree; boundaries have the context added twice, and steer the fusion at the end.

    Args:
        num_classes, in_channels: of masks and images.
        planes: p, the width of the stem; the published network has 32.
        blocks: m and n, basic blocks of layers 1 and 2 and the detail branch, and of layers 3 and 4; published 2 and 3.
        pooling_planes, head_planes: widths of the pooling's branches and inside the heads; published 96 and 128.

    Shapes: images (batch, in_channels, height, width) to logits (batch, num_classes, ⌈height / 8⌉, ⌈width / 8⌉).
    """

    def __init__(
        self,
        num_classes: int = 19,
        *,
        in_channels: int = 3,
        planes: int = 32,
        blocks: tuple[int, int] = (2, 3),
        pooling_planes: int = 96,
        head_planes: int = 128,
    ):
        check_whole(num_classes=num_classes, in_channels=in_channels, planes=planes)
        super().__init__()
        p, (m, n) = planes, blocks
        self.stem, self.layer1 = stem_of(in_channels, p), _stack(p, p, m)
        self.layer2, self.layer3 = _stack(p, 2 * p, m, stride=2), _stack(2 * p, 4 * p, n, stride=2)
        self.layer4 = _stack(4 * p, 8 * p, n, stride=2)
        self.layer5 = nn.Sequential(Bottleneck(8 * p, 8 * p, 2), Bottleneck(16 * p, 8 * p))
        self.compress3, self.compress4 = conv_norm(4 * p, 2 * p), conv_norm(8 * p, 2 * p)
        self.exchange3, self.exchange4 = PAG(2 * p, p), PAG(2 * p, p)
        self.detail3, self.detail4 = _stack(2 * p, 2 * p, m), _stack(2 * p, 2 * p, m)
        self.detail5 = Bottleneck(2 * p, 2 * p)
        self.boundary3, self.boundary4 = BasicBlock(2 * p, p, relu=False), Bottleneck(p, p)
        self.context3, self.context4 = conv_norm(4 * p, p, 3), conv_norm(8 * p, 2 * p, 3)
        self.boundary5 = Bottleneck(2 * p, 2 * p)
        self.pooling, self.fusion = PAPPM(16 * p, pooling_planes, 4 * p), LightBag(4 * p)
        self.head = SegmentationHead(4 * p, head_planes, num_classes)
        self.auxiliary_head = SegmentationHead(2 * p, head_planes, num_classes)
        self.boundary_head = SegmentationHead(2 * p, p, 1)
        self.start()

    def forward(self, x: Image) -> Logits:
        return self.maps(x)[0]

    def maps(self, x: Image) -> tuple[Tensor, Tensor, Tensor]:
        """The main logits, and the maps that the two training heads read."""
        shared = self.layer2(self.layer1(self.stem(x)).relu()).relu()
        size = shared.shape[-2:]
        middle = self.layer3(shared).relu()
        # Rectified for the training heads too: the authors' in-place ReLU changes the maps that are kept for them.
        detail3 = self.exchange3(self.detail3(shared), self.compress3(middle)).relu()
        boundary = self.boundary3(shared) + resize(self.context3(middle), size)
        semantic = self.layer4(middle).relu()
        detail = self.exchange4(self.detail4(detail3), self.compress4(semantic))
        boundary4 = (self.boundary4(boundary.relu()) + resize(self.context4(semantic), size)).relu()
        context = resize(self.pooling(self.layer5(semantic)), size)
        fused = self.fusion(self.detail5(detail.relu()), context, self.boundary5(boundary4))
        return self.head(fused), detail3, boundary4

    def training_logits(self, x: Image) -> TrainingLogits:
        """The main logits and those of the training heads.

        Raises:
            ValueError: it has no training heads.
        """
        if self.auxiliary_head is None or self.boundary_head is None:
            raise ValueError("this PIDNet has no training heads: only its main output can be had")
        main, detail, boundary = self.maps(x)
        return TrainingLogits(main, self.auxiliary_head(detail), self.boundary_head(boundary))

    def training_loss(self, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """0.4 CE(auxiliary) + OHEM(main) + 20 BCE(boundary) + OHEM(main where σ(boundary) > 0.8), as in BEVANet."""
        images, masks = batch
        target = masks.long()
        main, auxiliary, boundary = enlarged(self.training_logits(images), target)
        every = F.cross_entropy(auxiliary, target, ignore_index=IGNORED, reduction="none")
        along = torch.where(boundary[:, 0].sigmoid() > CONFIDENT, target, IGNORED)
        losses = hard_pixel_loss(main, target) + hard_pixel_loss(main, along)
        return losses + AUXILIARY * every.mean() + BOUNDARY * boundary_loss(boundary, boundaries(target))


class DDRNet(Rival):
    """DDRNet-23-slim (Hong et al., 2021, arXiv:2101.06085): two branches that are added into each other twice.

    The structure is that of ydhongHIT/DDRNet, segmentation/DDRNet_23_slim.py.

    Args:
        num_classes, in_channels: of masks and images.
        planes: p, the width of the stem; the published network has 32.
        blocks: basic blocks of each layer and of each detail stage; published 2.
        pooling_planes, head_planes: widths of the pooling's branches and inside the heads; published 128 and 64.

    Shapes: images (batch, in_channels, height, width) to logits (batch, num_classes, ⌈height / 8⌉, ⌈width / 8⌉).
    """

    def __init__(
        self,
        num_classes: int = 19,
        *,
        in_channels: int = 3,
        planes: int = 32,
        blocks: int = 2,
        pooling_planes: int = 128,
        head_planes: int = 64,
    ):
        check_whole(num_classes=num_classes, in_channels=in_channels, planes=planes, blocks=blocks)
        super().__init__()
        p, n = planes, blocks
        self.stem, self.layer1 = stem_of(in_channels, p), _stack(p, p, n)
        self.layer2, self.layer3 = _stack(p, 2 * p, n, stride=2), _stack(2 * p, 4 * p, n, stride=2)
        self.layer4, self.layer5 = _stack(4 * p, 8 * p, n, stride=2), Bottleneck(8 * p, 8 * p, 2)
        self.compress3, self.compress4 = conv_norm(4 * p, 2 * p), conv_norm(8 * p, 2 * p)
        self.down3 = conv_norm(2 * p, 4 * p, 3, 2)
        self.down4 = nn.Sequential(conv_norm(2 * p, 4 * p, 3, 2), nn.ReLU(), conv_norm(4 * p, 8 * p, 3, 2))
        self.detail3, self.detail4 = _stack(2 * p, 2 * p, n), _stack(2 * p, 2 * p, n)
        self.detail5 = Bottleneck(2 * p, 2 * p)
        self.pooling = DAPPM(16 * p, pooling_planes, 4 * p)
        self.head = SegmentationHead(4 * p, head_planes, num_classes)
        self.auxiliary_head, self.boundary_head = SegmentationHead(2 * p, head_planes, num_classes), None
        self.start()

    def forward(self, x: Image) -> Logits:
        return self.maps(x)[0]

    def maps(self, x: Image) -> tuple[Tensor, Tensor]:
        """The main logits, and the map that the auxiliary head reads."""
        shared = self.layer2(self.layer1(self.stem(x)).relu()).relu()
        size = shared.shape[-2:]
        middle, detail = self.layer3(shared), self.detail3(shared)
        semantic = middle + self.down3(detail.relu())
        detail3 = detail + resize(self.compress3(middle.relu()), size)
        deep, detail = self.layer4(semantic.relu()), self.detail4(detail3.relu())
        semantic = deep + self.down4(detail.relu())
        detail = self.detail5((detail + resize(self.compress4(deep.relu()), size)).relu())
        context = resize(self.pooling(self.layer5(semantic.relu())), size)
        return self.head(context + detail), detail3

    def training_loss(self, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """OHEM(main) + 0.4 CE(auxiliary).

        Raises:
            ValueError: it has no training heads.
        """
        if self.auxiliary_head is None:
            raise ValueError("this DDRNet has no training heads: only its main output can be had")
        images, masks = batch
        target = masks.long()
        logits, detail = self.maps(images)
        main, auxiliary = enlarged((logits, self.auxiliary_head(detail)), target)
        every = F.cross_entropy(auxiliary, target, ignore_index=IGNORED, reduction="none")
        return hard_pixel_loss(main, target) + AUXILIARY * every.mean()

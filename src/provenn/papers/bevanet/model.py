"""BEVANet (arXiv:2508.07300): a semantic and a detail branch with large-kernel attention, segmentation in real time.

stem, layer1 (1/4), layer2 (1/8) ─┬─ semantic 3 (1/16) ── semantic 4 (1/32) ── semantic 5 (1/64), DLKPPM ─┐
                                  │        ↓ PAG               ↓ PAG                                      BGAF, head
                                  └─ detail 3 (1/8) ───── detail 4 (1/8) ─┬─ detail 5 ────────────────────┤
                                                                          └─ boundary 5 ──────────────────┘
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.fusion import fuse
from provenn.nn.segmentation import full_logits, resize
from provenn.papers.bevanet.fusion import FUSIONS, PAG
from provenn.papers.bevanet.layers import EVA, ChannelNorm
from provenn.papers.bevanet.losses import HARD_SHARE, IGNORED, boundaries, boundary_loss, hard_pixel_loss
from provenn.papers.bevanet.pooling import POOLINGS, norm_relu_conv

CONFIDENT = 0.8  # where the boundary head says so, the main output is trained once more
AUXILIARY, BOUNDARY = 0.4, 20.0  # weights of two of the four losses

Image = Float[Tensor, "batch channels height width"]


class BasicBlock(nn.Module):
    """conv3×3, BN, ReLU, conv3×3, BN, beside a shortcut; a ReLU behind the sum, where asked for."""

    def __init__(self, channels: int, out: int, stride: int = 1, *, relu: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(channels, out, stride)
        self.relu = relu

    def forward(self, x: Image) -> Float[Tensor, "batch out height2 width2"]:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.downsample(x)
        return y.relu() if self.relu else y


class Bottleneck(nn.Module):
    """conv1×1, conv3×3, conv1×1 to twice the width, each with BN, beside a shortcut; no ReLU behind the sum."""

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        out = 2 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = _shortcut(channels, out, stride)

    def forward(self, x: Image) -> Float[Tensor, "batch out height2 width2"]:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return self.bn3(self.conv3(y)) + self.downsample(x)


def _shortcut(channels: int, out: int, stride: int) -> nn.Module:
    if stride == 1 and channels == out:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


def _stack(channels: int, out: int, count: int, stride: int = 1) -> nn.Sequential:
    """Basic blocks; the last of several leaves its ReLU to who comes after."""
    blocks = [BasicBlock(channels, out, stride)]
    blocks += [BasicBlock(out, out, relu=k < count - 1) for k in range(1, count)]
    return nn.Sequential(*blocks)


class Exchange(NamedTuple):
    """Maps of the two branches: after exchange 3 and 4, and what classification reads of the middle."""

    first: Tensor  # layer1, 1/4
    middle: Tensor  # semantic 3, 1/16
    detail3: Tensor  # 1/8, rectified
    semantic: Tensor  # semantic 4, 1/32
    detail4: Tensor  # 1/8


class Bilateral(nn.Module):
    """Stem and stages 1 to 4, which segmentation and classification share.

    Args:
        planes: p, the width of the stem; later stages have 2p to 16p.
        blocks: n₀ to n₃, basic blocks of layer1 and detail 3, layer2, semantic 3 and semantic 4. Where semantic 4 has a
            large kernel, it has one basic block and two EVA blocks instead of its n₃.
        in_channels: of the image.
        kernel_size: K of the semantic branch's EVA blocks; 0 for basic blocks instead.
        detail_kernel_size: K of the detail branch's; 0 for basic blocks instead.
        attention: of the EVA blocks.
    """

    def __init__(
        self,
        planes: int,
        blocks: Sequence[int],
        *,
        in_channels: int,
        kernel_size: int,
        detail_kernel_size: int,
        attention: str,
    ):
        super().__init__()
        check_whole(planes=planes, in_channels=in_channels, kernel_size=kernel_size)
        if planes < 1 or in_channels < 1:
            raise ValueError(f"planes and in_channels must be at least 1, got {planes} and {in_channels}")
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks must name four stages of at least one block, got {list(blocks)}")
        p, (shallow, second, third, fourth) = planes, blocks
        self.attention, self.in_channels = attention, in_channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, p, 3, stride=2, padding=1),
            nn.BatchNorm2d(p),
            nn.ReLU(),
            nn.Conv2d(p, p, 3, stride=2, padding=1),
            nn.BatchNorm2d(p),
            nn.ReLU(),
        )
        self.layer1 = _stack(p, p, shallow)
        self.layer2 = _stack(p, 2 * p, second, stride=2)
        self.semantic3 = _stack(2 * p, 4 * p, third, stride=2)
        self.detail3 = _stack(2 * p, 2 * p, shallow)
        self.compress3 = nn.Sequential(nn.Conv2d(4 * p, 2 * p, 1, bias=False), nn.BatchNorm2d(2 * p))
        self.exchange3 = PAG(2 * p, p)
        if kernel_size:
            self.semantic4 = nn.Sequential(
                BasicBlock(4 * p, 8 * p, 2), *self.attend(8 * p, kernel_size), *self.attend(8 * p, kernel_size)
            )
        else:
            self.semantic4 = nn.Sequential(*_stack(4 * p, 8 * p, fourth, stride=2), nn.ReLU())
        self.detail4 = (
            nn.Sequential(BasicBlock(2 * p, 2 * p), *self.attend(2 * p, detail_kernel_size))
            if detail_kernel_size
            else _stack(2 * p, 2 * p, second)
        )
        self.compress4 = nn.Sequential(nn.Conv2d(8 * p, 2 * p, 1, bias=False), nn.BatchNorm2d(2 * p))
        self.exchange4 = PAG(2 * p, p)
        self.rectify4 = nn.Identity() if detail_kernel_size else nn.ReLU()
        self.detail5 = Bottleneck(2 * p, 2 * p)

    def attend(self, channels: int, kernel_size: int) -> tuple[EVA, ChannelNorm]:
        """An EVA block and the norm behind it."""
        return EVA(channels, kernel_size, attention=self.attention), ChannelNorm(channels)

    def exchange(self, x: Image) -> Exchange:
        """Both branches up to the second exchange."""
        first = self.layer1(self.stem(x)).relu()
        shared = self.layer2(first).relu()
        middle = self.semantic3(shared).relu()
        # Rectified for the auxiliary head too: the authors' in-place ReLU changes the map that is kept for it.
        detail3 = self.exchange3(self.detail3(shared), self.compress3(middle)).relu()
        semantic = self.semantic4(middle)
        detail4 = self.rectify4(self.exchange4(self.detail4(detail3), self.compress4(semantic)))
        return Exchange(first, middle, detail3, semantic, detail4)


class SegmentationHead(nn.Sequential):
    """conv1×1(ReLU(BN(conv3×3(ReLU(BN(x)))))), with a bias at the end."""

    def __init__(self, channels: int, inner: int, out: int):
        super().__init__(
            *norm_relu_conv(channels, inner, 3), nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, out, 1)
        )


class TrainingLogits(NamedTuple):
    """What the training form gives, each at 1/8 of the image."""

    main: Float[Tensor, "batch classes height width"]
    auxiliary: Float[Tensor, "batch classes height width"]
    boundary: Float[Tensor, "batch 1 height width"]


class BEVANet(Bilateral):
    """BEVANet for segmentation.

    `forward` gives the main logits; `training_loss` takes those of two more heads, which `deploy` leaves out. Logits
    are brought to the size of the image bilinearly, with corners aligned.

    Args:
        num_classes: of the masks.
        planes, blocks, in_channels, kernel_size, detail_kernel_size, attention: of both branches.
        pooling: "dlkppm", "dappm" or "pappm".
        fusion: "bgaf" or "bag".
        pooling_planes: width of the pooling's branches.
        head_planes: inner width of the heads.
        training_heads: whether it has the auxiliary and the boundary head, for training alone.
        class_weights: of the cross-entropies, one for each class; none by default. See `losses.class_weights`.
        hard_share: of a batch's pixels, those that count at least; see `losses.hard_pixel_loss`.
        boundary_losses: whether boundaries are trained: the boundary head, and the main output along them.

    Attributes:
        strides: pixels of the image that a cell of each map is wide, those of the pooling included.

    Shapes: images (batch, in_channels, height, width) to logits (batch, num_classes, ⌈height / 8⌉, ⌈width / 8⌉).
    """

    align_corners = True  # of the logits, on the way to the size of the image

    def __init__(
        self,
        num_classes: int = 19,
        *,
        planes: int = 64,
        blocks: Sequence[int] = (2, 2, 4, 4),
        in_channels: int = 3,
        kernel_size: int = 35,
        detail_kernel_size: int = 23,
        attention: str = "sdlska",
        pooling: str = "dlkppm",
        fusion: str = "bgaf",
        pooling_planes: int = 96,
        head_planes: int = 128,
        training_heads: bool = True,
        class_weights: Sequence[float | int] = (),
        hard_share: float | int = HARD_SHARE,
        boundary_losses: bool = True,
    ):
        check_whole(num_classes=num_classes, pooling_planes=pooling_planes, head_planes=head_planes)
        check_finite(hard_share=hard_share)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 0 < hard_share <= 1:
            raise ValueError(f"hard_share must lie above 0 and be at most 1, got {hard_share}")
        if class_weights and len(class_weights) != num_classes:
            raise ValueError(f"class_weights must name the {num_classes} classes, got {len(class_weights)} weights")
        for name, given, known in (("pooling", pooling, POOLINGS), ("fusion", fusion, FUSIONS)):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        super().__init__(
            planes,
            blocks,
            in_channels=in_channels,
            kernel_size=kernel_size,
            detail_kernel_size=detail_kernel_size,
            attention=attention,
        )
        p = planes
        self.boundary5 = Bottleneck(2 * p, 2 * p)
        self.semantic5 = (
            nn.Sequential(
                BasicBlock(8 * p, 16 * p, 2), *self.attend(16 * p, kernel_size), *self.attend(16 * p, kernel_size)
            )
            if kernel_size
            else nn.Sequential(Bottleneck(8 * p, 8 * p, 2), Bottleneck(16 * p, 8 * p))
        )
        self.pooling = POOLINGS[pooling](16 * p, pooling_planes, 4 * p)
        self.strides = [4, 8, 16, 32, 64, *(64 * stride for stride in self.pooling.strides)]
        self.fusion = FUSIONS[fusion](4 * p)
        self.head = SegmentationHead(4 * p, head_planes, num_classes)
        self.auxiliary_head = SegmentationHead(2 * p, head_planes, num_classes) if training_heads else None
        self.boundary_head = SegmentationHead(2 * p, p, 1) if training_heads else None
        self.class_weights = tuple(float(w) for w in class_weights)
        self.hard_share, self.boundary_losses = hard_share, boundary_losses

    def forward(self, x: Image) -> Float[Tensor, "batch classes _ _"]:
        return self._main(self.exchange(x))

    def _main(self, maps: Exchange) -> Tensor:
        context = resize(self.pooling(self.semantic5(maps.semantic)), maps.detail4.shape[-2:])
        return self.head(self.fusion(self.detail5(maps.detail4), context, self.boundary5(maps.detail4)))

    def training_logits(self, x: Image) -> TrainingLogits:
        """The main logits and those of the training heads.

        Raises:
            ValueError: it has no training heads; or, in training mode, the batch has a single cell at 1/64 of the
                image, which cannot be normalised.
        """
        if self.auxiliary_head is None or self.boundary_head is None:
            raise ValueError("this BEVANet was built without its training heads: training_heads=True has them")
        if self.training and len(x) * -(-x.shape[-2] // 64) * -(-x.shape[-1] // 64) == 1:
            raise ValueError(
                f"one image of {x.shape[-2]}×{x.shape[-1]} pixels is one cell at 1/64, which a batch norm cannot "
                "normalise in training: give two images or more, or more than 64 pixels"
            )
        maps = self.exchange(x)
        return TrainingLogits(self._main(maps), self.auxiliary_head(maps.detail3), self.boundary_head(maps.detail4))

    def training_loss(self, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """0.4 CE(auxiliary) + OHEM(main) + 20 BCE(boundary) + OHEM(main where σ(boundary) > 0.8).

        The cross-entropy of the auxiliary output is a mean over all pixels, to which those not judged give nothing.
        Boundaries are found in the masks as they come.

        Args:
            batch: images, and their masks of class numbers with 255 for what is not judged.

        Raises:
            ValueError: as `training_logits`.
        """
        images, masks = batch
        target: Int64[Tensor, "batch height width"] = masks.long()
        weight = images.new_tensor(self.class_weights) if self.class_weights else None
        main, auxiliary, boundary = (
            F.interpolate(x.float(), target.shape[-2:], mode="bilinear", align_corners=True)
            for x in self.training_logits(images)
        )
        loss = hard_pixel_loss(main, target, share=self.hard_share, weight=weight)
        every = F.cross_entropy(auxiliary, target, weight, ignore_index=IGNORED, reduction="none")
        loss = loss + AUXILIARY * every.mean()
        if not self.boundary_losses:
            return loss
        along = torch.where(boundary[:, 0].sigmoid() > CONFIDENT, target, IGNORED)
        return (
            loss
            + BOUNDARY * boundary_loss(boundary, boundaries(target))
            + hard_pixel_loss(main, along, share=self.hard_share, weight=weight)
        )

    def without_training_heads(self) -> "BEVANet":
        """A copy that has the main output alone, in eval mode."""
        model = copy.deepcopy(self).eval()
        model.auxiliary_head = model.boundary_head = None
        return model

    def deploy(self, size: tuple[int, int] = (128, 128)) -> nn.Module:
        """The form for inference: no training heads, batch norms folded into the convolutions beside them.

        Args:
            size: height and width of the image on which it is held to give the same logits; it takes others too.
        """
        noise = torch.rand(1, self.in_channels, *size, generator=torch.Generator().manual_seed(0))
        return fuse(self.without_training_heads(), noise.to(next(self.parameters())))

    def segment(self, images: Image) -> Int64[Tensor, "batch height width"]:
        """The class of each pixel, of images of any size, standardised as in training."""
        model = self if not self.training else self.without_training_heads()
        with torch.no_grad():
            return full_logits(model, images).argmax(1)


class BEVANetClassifier(Bilateral):
    """BEVANet for images of classes, as it is pre-trained; also a backbone for segmentation heads and detectors.

    Semantic 5 stays at 1/32: Bottleneck, EVA, EVA, Bottleneck. Detail 5 is brought down by two convolutions and added;
    conv1×1 to `last`, BN, ReLU, mean over space, linear map.

    Args:
        num_classes: size of the output; 0 leaves out all behind the last map, and `forward` gives that map's mean.
        planes, blocks, in_channels, kernel_size, detail_kernel_size, attention: of both branches.
        last: width before the linear map.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes). It is a `provenn.nn.backbone.Backbone`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        planes: int = 64,
        blocks: Sequence[int] = (2, 2, 4, 4),
        in_channels: int = 3,
        kernel_size: int = 35,
        detail_kernel_size: int = 23,
        attention: str = "sdlska",
        last: int = 2048,
    ):
        check_whole(num_classes=num_classes, last=last)
        if num_classes < 0 or last < 1:
            raise ValueError(f"num_classes must be at least 0 and last at least 1, got {num_classes} and {last}")
        super().__init__(
            planes,
            blocks,
            in_channels=in_channels,
            kernel_size=kernel_size,
            detail_kernel_size=detail_kernel_size,
            attention=attention,
        )
        p = planes
        self.strides, self.widths = [4, 8, 16, 32], [p, 4 * p, 4 * p, 16 * p]
        self.semantic5 = nn.Sequential(
            Bottleneck(8 * p, 8 * p),
            *(layer for _ in range(2) for layer in self.attend(16 * p, kernel_size)),
            Bottleneck(16 * p, 8 * p),
        )
        self.head: nn.Module = nn.Linear(last, num_classes) if num_classes else nn.Identity()
        if num_classes:
            self.down = nn.Sequential(
                nn.Conv2d(4 * p, 8 * p, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(8 * p),
                nn.ReLU(),
                nn.Conv2d(8 * p, 16 * p, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(16 * p),
            )
            self.last = nn.Sequential(nn.Conv2d(16 * p, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU())

    def features(self, x: Image) -> list[Tensor]:
        """Layer 1, detail 5, semantic 3 and semantic 5, from fine to coarse."""
        maps = self.exchange(x)
        return [maps.first, self.detail5(maps.detail4), maps.middle, self.semantic5(maps.semantic)]

    def forward(self, x: Image) -> Float[Tensor, "batch classes"]:
        _, detail, _, semantic = self.features(x)
        if isinstance(self.head, nn.Identity):
            return semantic.mean(dim=(2, 3))
        return self.head(self.last((semantic + self.down(detail)).relu()).mean(dim=(2, 3)))

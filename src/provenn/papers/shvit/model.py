"""SHViT (Yun and Ro, 2024, arXiv:2401.16456): a stem of stride 16, three stages, attention in the last two."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.backbone import Backbone, FeaturePyramid
from provenn.nn.detection import RetinaNet
from provenn.nn.segmentation import Segmenter
from provenn.papers.shvit.layers import (
    RATIO,
    BottleneckAttention,
    ConvBN,
    Downsampling,
    MultiHeadAttention,
    SHViTBlock,
    SingleHeadAttention,
    attended_channels,
)

MIXERS: dict[str, Callable[[int, int], nn.Module | None]] = {
    "shsa": lambda dim, pdim: SingleHeadAttention(dim, pdim=pdim),
    "full": lambda dim, pdim: SingleHeadAttention(dim, pdim=dim),
    "bottleneck": lambda dim, pdim: BottleneckAttention(dim, pdim=pdim),
    "mhsa": lambda dim, pdim: MultiHeadAttention(dim),
    "none": lambda dim, pdim: None,
}
"""What may mix space in the stages that attend: SHSA, and what the paper holds it against (figure 6, Table 6)."""


class SHViT(nn.Module):
    """A stem of overlapping 3×3 convolutions of stride 2, then stages of `SHViTBlock` with `Downsampling` between them.

    Args:
        widths: channels of each stage.
        depths: blocks of each stage, those inside the downsampling not counted.
        pdims: C_p of each stage, how many of its channels attend; by default the nearest to `ratio`.
        ratio: the share of the channels that attend, where `pdims` does not say.
        attention: whether each stage has it; by default all but the first.
        mixer: "shsa"; or for comparison "mhsa" (multi-head on all channels), "full" (one head on all channels),
            "bottleneck" (one head, no channels that wait) or "none".
        patch: stride of the stem, a power of two; 16 is the paper's.
        num_classes: size of the output; 0 leaves the classifier out, and `forward` gives the mean of the last map.
        in_channels: channels of the image.
        drop_path: probability with which a branch of an example is left out while training; 0 in the paper's models.

    Shapes: (batch, in_channels, height, width) of any size to (batch, num_classes). It is a
    `provenn.nn.backbone.Backbone` whose maps have strides of `patch`, 2·`patch`, … Batch norm takes two examples at
    least while training.

    Raises:
        ValueError: lists that name other numbers of stages, an unknown mixer, or a stem that does not divide the width.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        pdims: Sequence[int] | None = None,
        ratio: float | int = RATIO,
        attention: Sequence[bool] | None = None,
        mixer: str = "shsa",
        patch: int = 16,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float | int = 0.0,
    ):
        check_whole(patch=patch, num_classes=num_classes, in_channels=in_channels)
        check_finite(ratio=ratio, drop_path=drop_path)
        super().__init__()
        stages = len(widths)
        attends = [stage > 0 for stage in range(stages)] if attention is None else list(attention)
        pdims = [attended_channels(width, ratio) for width in widths] if pdims is None else list(pdims)
        if not stages or {len(depths), len(attends), len(pdims)} != {stages}:
            raise ValueError(
                f"widths, depths, pdims and attention must name the same stages, got {stages}, {len(depths)}, "
                f"{len(pdims)} and {len(attends)}"
            )
        if mixer not in MIXERS:
            raise ValueError(f"mixer must be one of {', '.join(MIXERS)}, got {mixer!r}")
        if patch < 2 or patch & (patch - 1) or widths[0] % (patch // 2):
            raise ValueError(
                f"patch must be a power of two from 2 on, and half of it divide the first width, got {patch} with a "
                f"width of {widths[0]}"
            )
        if min(depths) < 0 or num_classes < 0 or in_channels < 1:
            raise ValueError(
                "depths and num_classes must not be negative, in_channels at least 1, "
                f"got {list(depths)}, {num_classes} and {in_channels}"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        steps = patch.bit_length() - 1
        channels = [in_channels, *(widths[0] >> step for step in reversed(range(steps)))]
        self.stem = nn.Sequential()
        for i in range(steps):
            self.stem.append(ConvBN(channels[i], channels[i + 1], 3, stride=2))
            if i + 1 < steps:
                self.stem.append(nn.ReLU())
        self.stages = nn.ModuleList()
        for i, (width, depth, pdim) in enumerate(zip(widths, depths, pdims, strict=True)):
            entry = [Downsampling(widths[i - 1], width, drop_path)] if i else []
            make = MIXERS[mixer if attends[i] else "none"]
            blocks = [SHViTBlock(width, make(width, pdim), drop_path) for _ in range(depth)]
            self.stages.append(nn.Sequential(*entry, *blocks))
        self.strides = [patch << i for i in range(stages)]
        self.widths = list(widths)
        self.head = _classifier(widths[-1], num_classes)

    def features(self, x: Float[Tensor, "batch in_channels height width"]) -> list[Tensor]:
        """The map that each stage puts out, without a last norm, from fine to coarse."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def pooled(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch channels"]:
        """The mean of the last map."""
        return self.features(x)[-1].mean(dim=(2, 3))

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Any:
        return self.head(self.pooled(x))


def _classifier(width: int, num_classes: int) -> nn.Module:
    if not num_classes:
        return nn.Identity()
    linear = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(width), linear=linear))


class DistilledSHViT(SHViT):
    """SHViT with a second classifier that learns from a teacher, as DeiT has it (Touvron et al., 2021, section 4).

    Its output is the mean of both; while training, the two apart.

    Args:
        teacher: a trained network that gives logits of the same images; it is frozen, and left out of what is saved.
            Without one the second classifier learns the labels too.
        kind, share, temperature: as of `distillation_loss`.
        options: as of `SHViT`.
    """

    def __init__(
        self,
        *,
        teacher: nn.Module | None = None,
        kind: str = "hard",
        share: float | int = 0.5,
        temperature: float | int = 1.0,
        **options: Any,
    ):
        super().__init__(**options)
        self.head_dist = _classifier(self.widths[-1], options.get("num_classes", 1000))
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self.kind, self.share, self.temperature = kind, share, temperature

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Any:
        pooled = self.pooled(x)
        outputs = self.head(pooled), self.head_dist(pooled)
        return outputs if self.training else (outputs[0] + outputs[1]) / 2

    def train(self, mode: bool = True) -> "DistilledSHViT":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def training_loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch of images and labels."""
        images, labels = batch
        outputs = self(images)
        if not self.training:
            return F.cross_entropy(outputs, labels)
        if self.teacher is None:
            return (F.cross_entropy(outputs[0], labels) + F.cross_entropy(outputs[1], labels)) / 2
        with torch.no_grad():
            teacher = self.teacher(images)
        return distillation_loss(
            outputs, labels, teacher, kind=self.kind, share=self.share, temperature=self.temperature
        )

    def before_saving(self) -> None:
        """The teacher is not part of the network."""
        self.teacher = None


def distillation_loss(
    outputs: tuple[Tensor, Tensor],
    labels: Tensor,
    teacher: Float[Tensor, "batch classes"],
    *,
    kind: str = "hard",
    share: float | int = 0.5,
    temperature: float | int = 1.0,
) -> Tensor:
    """(1 − share) · CE(first, labels) + share · D(second, teacher), all means over the batch.

    D is CE(second, argmax teacher) for the kind "hard", and T² KL(teacher/T ‖ second/T) for "soft", which the authors'
    code divides by the number of classes too.

    Args:
        outputs: logits of both classifiers, (batch, classes) each.
        labels: of the images, or a row of shares of the classes each.
        teacher: the teacher's logits.
        kind: "hard", the paper's, or "soft".
        share: of the distillation.
        temperature: T of "soft".
    """
    if kind not in ("hard", "soft"):
        raise ValueError(f"kind must be 'hard' or 'soft', got {kind!r}")
    first, second = outputs
    if kind == "hard":
        distillation = F.cross_entropy(second, teacher.argmax(dim=1))
    else:
        t = temperature
        logs = (F.log_softmax(second / t, dim=1), F.log_softmax(teacher / t, dim=1))
        distillation = F.kl_div(*logs, reduction="sum", log_target=True) * t**2 / second.numel()
    return (1 - share) * F.cross_entropy(first, labels) + share * distillation


def _variant(
    widths: Sequence[int],
    depths: Sequence[int],
    pdims: Sequence[int],
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    distillation: bool = False,
    mixer: str = "shsa",
    ratio: float | int | None = None,
    drop_path: float | int = 0.0,
) -> SHViT:
    """A released model. Options: as of `SHViT`; `ratio` replaces the channels that the authors set by hand."""
    shares: dict[str, Any] = {"pdims": pdims} if ratio is None else {"ratio": ratio}
    options: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    system = DistilledSHViT if distillation else SHViT
    return system(widths=widths, depths=depths, mixer=mixer, drop_path=drop_path, **shares, **options)


# Widths, depths and attended channels of the paper's models (Table 1), S4 for images of 256 pixels, the others of 224.
shvit_s1 = partial(_variant, (128, 224, 320), (2, 4, 5), (32, 48, 68))
shvit_s2 = partial(_variant, (128, 308, 448), (2, 4, 5), (32, 66, 96))
shvit_s3 = partial(_variant, (192, 352, 448), (3, 5, 5), (48, 75, 96))
shvit_s4 = partial(_variant, (224, 336, 448), (4, 7, 6), (48, 72, 96))


def shvit_small(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    patch: int = 2,
    mixer: str = "shsa",
    ratio: float | int | None = None,
    drop_path: float | int = 0.0,
) -> SHViT:
    """SHViT for images of 8 to 64 pixels, its stem of stride 2. Not a model of the paper: it is what trains in minutes.

    Options: as of `SHViT`.
    """
    return SHViT(
        widths=(48, 96, 144),
        depths=(1, 2, 2),
        ratio=RATIO if ratio is None else ratio,
        patch=patch,
        mixer=mixer,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
    )


def shvit_small_semantic_fpn(*, num_classes: int = 5, in_channels: int = 1, patch: int = 4, dim: int = 32) -> Segmenter:
    """The small SHViT under the segmentation head of Panoptic FPN, its stem of stride 4. Ours."""
    return Segmenter(
        shvit_small(num_classes=0, in_channels=in_channels, patch=patch), num_classes, "semantic_fpn", dim=dim
    )


def shvit_narrow(
    *, num_classes: int = 10, in_channels: int = 3, mixer: str = "shsa", ratio: float | int = RATIO
) -> SHViT:
    """SHViT for images of 8 to 64 pixels with about as many parameters as a ResNet-14. Ours: what small backbones are
    compared by.

    Options: as of `SHViT`.
    """
    return SHViT(
        widths=(24, 48, 72),
        depths=(1, 2, 2),
        ratio=ratio,
        patch=2,
        mixer=mixer,
        num_classes=num_classes,
        in_channels=in_channels,
    )


NECKS: dict[str, dict[str, Any]] = {
    "retinanet": {"finer": 1, "coarser": 1, "by": "input"},
    "mask_rcnn": {"finer": 2},
}
"""What the authors' detectors add to the three maps, their configurations merged with those that they inherit."""


def detection_neck(backbone: Backbone, dim: int = 256, detector: str = "retinanet") -> FeaturePyramid:
    """The pyramid under the paper's detectors: five levels from three maps.

    A finer level is a transposed convolution of the finest merged map. RetinaNet has one, and a coarser level that
    convolves the backbone's last map: strides 8 to 128. Mask R-CNN has two finer levels: strides 4 to 64.

    Args:
        backbone: gives maps at strides 16, 32 and 64.
        dim: channels of each level.
        detector: "retinanet" or "mask_rcnn".
    """
    if detector not in NECKS:
        raise ValueError(f"detector must be one of {', '.join(NECKS)}, got {detector!r}")
    return FeaturePyramid(backbone.widths, backbone.strides, dim, **NECKS[detector])


BACKBONES = {"s1": shvit_s1, "s2": shvit_s2, "s3": shvit_s3, "s4": shvit_s4}


def shvit_retinanet(variant: str = "s4", *, num_classes: int = 80, in_channels: int = 3) -> RetinaNet:
    """RetinaNet on SHViT (Table 5), with a pyramid at strides 8 to 128 and the plain L1 loss of the authors' recipe.

    They train it with batch norms in eval mode.

    Args:
        variant: "s1", "s2", "s3" or "s4", the paper's.
        num_classes, in_channels: of the objects and of the image.
    """
    if variant not in BACKBONES:
        raise ValueError(f"variant must be one of {', '.join(BACKBONES)}, got {variant!r}")
    backbone = BACKBONES[variant](num_classes=0, in_channels=in_channels)
    return RetinaNet(backbone, num_classes=num_classes, finest=16, beta=0, matching="mmdetection", **NECKS["retinanet"])


def shvit_small_retinanet(*, num_classes: int = 3, in_channels: int = 3, patch: int = 4, dim: int = 64) -> RetinaNet:
    """A RetinaNet for pictures of about 100 pixels, on the small SHViT with a stem of stride 4.

    Ours: what trains in minutes. Its towers have two convolutions, and group norms since they start from nothing.
    """
    backbone = shvit_small(num_classes=0, in_channels=in_channels, patch=patch)
    return RetinaNet(backbone, num_classes=num_classes, dim=dim, convs=2, groups=8, finest=patch, coarser=1)


def four_stage_baseline(widths: Sequence[int], depths: Sequence[int], **options: Any) -> SHViT:
    """The macro design that the stride-16 stem is held against (figure 2): patches of 4×4, no attention, any stages.

    Args:
        widths, depths: of each stage, four in the paper.
        options: as of `SHViT`.
    """
    return SHViT(widths=widths, depths=depths, **{"patch": 4, "mixer": "none", **options})

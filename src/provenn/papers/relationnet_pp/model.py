"""RelationNet++ (Chi et al., 2020, arXiv:2010.15831): detectors with BVR in their heads."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from provenn.nn.detection import ATSS, FCOS, DenseHead, FasterRCNN, RetinaNet
from provenn.nn.detection.dense import make_neck
from provenn.nn.resnet import BasicBlock, ResNet, resnet50
from provenn.papers.relationnet_pp.bridge import CORNERS, Bridge, attach_bvr

STRIDES = (8, 16, 32, 64, 128)


def resnet50_of_imagenet(*, num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """The classifier whose weights the detectors start from: ResNet-50 as torchvision has it, 25,557,032 parameters."""
    return resnet50(num_classes=num_classes, in_channels=in_channels)


def bvr_retinanet_r50(
    *,
    num_classes: int = 80,
    in_channels: int = 3,
    groups: int | None = 32,
    classification: Sequence[str] = ("centre",),
    regression: Sequence[str] = CORNERS,
    **bvr: Any,
) -> RetinaNet:
    """RetinaNet on ResNet-50 with BVR, as released: 46,417,466 parameters.

    Group norms everywhere outside the backbone, L1 for boxes, no ReLU between the two levels that the neck adds.

    Args:
        num_classes, in_channels: of the data.
        groups: of the group norms; None has none, as in most of the paper's tables.
        classification, regression: key types of each tower; () leaves it as it is.
        bvr: further options of `provenn.papers.relationnet_pp.Bridge`.
    """
    backbone = resnet50(num_classes=0, in_channels=in_channels)
    model = RetinaNet(backbone, num_classes=num_classes, groups=groups, beta=0.0, matching="mmdetection")
    model.neck = make_neck(backbone, 8, 256, coarser=2, by="input", groups=groups, activate=False)
    towers = {"classification": classification, "regression": regression}
    return attach_bvr(model, **{"groups": groups, **towers, **bvr})


def bvr_fcos_r50(*, num_classes: int = 80, in_channels: int = 3, **bvr: Any) -> FCOS:
    """FCOS on ResNet-50 with BVR. The release has it on ResNeXt-101 with deformable convolutions, and no norms."""
    model = FCOS(resnet50(num_classes=0, in_channels=in_channels), num_classes=num_classes)
    return attach_bvr(model, **{"deeper": 0, "map_size": 300, **bvr})


def bvr_atss_r50(*, num_classes: int = 80, in_channels: int = 3, **bvr: Any) -> ATSS:
    """ATSS on ResNet-50 with BVR, one geometry for both towers. The release has it on ResNeXt-101."""
    model = ATSS(resnet50(num_classes=0, in_channels=in_channels), num_classes=num_classes)
    return attach_bvr(model, **{"share_map": True, "map_size": 300, **bvr})


def bvr_faster_rcnn_r50(*, num_classes: int = 80, in_channels: int = 3, **bvr: Any) -> FasterRCNN:
    """Faster R-CNN on ResNet-50 with BVR in its second stage (figure 4); not in the release."""
    model = FasterRCNN(resnet50(num_classes=0, in_channels=in_channels), num_classes=num_classes)
    return attach_bvr(model, **bvr)


def bvr_retinanet_tiny(*, num_classes: int = 3, in_channels: int = 3, **bvr: Any) -> RetinaNet:
    """RetinaNet with BVR for pictures of about 100 pixels. Ours: what trains in minutes.

    ResNet of two blocks a stage, group norms since it starts from nothing, levels of strides 8, 16 and 32 with anchors
    from 16 pixels on, 15 keys, offsets in units of 4 pixels.
    """
    backbone = ResNet(BasicBlock, (2, 2, 2), widths=(16, 32, 64), in_channels=in_channels, num_classes=0)
    scales = (2.0, 2.0 * 2 ** (1 / 3), 2.0 * 2 ** (2 / 3))  # of 16 pixels and more
    model = RetinaNet(backbone, num_classes=num_classes, dim=64, convs=1, groups=8, coarser=1, scales=scales)
    small = {
        "groups": 8,
        "point_convs": 1,
        "deeper": 0,
        "keys": 15,
        "keys_a_level": 10,
        "dim": 128,
        "map_size": 64,
        "unit": 4.0,
    }
    return attach_bvr(model, **{**small, **bvr})


def bvr_retina_head(**options: Any) -> "BVRRetinaHead":
    """The head of `bvr_retinanet_r50` alone; options of `BVRRetinaHead`."""
    return BVRRetinaHead(**options)


class BVRRetinaHead(nn.Module):
    """The head of `bvr_retinanet_r50` alone, for a pyramid that is there already.

    Args:
        channels: of the levels.
        num_classes: how many.
        groups: of the group norms.
        strides: of the levels.
        bvr: options of `Bridge`; of equal scores it leaves the order to torch, as the release does.

    Shapes: a level each, (batch, channels, h_i, w_i), to logits of the classes and four offsets of each anchor, (batch,
    anchors, num_classes + 4). Each cell has 9 anchors; their order is by levels, cells and anchors.
    """

    def __init__(
        self,
        channels: int = 256,
        num_classes: int = 80,
        *,
        groups: int | None = 32,
        convs: int = 4,
        strides: tuple[int, ...] = STRIDES,
        **bvr: Any,
    ):
        super().__init__()
        self.strides = tuple(strides)
        self.head = DenseHead(channels, num_classes, anchors=9, convs=convs, groups=groups, levels=len(self.strides))
        self.head.bridge = Bridge(channels, num_classes, self.strides, **{"groups": groups, "ties": "topk", **bvr})

    def forward(self, *levels: Tensor) -> Tensor:
        if len(levels) != len(self.strides):
            raise ValueError(f"expected {len(self.strides)} levels, got {len(levels)}")
        said = self.head(list(levels), self.strides)
        return torch.cat([said.logits, said.offsets], dim=-1)

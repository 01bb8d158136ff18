"""ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks (arXiv:1910.03151)."""

from provenn.papers.eca_net.layers import (
    EfficientChannelAttention,
    SEGroupConv,
    SEVar1,
    SEVar2,
    SEVar3,
    UnsharedChannelAttention,
    adaptive_kernel_size,
)
from provenn.papers.eca_net.model import (
    add_eca,
    eca_mobilenet_v2,
    eca_resnet10_semantic_fpn,
    eca_resnet18,
    eca_resnet20,
    eca_resnet20_retinanet,
    eca_resnet34,
    eca_resnet50,
    eca_resnet50_faster_rcnn,
    eca_resnet50_retinanet,
    eca_resnet101,
    eca_resnet152,
)

__all__ = [
    "EfficientChannelAttention",
    "SEGroupConv",
    "SEVar1",
    "SEVar2",
    "SEVar3",
    "UnsharedChannelAttention",
    "adaptive_kernel_size",
    "add_eca",
    "eca_mobilenet_v2",
    "eca_resnet10_semantic_fpn",
    "eca_resnet18",
    "eca_resnet20",
    "eca_resnet20_retinanet",
    "eca_resnet34",
    "eca_resnet50",
    "eca_resnet50_faster_rcnn",
    "eca_resnet50_retinanet",
    "eca_resnet101",
    "eca_resnet152",
]

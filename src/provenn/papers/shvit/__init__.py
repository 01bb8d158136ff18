"""SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design (arXiv:2401.16456)."""

from provenn.papers.shvit.layers import (
    BottleneckAttention,
    MultiHeadAttention,
    SHViTBlock,
    SingleHeadAttention,
    attended_channels,
)
from provenn.papers.shvit.model import (
    DistilledSHViT,
    SHViT,
    detection_neck,
    distillation_loss,
    four_stage_baseline,
    shvit_narrow,
    shvit_retinanet,
    shvit_s1,
    shvit_s2,
    shvit_s3,
    shvit_s4,
    shvit_small,
    shvit_small_retinanet,
    shvit_small_semantic_fpn,
)

__all__ = [
    "BottleneckAttention",
    "DistilledSHViT",
    "MultiHeadAttention",
    "SHViT",
    "SHViTBlock",
    "SingleHeadAttention",
    "attended_channels",
    "detection_neck",
    "distillation_loss",
    "four_stage_baseline",
    "shvit_narrow",
    "shvit_retinanet",
    "shvit_s1",
    "shvit_s2",
    "shvit_s3",
    "shvit_s4",
    "shvit_small",
    "shvit_small_retinanet",
    "shvit_small_semantic_fpn",
]

"""Multi-scale guided attention for medical image segmentation (Sinha and Dolz, 2020, arXiv:1906.02849)."""

from provenn.papers.ms_guided_attention.layers import (
    AttentionLayer,
    ChannelAttention,
    GuidedAttention,
    PositionAttention,
    SemanticModule,
)
from provenn.papers.ms_guided_attention.model import DeepAttentiveFeatures, GuidedAttentionNet
from provenn.papers.ms_guided_attention.task.measures import Agreement, agreement
from provenn.papers.ms_guided_attention.task.volumes import Volume, read_volume, write_labels

__all__ = [
    "Agreement",
    "AttentionLayer",
    "ChannelAttention",
    "DeepAttentiveFeatures",
    "GuidedAttention",
    "GuidedAttentionNet",
    "PositionAttention",
    "SemanticModule",
    "Volume",
    "agreement",
    "read_volume",
    "write_labels",
]

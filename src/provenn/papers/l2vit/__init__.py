"""L²ViT: The Linear Attention Resurrection in Vision Transformer (arXiv:2501.16182)."""

from provenn.papers.l2vit.layers import (
    ConditionalPositions,
    LGABlock,
    LinearGlobalAttention,
    LocalConcentration,
    LWABlock,
    WindowAttention,
)
from provenn.papers.l2vit.model import (
    L2ViT,
    l2vit_base,
    l2vit_base_384,
    l2vit_mini,
    l2vit_mini_semantic_fpn,
    l2vit_small,
    l2vit_tiny,
    l2vit_tiny_semantic_fpn,
)

__all__ = [
    "ConditionalPositions",
    "L2ViT",
    "LGABlock",
    "LWABlock",
    "LinearGlobalAttention",
    "LocalConcentration",
    "WindowAttention",
    "l2vit_base",
    "l2vit_base_384",
    "l2vit_mini",
    "l2vit_mini_semantic_fpn",
    "l2vit_small",
    "l2vit_tiny",
    "l2vit_tiny_semantic_fpn",
]

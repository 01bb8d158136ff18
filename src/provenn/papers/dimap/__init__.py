"""DIMAP: data-independent, module-aware pruning of Swin transformers (He and Zhou, 2024, arXiv:2404.13648)."""

from provenn.nn.masks import Masks
from provenn.papers.dimap.layers import PatchMerging, SwinBlock, WindowAttention
from provenn.papers.dimap.model import Enlarged, Swin, swin_b, swin_digits, swin_s, swin_t
from provenn.papers.dimap.pruning import (
    MODULES,
    Layer,
    find_layers,
    importance,
    masks,
    prune,
    score,
    select,
)

__all__ = [
    "MODULES",
    "Enlarged",
    "Layer",
    "Masks",
    "PatchMerging",
    "Swin",
    "SwinBlock",
    "WindowAttention",
    "find_layers",
    "importance",
    "masks",
    "prune",
    "score",
    "select",
    "swin_b",
    "swin_digits",
    "swin_s",
    "swin_t",
]

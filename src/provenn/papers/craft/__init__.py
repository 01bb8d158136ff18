"""CRAFT: super-resolution with a high-frequency prior (Li et al., 2023, arXiv:2308.05022)."""

from provenn.papers.craft.layers import (
    GDFN,
    HFB,
    HFERB,
    SRWAB,
    InterAttention,
    PositionBias,
    RectangleWindowAttention,
    padded_srwab,
)
from provenn.papers.craft.model import CRAFT, CRFB, craft_small, craft_x2, craft_x3, craft_x4, cross_refinement

__all__ = [
    "CRAFT",
    "CRFB",
    "GDFN",
    "HFB",
    "HFERB",
    "SRWAB",
    "InterAttention",
    "PositionBias",
    "RectangleWindowAttention",
    "craft_small",
    "craft_x2",
    "craft_x3",
    "craft_x4",
    "cross_refinement",
    "padded_srwab",
]

"""RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling (arXiv:2308.03429)."""

from provenn.papers.rcmha.layers import HeadConvolution, RelativeConvAttention
from provenn.papers.rcmha.model import (
    CharacterLM,
    SegmentMemory,
    mdha_char,
    mdha_small,
    mha_char,
    mha_small,
    rcmha_char,
    rcmha_small,
    rmha_char,
    rmha_small,
)

__all__ = [
    "CharacterLM",
    "HeadConvolution",
    "RelativeConvAttention",
    "SegmentMemory",
    "mdha_char",
    "mdha_small",
    "mha_char",
    "mha_small",
    "rcmha_char",
    "rcmha_small",
    "rmha_char",
    "rmha_small",
]

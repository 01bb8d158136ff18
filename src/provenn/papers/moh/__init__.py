"""MoH: Multi-Head Attention as Mixture-of-Head Attention (arXiv:2410.11842)."""

from provenn.papers.moh.dit import DiT, moh_dit_digits, moh_dit_s_75, moh_dit_s_90
from provenn.papers.moh.layers import (
    HeadRouter,
    MoHAttention,
    PaperHeadRouter,
    QueryNormRouter,
    Routing,
    balance_loss,
    convert_to_moh,
    head_load,
    straight_through,
    watch_routing,
)
from provenn.papers.moh.model import PatchClassifier, moh_llm_b, moh_llm_s, moh_small, moh_vit_digits
from provenn.papers.moh.vit import MoHViT, moh_vit_base_50, moh_vit_base_75, moh_vit_small_75, moh_vit_small_80

__all__ = [
    "DiT",
    "HeadRouter",
    "MoHAttention",
    "MoHViT",
    "PaperHeadRouter",
    "PatchClassifier",
    "QueryNormRouter",
    "Routing",
    "balance_loss",
    "convert_to_moh",
    "head_load",
    "moh_dit_digits",
    "moh_dit_s_75",
    "moh_dit_s_90",
    "moh_llm_b",
    "moh_llm_s",
    "moh_small",
    "moh_vit_base_50",
    "moh_vit_base_75",
    "moh_vit_digits",
    "moh_vit_small_75",
    "moh_vit_small_80",
    "straight_through",
    "watch_routing",
]

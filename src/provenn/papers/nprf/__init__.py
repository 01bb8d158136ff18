"""Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding (arXiv:2106.12566)."""

from provenn.papers.nprf.baselines import LinformerAttention, SoftmaxAttentionRPE
from provenn.papers.nprf.diagnosis import Diagnosis, attention_rows, diagnose, diagnose_model
from provenn.papers.nprf.layers import KernelAttentionRPE, RelativeBias
from provenn.papers.nprf.model import (
    ATTENTIONS,
    Translator,
    VisionTransformer,
    attention_called,
    kernelized,
    nprf_encoder_base,
    nprf_encoder_tiny,
    nprf_lm_base,
    nprf_lm_tiny,
    nprf_pixels_base,
    nprf_translator_base,
    nprf_translator_tiny,
    nprf_vit_base,
    nprf_vit_tiny,
)

__all__ = [
    "ATTENTIONS",
    "Diagnosis",
    "KernelAttentionRPE",
    "LinformerAttention",
    "RelativeBias",
    "SoftmaxAttentionRPE",
    "Translator",
    "VisionTransformer",
    "attention_called",
    "attention_rows",
    "diagnose",
    "diagnose_model",
    "kernelized",
    "nprf_encoder_base",
    "nprf_encoder_tiny",
    "nprf_lm_base",
    "nprf_lm_tiny",
    "nprf_pixels_base",
    "nprf_translator_base",
    "nprf_translator_tiny",
    "nprf_vit_base",
    "nprf_vit_tiny",
]

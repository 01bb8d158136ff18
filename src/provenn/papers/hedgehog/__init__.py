"""The Hedgehog & the Porcupine: expressive linear attentions with softmax mimicry (arXiv:2402.04347)."""

from provenn.papers.hedgehog.diagnostics import (
    attention_entropy,
    cross_entropy,
    divergence,
    inverted_pairs,
    rank_correlation,
    softmax_weights,
)
from provenn.papers.hedgehog.distillation import distillation_loss, linearise, restore, teaching
from provenn.papers.hedgehog.layers import MAPS, HedgehogAttention, HedgehogFeatureMap, LinearAttention
from provenn.papers.hedgehog.task import distill

__all__ = [
    "MAPS",
    "HedgehogAttention",
    "HedgehogFeatureMap",
    "LinearAttention",
    "attention_entropy",
    "cross_entropy",
    "distill",
    "distillation_loss",
    "divergence",
    "inverted_pairs",
    "linearise",
    "rank_correlation",
    "restore",
    "softmax_weights",
    "teaching",
]

"""Bayes-PFL: prompts drawn from learned distributions, for defects in categories never seen (arXiv:2503.10080)."""

from provenn.papers.bayes_pfl.layers import (
    Draw,
    FlowParameters,
    GaussianEncoder,
    PatchPooling,
    PromptDistribution,
    ResidualCrossModalAttention,
    constrain,
    dice_loss,
    focal_loss,
    kl_estimate,
    orthogonal_loss,
    planar_flow,
    smooth,
)
from provenn.papers.bayes_pfl.model import (
    BayesPFL,
    Explanation,
    Samples,
    Seen,
    bayes_clip,
    bayes_defects,
    bayes_vit_b16,
    bayes_vit_l14,
)
from provenn.papers.bayes_pfl.official import openai_clip
from provenn.papers.bayes_pfl.one_category import bayes_for_category
from provenn.papers.bayes_pfl.protocol import official_scores, top_means
from provenn.papers.bayes_pfl.training import stages
from provenn.papers.bayes_pfl.training.figures import figures_by_protocol

__all__ = [
    "BayesPFL",
    "Draw",
    "Explanation",
    "FlowParameters",
    "GaussianEncoder",
    "PatchPooling",
    "PromptDistribution",
    "ResidualCrossModalAttention",
    "Samples",
    "Seen",
    "bayes_clip",
    "bayes_defects",
    "bayes_for_category",
    "bayes_vit_b16",
    "bayes_vit_l14",
    "constrain",
    "dice_loss",
    "figures_by_protocol",
    "focal_loss",
    "kl_estimate",
    "official_scores",
    "openai_clip",
    "orthogonal_loss",
    "planar_flow",
    "smooth",
    "stages",
    "top_means",
]

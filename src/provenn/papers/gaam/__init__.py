"""Gaussian Adaptive Attention is All You Need (arXiv:2401.11143)."""

from provenn.papers.gaam.layers import (
    GQDAAM,
    GaussianAdaptiveAttention,
    GroupedQueryAttention,
    importance_factor,
    layer_shares,
)
from provenn.papers.gaam.mixture import GaussianMixtureAttention, GaussianMixtureBlock, equal_gaussian
from provenn.papers.gaam.model import (
    AudioClassifier,
    LayerAttention,
    StackClassifier,
    StackEncoder,
    gaam_agnews,
    gaam_cifar100,
    gaam_iemocap,
    gaam_small,
    gaam_v2_cifar100,
    gaam_v2_iemocap,
    gqdaam_agnews,
    gqdaam_iemocap,
    mha_bn_iemocap,
    mha_cifar100,
    mixture_cifar100,
    pool_tokens,
)
from provenn.papers.gaam.probe import LayerStackProbe, read_stacks

__all__ = [
    "GQDAAM",
    "AudioClassifier",
    "GaussianAdaptiveAttention",
    "GaussianMixtureAttention",
    "GaussianMixtureBlock",
    "GroupedQueryAttention",
    "LayerAttention",
    "LayerStackProbe",
    "StackClassifier",
    "StackEncoder",
    "equal_gaussian",
    "gaam_agnews",
    "gaam_cifar100",
    "gaam_iemocap",
    "gaam_small",
    "gaam_v2_cifar100",
    "gaam_v2_iemocap",
    "gqdaam_agnews",
    "gqdaam_iemocap",
    "importance_factor",
    "layer_shares",
    "mha_bn_iemocap",
    "mha_cifar100",
    "mixture_cifar100",
    "pool_tokens",
    "read_stacks",
]

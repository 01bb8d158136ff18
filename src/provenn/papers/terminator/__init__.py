"""HyperZ⋅Z⋅W Operator Connects Slow-Fast Networks for Full Context Interaction (arXiv:2401.17948)."""

from provenn.papers.terminator.layers import (
    GIBS,
    RGU,
    BatchStandardization,
    HyperChannelInteraction,
    HyperInteraction,
    HyperKernel,
    HyperZZWGlobal,
    HyperZZWLocal,
    LocalHyperKernel,
    SFNEBlock,
    global_product,
    instance_standardize,
    renormalize,
)
from provenn.papers.terminator.model import (
    Terminator2d,
    slow_neural_loss,
    terminator_cifar10,
    terminator_cifar100,
    terminator_mini,
)
from provenn.papers.terminator.optim import Kar2, Kar3

__all__ = [
    "GIBS",
    "RGU",
    "BatchStandardization",
    "HyperChannelInteraction",
    "HyperInteraction",
    "HyperKernel",
    "HyperZZWGlobal",
    "HyperZZWLocal",
    "Kar2",
    "Kar3",
    "LocalHyperKernel",
    "SFNEBlock",
    "Terminator2d",
    "global_product",
    "instance_standardize",
    "renormalize",
    "slow_neural_loss",
    "terminator_cifar10",
    "terminator_cifar100",
    "terminator_mini",
]

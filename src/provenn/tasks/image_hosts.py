"""Hosts that classify images: one with a gate on every branch, one of residual branches, and backbones as they are."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from provenn.nn.channel_gates import CBAM, SqueezeExcitation
from provenn.nn.hosts import ResidualHost
from provenn.nn.mobilenet import MobileNetV2
from provenn.nn.resnet import BasicBlock, ResNet, resnet20
from provenn.tasks.hosts import Factory, Host, budgets
from provenn.tasks.image_classification import TASK

_SGD = {"batch_size": 64, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "schedule": "onecycle"}
_ADAMW = {
    "batch_size": 64, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 5e-2, "schedule": "onecycle", "clip": 1.0
}  # fmt: skip


def _gated_resnet(gate: Factory, options: dict[str, Any]) -> nn.Module:
    return resnet20(gate=gate, **options)


GATED = Host(
    TASK.name,
    _gated_resnet,
    lambda: {"none": nn.Identity, "se": SqueezeExcitation, "cbam": CBAM},
    budgets(_SGD, 8, 100),
    (0.03, 0.1, 0.3),
    "ResNet-20 with a gate on every branch",
)


class Sum(nn.Module):
    """The plain join of a residual branch, x + f(x)."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: torch.Tensor, f: Callable[[torch.Tensor], torch.Tensor], depth: int) -> torch.Tensor:
        return x + f(x)


def _residual_tower(join: Factory, options: dict[str, Any]) -> nn.Module:
    return ResidualHost(join, **options)


TOWER = Host(
    TASK.name,
    _residual_tower,
    lambda: {"sum": Sum},
    budgets({**_SGD, "lr": 0.02}, 15, 100),
    (0.007, 0.02, 0.06),
    "a tower of 24 branches, 64 wide, without normalisation",
)


def _bare_backbone(backbone: Factory, options: dict[str, Any]) -> nn.Module:
    return backbone(num_classes=options["num_classes"], in_channels=options["in_channels"])


def _backbones() -> dict[str, Factory]:
    # Both halve a small image twice, as ResNet-20 does, and have about as many parameters.
    small = ((1, 16, 1, 1), (4, 24, 2, 1), (4, 40, 3, 2), (4, 80, 3, 2))
    resnet = partial(ResNet, BasicBlock, (2, 2, 2), widths=(16, 32, 64), stem="small")
    mobilenet = partial(MobileNetV2, settings=small, stem_stride=1, last=320, dropout=0.0)
    return {"resnet14": resnet, "mobilenet": mobilenet}


BACKBONE = Host(
    TASK.name,
    _bare_backbone,
    _backbones,
    budgets(_ADAMW, 5, 100),
    (1e-3, 3e-3, 1e-2),
    "each network as it is, from random weights",
)

"""Hosts that learn identities: a small ResNet whose late maps a mixer changes, and one with a gate on every branch."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.channel_gates import CBAM, SqueezeExcitation
from provenn.nn.embedding import EmbeddingNetwork
from provenn.nn.resnet import BasicBlock, ResNet
from provenn.tasks.base import TaskData
from provenn.tasks.hosts import Factory, Host, budgets
from provenn.tasks.re_identification import TASK

WIDTHS = (16, 32, 64)  # of the stages
SIZES = {"height": 64, "width": 32}  # of the pictures, the user's too: attention over a late map has 512 places
LATE = 2  # stages, the last ones, that a mixer follows
_ADAMW = {
    "batch_size": 16, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 5e-4, "schedule": "onecycle",
    "label_smoothing": 0.1,
}  # fmt: skip


class MixedMap(nn.Module):
    """A mixer beside a map: x + f(BN(x)).

    Args:
        mixer: f, of maps of this width.
        channels: that width.

    Shapes: (batch, channels, height, width) to the same.
    """

    def __init__(self, mixer: nn.Module, channels: int):
        super().__init__()
        self.norm, self.mixer = nn.BatchNorm2d(channels), mixer

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return x + self.mixer(self.norm(x))


class Nothing(nn.Module):
    """A branch of zeros: the network without any mixer."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.zeros_like(x)


def depthwise(channels: int) -> nn.Module:
    """A 3×3 convolution of each channel by itself: mixes space without attention."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


def _backbone(gate: Factory | None = None) -> ResNet:
    return ResNet(BasicBlock, (1, 1, 1), widths=WIDTHS, stem="small", num_classes=0, gate=gate)


def _mixed(mixer: Factory, options: dict[str, Any]) -> nn.Module:
    backbone = _backbone()
    for name, width in list(zip(backbone.stage_names, WIDTHS, strict=True))[-LATE:]:
        stage: Any = backbone.get_submodule(name)
        stage.append(MixedMap(mixer(width), width))
    return EmbeddingNetwork(backbone, options["num_classes"])


def _gated(gate: Factory, options: dict[str, Any]) -> nn.Module:
    return EmbeddingNetwork(_backbone(gate), options["num_classes"])


def one_picture(data: TaskData) -> tuple[Tensor, Tensor]:
    """A test picture, and an identity of training for the loss: what a network costs does not depend on which."""
    return data.test[0][0][None], torch.zeros(1, dtype=torch.long)


MIXED = Host(
    TASK.name,
    _mixed,
    lambda: {"none": Nothing, "depthwise": depthwise},
    budgets(_ADAMW, 60, 120),
    (1e-3, 3e-3, 1e-2),
    "a small ResNet of identities with a mixer beside each of its two late stages",
    SIZES,
    example=one_picture,
)
GATED = Host(
    TASK.name,
    _gated,
    lambda: {"none": nn.Identity, "se": SqueezeExcitation, "cbam": CBAM},
    budgets(_ADAMW, 60, 120),
    (1e-3, 3e-3, 1e-2),
    "a small ResNet of identities with a gate on every branch",
    SIZES,
    example=one_picture,
)

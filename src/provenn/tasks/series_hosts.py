"""The host that classifies series: a small causal encoder."""

from functools import partial
from typing import Any

from torch import nn

from provenn.nn.attention import SoftmaxAttention
from provenn.nn.hosts import SeriesHost
from provenn.nn.mixers import NoMixer
from provenn.tasks.hosts import Factory, Host, budgets
from provenn.tasks.series_classification import TASK


def _encoder(mixer: Factory, options: dict[str, Any]) -> nn.Module:
    return SeriesHost(mixer, channels=options["channels"], num_classes=options["num_classes"])


ENCODER = Host(
    TASK.name,
    _encoder,
    lambda: {"none": NoMixer, "softmax": partial(SoftmaxAttention, heads=4)},
    budgets({"batch_size": 16, "optimizer": "radam", "lr": 1e-3, "clip": 4.0}, 25, 60),
    (3e-4, 1e-3, 3e-3),
    "a causal encoder of two layers, 64 wide",
)

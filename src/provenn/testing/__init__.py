"""The checks that every paper keeps, as functions anyone can call on their own mechanism.

>>> import torch
>>> from torch import nn
>>> class Gate(nn.Module):
...     def __init__(self, channels):
...         super().__init__()
...         if channels < 1:
...             raise ValueError(f"channels must be at least 1, got {channels}")
...         self.scale = nn.Parameter(torch.ones(channels, 1, 1))
...
...     def forward(self, x):
...         return x * self.scale.sigmoid()
>>> check_mechanism(Gate, "channel-gate", only=["keep-shape", "reach-parameters", "refuse-bad-arguments"])
>>> check_mechanism(nn.BatchNorm2d, "channel-gate", only=["refuse-bad-arguments"])
Traceback (most recent call last):
...
provenn.testing.checks.FailedCheck: BatchNorm2d as channel-gate
  refuse-bad-arguments: channels=0 must raise ValueError that names it, nothing was raised
"""

from provenn.testing.checks import FailedCheck, check_mechanism, check_paper, checks_of
from provenn.testing.common import CHECKS, unchecked
from provenn.testing.seeded import seeded_array, seeded_state

__all__ = [
    "CHECKS",
    "FailedCheck",
    "check_mechanism",
    "check_paper",
    "checks_of",
    "seeded_array",
    "seeded_state",
    "unchecked",
]

"""Softmax attention over all pairs, with every derivative."""

from .fast import softmax_attention
from .reference import explicit

__all__ = ["explicit", "softmax_attention"]

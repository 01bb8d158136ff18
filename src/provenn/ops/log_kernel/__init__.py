"""Causal attention by positive features of which only the logarithms fit a floating-point number."""

from .fast import LogState, log_attention
from .reference import log_attention_weights

__all__ = ["LogState", "log_attention", "log_attention_weights"]

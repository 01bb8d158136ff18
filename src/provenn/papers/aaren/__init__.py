"""Attention as an RNN (arXiv:2405.13956)."""

from provenn.papers.aaren.layers import AarenAttention, AarenEncoder, AarenEncoderLayer, attention_rnn
from provenn.papers.aaren.model import (
    DecisionTransformer,
    EventForecaster,
    Forecaster,
    SeriesClassifier,
    aaren_d512,
    transformer_d512,
)

__all__ = [
    "AarenAttention",
    "AarenEncoder",
    "AarenEncoderLayer",
    "DecisionTransformer",
    "EventForecaster",
    "Forecaster",
    "SeriesClassifier",
    "aaren_d512",
    "attention_rnn",
    "transformer_d512",
]

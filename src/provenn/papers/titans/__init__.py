"""Titans: Learning to Memorize at Test Time (arXiv:2501.00663)."""

from provenn.papers.titans.layers import (
    LongTermMemory,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    NeuralMemory,
    frozen_memory,
    observe_surprise,
)
from provenn.papers.titans.model import (
    Forecaster,
    SequenceClassifier,
    titans_1_3b,
    titans_170m,
    titans_340m,
    titans_400m,
    titans_760m,
    titans_lm,
    titans_mixer,
)

__all__ = [
    "Forecaster",
    "LongTermMemory",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "NeuralMemory",
    "SequenceClassifier",
    "frozen_memory",
    "observe_surprise",
    "titans_1_3b",
    "titans_170m",
    "titans_340m",
    "titans_400m",
    "titans_760m",
    "titans_lm",
    "titans_mixer",
]

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

__all__ = [
    "LongTermMemory",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "NeuralMemory",
    "frozen_memory",
    "observe_surprise",
]

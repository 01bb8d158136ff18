"""Titans (Behrouz, Zhong and Mirrokni, 2024, arXiv:2501.00663): a neural memory, and three ways to build it in."""

from provenn.papers.titans.layers.memory import (
    MemoryOptions,
    NeuralMemory,
    NeuralState,
    frozen_memory,
    observe_surprise,
)
from provenn.papers.titans.layers.variants import (
    Join,
    LongTermMemory,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
)

__all__ = [
    "Join",
    "LongTermMemory",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryOptions",
    "NeuralMemory",
    "NeuralState",
    "frozen_memory",
    "observe_surprise",
]

"""Residual U-Net with attention for pressure ulcers, and the care system around it (Chae et al., 2021, 2101.09433)."""

from provenn.papers.pressure_ulcer.layers import AttentionGate, Block
from provenn.papers.pressure_ulcer.model import ResidualAttentionUNet, open_gates
from provenn.papers.pressure_ulcer.transfer import read_start, reestimate_norms, transfer

__all__ = [
    "AttentionGate",
    "Block",
    "ResidualAttentionUNet",
    "open_gates",
    "read_start",
    "reestimate_norms",
    "transfer",
]

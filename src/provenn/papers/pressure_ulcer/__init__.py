"""Residual U-Net with attention for pressure ulcers, and the care system around it (Chae et al., 2021, 2101.09433)."""

from provenn.papers.pressure_ulcer.analysis import Scale, WoundReport, WoundTracker, analyse, read_scale
from provenn.papers.pressure_ulcer.augment import basins, colour_jitter, reflect, rotate, snap_mask, turn, watershed
from provenn.papers.pressure_ulcer.layers import AttentionGate, Block
from provenn.papers.pressure_ulcer.losses import overlap_scores, wound_loss
from provenn.papers.pressure_ulcer.model import ResidualAttentionUNet, open_gates
from provenn.papers.pressure_ulcer.task.segmenting import probability, segment
from provenn.papers.pressure_ulcer.transfer import read_start, reestimate_norms, transfer

__all__ = [
    "AttentionGate",
    "Block",
    "ResidualAttentionUNet",
    "Scale",
    "WoundReport",
    "WoundTracker",
    "analyse",
    "basins",
    "colour_jitter",
    "open_gates",
    "overlap_scores",
    "probability",
    "read_scale",
    "read_start",
    "reestimate_norms",
    "reflect",
    "rotate",
    "segment",
    "snap_mask",
    "transfer",
    "turn",
    "watershed",
    "wound_loss",
]

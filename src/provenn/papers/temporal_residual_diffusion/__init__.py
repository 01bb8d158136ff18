"""Temporal residual guided diffusion: video from the events of an event camera (arXiv:2407.10636)."""

from provenn.papers.temporal_residual_diffusion.denoiser import (
    Denoiser,
    Design,
    EventAttention,
    EventJoin,
    TemporalEncoder,
)
from provenn.papers.temporal_residual_diffusion.diffusion import Schedule
from provenn.papers.temporal_residual_diffusion.layers import E2VID, ConvGRU, ConvLSTM, FireNet
from provenn.papers.temporal_residual_diffusion.model import (
    Memory,
    Reconstructor,
    Regression,
    ResidualRegression,
    Stream,
    TemporalResidualDiffusion,
)
from provenn.papers.temporal_residual_diffusion.presets import e2vid, e2vid_small, firenet, trd_base, trd_small
from provenn.papers.temporal_residual_diffusion.simulator import (
    V2E,
    Events,
    Sensor,
    Simulator,
    integrated,
    simulate_events,
)
from provenn.papers.temporal_residual_diffusion.voxels import (
    events_to_voxel,
    normalised,
    windows,
    without_hot_pixels,
)

__all__ = [
    "E2VID",
    "V2E",
    "ConvGRU",
    "ConvLSTM",
    "Denoiser",
    "Design",
    "EventAttention",
    "EventJoin",
    "Events",
    "FireNet",
    "Memory",
    "Reconstructor",
    "Regression",
    "ResidualRegression",
    "Schedule",
    "Sensor",
    "Simulator",
    "Stream",
    "TemporalEncoder",
    "TemporalResidualDiffusion",
    "e2vid",
    "e2vid_small",
    "events_to_voxel",
    "firenet",
    "integrated",
    "normalised",
    "simulate_events",
    "trd_base",
    "trd_small",
    "windows",
    "without_hot_pixels",
]

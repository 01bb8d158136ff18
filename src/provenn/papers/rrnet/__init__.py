"""RRNet: stellar parameters and abundances from spectra, with their uncertainty (arXiv:2205.15490)."""

from provenn.papers.rrnet.model import (
    DeepEnsemble,
    Normal,
    ResidualBlock,
    RRNet,
    SegmentRNN,
    StarNet,
    gaussian_nll,
    mixture,
    rrnet_ca,
    rrnet_small,
    rrnet_sp,
    starnet_ca,
    starnet_sp,
)
from provenn.papers.rrnet.spectra import LAMOST, Arm, continuum, normalise_spectrum, to_rest, without_cosmic_rays

__all__ = [
    "LAMOST",
    "Arm",
    "DeepEnsemble",
    "Normal",
    "RRNet",
    "ResidualBlock",
    "SegmentRNN",
    "StarNet",
    "continuum",
    "gaussian_nll",
    "mixture",
    "normalise_spectrum",
    "rrnet_ca",
    "rrnet_small",
    "rrnet_sp",
    "starnet_ca",
    "starnet_sp",
    "to_rest",
    "without_cosmic_rays",
]

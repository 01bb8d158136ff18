"""RRNet: stellar parameters and abundances from spectra, with their uncertainty (arXiv:2205.15490)."""

from provenn.papers.rrnet.model import DeepEnsemble, Normal, RRNet, SegmentRNN, StarNet, gaussian_nll, mixture

__all__ = ["DeepEnsemble", "Normal", "RRNet", "SegmentRNN", "StarNet", "gaussian_nll", "mixture"]

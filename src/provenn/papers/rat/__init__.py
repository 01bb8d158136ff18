"""RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (arXiv:2507.04416)."""

from provenn.papers.rat.layers import RATMixer, RNNMixer

__all__ = ["RATMixer", "RNNMixer"]

"""RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling (arXiv:2507.04416)."""

from provenn.papers.rat.layers import RATMixer, RNNMixer
from provenn.papers.rat.model import (
    attention_small,
    attention_swa_small,
    attention_swa_xl,
    attention_xl,
    rat_small,
    rat_swa_small,
    rat_swa_xl,
    rat_xl,
    rnn_small,
    rnn_xl,
)

__all__ = [
    "RATMixer",
    "RNNMixer",
    "attention_small",
    "attention_swa_small",
    "attention_swa_xl",
    "attention_xl",
    "rat_small",
    "rat_swa_small",
    "rat_swa_xl",
    "rat_xl",
    "rnn_small",
    "rnn_xl",
]

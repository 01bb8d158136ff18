"""BEVANet: Bilateral Efficient Visual Attention Network for Real-Time Semantic Segmentation (arXiv:2508.07300)."""

from provenn.papers.bevanet.fusion import BGAF, PAG, Bag
from provenn.papers.bevanet.layers import CKS, EVA, LKA, LSKA, SDLSKA, ParallelKernels, SelectedStrips, reach
from provenn.papers.bevanet.losses import boundaries, boundary_loss, class_weights, hard_pixel_loss
from provenn.papers.bevanet.model import BEVANet, BEVANetClassifier, TrainingLogits
from provenn.papers.bevanet.official import pretrained
from provenn.papers.bevanet.pooling import DAPPM, DLKPPM, PAPPM

__all__ = [
    "BGAF",
    "CKS",
    "DAPPM",
    "DLKPPM",
    "EVA",
    "LKA",
    "LSKA",
    "PAG",
    "PAPPM",
    "SDLSKA",
    "BEVANet",
    "BEVANetClassifier",
    "Bag",
    "ParallelKernels",
    "SelectedStrips",
    "TrainingLogits",
    "boundaries",
    "boundary_loss",
    "class_weights",
    "hard_pixel_loss",
    "pretrained",
    "reach",
]

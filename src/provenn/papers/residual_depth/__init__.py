"""On residual network depth (Dherin & Munn, 2025, arXiv:2510.03470)."""

from .layers import ResidualTower, expansion_report, fold, geometric_complexity, residual_expansion, scale_residuals
from .model import ByteTransformer, CifarResNet, ResidualMLP

__all__ = [
    "ByteTransformer",
    "CifarResNet",
    "ResidualMLP",
    "ResidualTower",
    "expansion_report",
    "fold",
    "geometric_complexity",
    "residual_expansion",
    "scale_residuals",
]

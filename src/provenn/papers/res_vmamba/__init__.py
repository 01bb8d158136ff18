"""Res-VMamba: selective scans in four routes, with residual paths around the stages (arXiv:2402.15761)."""

from provenn.papers.res_vmamba.layers import (
    SS2D,
    PatchMerging,
    RandomProjection,
    ResidualProjection,
    VSSBlock,
    cross_merge,
    cross_scan,
)
from provenn.papers.res_vmamba.mamba import Mamba, MambaState
from provenn.papers.res_vmamba.model import (
    ResVMamba,
    res_vmamba_base,
    res_vmamba_mini,
    res_vmamba_small,
    res_vmamba_tiny,
    vmamba_base,
    vmamba_small,
    vmamba_tiny,
)

__all__ = [
    "SS2D",
    "Mamba",
    "MambaState",
    "PatchMerging",
    "RandomProjection",
    "ResVMamba",
    "ResidualProjection",
    "VSSBlock",
    "cross_merge",
    "cross_scan",
    "res_vmamba_base",
    "res_vmamba_mini",
    "res_vmamba_small",
    "res_vmamba_tiny",
    "vmamba_base",
    "vmamba_small",
    "vmamba_tiny",
]

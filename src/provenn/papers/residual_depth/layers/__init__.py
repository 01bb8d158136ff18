"""The residual tower, its scales and its expansion (Dherin & Munn, 2025, arXiv:2510.03470)."""

from .complexity import estimate_geometric_complexity, geometric_complexity
from .expansion import (
    Expansion,
    PathLengths,
    branches,
    chain,
    enumerate_chains,
    enumerate_level,
    level_terms,
    path_lengths,
    residual_expansion,
    sample_chains,
)
from .jets import nested_taylor, taylor
from .patch import find_branches, fold_residuals, remove_norms, scale_residuals
from .policies import (
    POLICIES,
    BatchNormBranch,
    ConstantScale,
    Fixup,
    InverseDepth,
    InverseSqrtDepth,
    LayerNormBranch,
    LayerScale,
    ScalarBias,
    ScalePolicy,
    SkipInit,
    make_policy,
)
from .report import TowerReport, expansion_report
from .tower import ResidualTower, fold

__all__ = [
    "POLICIES",
    "BatchNormBranch",
    "ConstantScale",
    "Expansion",
    "Fixup",
    "InverseDepth",
    "InverseSqrtDepth",
    "LayerNormBranch",
    "LayerScale",
    "PathLengths",
    "ResidualTower",
    "ScalarBias",
    "ScalePolicy",
    "SkipInit",
    "TowerReport",
    "branches",
    "chain",
    "enumerate_chains",
    "enumerate_level",
    "estimate_geometric_complexity",
    "expansion_report",
    "find_branches",
    "fold",
    "fold_residuals",
    "geometric_complexity",
    "level_terms",
    "make_policy",
    "nested_taylor",
    "path_lengths",
    "remove_norms",
    "residual_expansion",
    "sample_chains",
    "scale_residuals",
    "taylor",
]

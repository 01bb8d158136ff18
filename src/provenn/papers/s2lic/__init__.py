"""S2LIC: image compression with Swin V2 and adaptive channel-wise and global-inter contexts (arXiv:2403.14471)."""

from provenn.papers.s2lic.context import ChannelContext, DeformableAttention, GlobalContext
from provenn.papers.s2lic.entropy import FactorizedPrior
from provenn.papers.s2lic.model import S2LIC, Sizes, s2lic
from provenn.papers.s2lic.transforms import RS2TB, DenseEnhancement, SwinV2Block

__all__ = [
    "RS2TB",
    "S2LIC",
    "ChannelContext",
    "DeformableAttention",
    "DenseEnhancement",
    "FactorizedPrior",
    "GlobalContext",
    "Sizes",
    "SwinV2Block",
    "s2lic",
]

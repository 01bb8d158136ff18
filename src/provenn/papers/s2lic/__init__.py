"""S2LIC: image compression with Swin V2 and adaptive channel-wise and global-inter contexts (arXiv:2403.14471)."""

from provenn.papers.s2lic.codec import Codec, Header
from provenn.papers.s2lic.context import ChannelContext, DeformableAttention, GlobalContext, anchors, squeeze, unsqueeze
from provenn.papers.s2lic.entropy import FactorizedPrior
from provenn.papers.s2lic.model import S2LIC, LatentCoder, Sizes, s2lic, s2lic_small
from provenn.papers.s2lic.task.metrics import bd_rate, ms_ssim
from provenn.papers.s2lic.transforms import RS2TB, DenseEnhancement, SwinV2Block

__all__ = [
    "RS2TB",
    "S2LIC",
    "ChannelContext",
    "Codec",
    "DeformableAttention",
    "DenseEnhancement",
    "FactorizedPrior",
    "GlobalContext",
    "Header",
    "LatentCoder",
    "Sizes",
    "SwinV2Block",
    "anchors",
    "bd_rate",
    "ms_ssim",
    "s2lic",
    "s2lic_small",
    "squeeze",
    "unsqueeze",
]

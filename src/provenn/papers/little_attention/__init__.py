"""A little bit attention for person re-identification (Eisenbach et al., 2023, arXiv:2302.14574).

C-NL, the block that the paper proposes, is here a reconstruction: its arithmetic is inferred.
"""

from provenn.nn.following import Sighted, follow
from provenn.papers.little_attention.harmonious import HarmoniousAttention, HarmoniousChannelAttention
from provenn.papers.little_attention.layers import ChannelNonLocal
from provenn.papers.little_attention.losses import circle_loss, pair_circle_loss
from provenn.papers.little_attention.model import (
    CircleNetwork,
    cnl_regions,
    cnl_resnet50_1,
    cnl_resnet50_2,
    cnl_resnet50_3,
    resnet50_reid,
    resnet101_reid,
    with_head,
)
from provenn.papers.little_attention.penalties import eigenvalue_gap
from provenn.papers.little_attention.placement import Placement, insert
from provenn.papers.little_attention.zoo import (
    BAM,
    BLOCKS,
    CBAM,
    ECA,
    ChannelAffinity,
    GlobalContext,
    NonLocal,
    PositionAttention,
    RelationAware,
    make_block,
)

__all__ = [
    "BAM",
    "BLOCKS",
    "CBAM",
    "ECA",
    "ChannelAffinity",
    "ChannelNonLocal",
    "CircleNetwork",
    "GlobalContext",
    "HarmoniousAttention",
    "HarmoniousChannelAttention",
    "NonLocal",
    "Placement",
    "PositionAttention",
    "RelationAware",
    "Sighted",
    "circle_loss",
    "cnl_regions",
    "cnl_resnet50_1",
    "cnl_resnet50_2",
    "cnl_resnet50_3",
    "eigenvalue_gap",
    "follow",
    "insert",
    "make_block",
    "pair_circle_loss",
    "resnet50_reid",
    "resnet101_reid",
    "with_head",
]

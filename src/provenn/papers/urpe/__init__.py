"""Your Transformer May Not be as Powerful as You Expect (arXiv:2205.13401)."""

from provenn.papers.urpe.graphs import GraphRegressor, urpe_graph_tiny, urpe_graphormer_slim
from provenn.papers.urpe.layers import URPEAttention, share_tables
from provenn.papers.urpe.model import SequenceEncoder, urpe_lm_tiny, urpe_synthetic, urpe_synthetic_tiny
from provenn.papers.urpe.relations import LogBuckets, Offsets, Paths, Relations, Window
from provenn.papers.urpe.theory import TheoryBlock, attentive, least_error, position_aware, row_spread, row_sums
from provenn.papers.urpe.transformer_xl import TransformerXL, urpe_transformer_xl, urpe_transformer_xl_tiny

__all__ = [
    "GraphRegressor",
    "LogBuckets",
    "Offsets",
    "Paths",
    "Relations",
    "SequenceEncoder",
    "TheoryBlock",
    "TransformerXL",
    "URPEAttention",
    "Window",
    "attentive",
    "least_error",
    "position_aware",
    "row_spread",
    "row_sums",
    "share_tables",
    "urpe_graph_tiny",
    "urpe_graphormer_slim",
    "urpe_lm_tiny",
    "urpe_synthetic",
    "urpe_synthetic_tiny",
    "urpe_transformer_xl",
    "urpe_transformer_xl_tiny",
]

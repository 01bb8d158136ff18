"""RCAR: regulators of correspondence and aggregation for image-text matching (arXiv:2303.13371)."""

from provenn.papers.rcar.encoders import PictureEncoder, RegionEncoder, WordEncoder, augment_words, hinge
from provenn.papers.rcar.hosts import RCAR, Similarity, Step
from provenn.papers.rcar.layers import (
    AggregationRegulator,
    AlignmentVector,
    CorrespondenceRegulator,
    RegulatedCrossAttention,
    attention_weights,
    l2_normalise,
    regulated_attention,
    scaled_similarities,
)
from provenn.papers.rcar.model import (
    Ensemble,
    Matching,
    base,
    mean_table,
    rar,
    rcar,
    rcar_all,
    rcar_small,
    rcr,
    scan,
    sgraf,
)

__all__ = [
    "RCAR",
    "AggregationRegulator",
    "AlignmentVector",
    "CorrespondenceRegulator",
    "Ensemble",
    "Matching",
    "PictureEncoder",
    "RegionEncoder",
    "RegulatedCrossAttention",
    "Similarity",
    "Step",
    "WordEncoder",
    "attention_weights",
    "augment_words",
    "base",
    "hinge",
    "l2_normalise",
    "mean_table",
    "rar",
    "rcar",
    "rcar_all",
    "rcar_small",
    "rcr",
    "regulated_attention",
    "scaled_similarities",
    "scan",
    "sgraf",
]

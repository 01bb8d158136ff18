"""M2R2: Mixture of Multi-Rate Residuals for Efficient Transformer Inference (arXiv:2502.02040)."""

from provenn.papers.m2r2.decoding import Statistics, decode
from provenn.papers.m2r2.layers import LatentRouter, LayerAdapters, LinearRouter, RateAdapter
from provenn.papers.m2r2.model import (
    ExitModel,
    HeadExit,
    M2R2Model,
    Streams,
    accelerate,
    draft_tiny,
    m2r2_small,
    m2r2_tiny,
    plain_decoder,
)

__all__ = [
    "ExitModel",
    "HeadExit",
    "LatentRouter",
    "LayerAdapters",
    "LinearRouter",
    "M2R2Model",
    "RateAdapter",
    "Statistics",
    "Streams",
    "accelerate",
    "decode",
    "draft_tiny",
    "m2r2_small",
    "m2r2_tiny",
    "plain_decoder",
]

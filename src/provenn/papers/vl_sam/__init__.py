"""VL-SAM: training-free open-ended detection and segmentation, attention as prompts (arXiv:2410.05963)."""

from provenn.papers.vl_sam.adapters import (
    ChatCaptioner,
    HuggingFaceCaptioner,
    SamSegmenter,
    Told,
    load_captioner,
)
from provenn.papers.vl_sam.layers import aggregate, column_factor, flow_matrix, flow_rows, head_weights
from provenn.papers.vl_sam.model import VLSAM, Flow, Found, views_of, vl_sam_llava_7b, vl_sam_scenes
from provenn.papers.vl_sam.names import parse_names
from provenn.papers.vl_sam.prompts import largest_component, point_pair

__all__ = [
    "VLSAM",
    "ChatCaptioner",
    "Flow",
    "Found",
    "HuggingFaceCaptioner",
    "SamSegmenter",
    "Told",
    "aggregate",
    "column_factor",
    "flow_matrix",
    "flow_rows",
    "head_weights",
    "largest_component",
    "load_captioner",
    "parse_names",
    "point_pair",
    "views_of",
    "vl_sam_llava_7b",
    "vl_sam_scenes",
]

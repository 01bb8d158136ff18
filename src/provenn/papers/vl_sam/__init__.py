"""VL-SAM: training-free open-ended detection and segmentation, attention as prompts (arXiv:2410.05963)."""

from provenn.papers.vl_sam.captioners import ChatCaptioner, HuggingFaceCaptioner, Told, load_captioner
from provenn.papers.vl_sam.layers import aggregate, column_factor, flow_matrix, flow_rows, head_weights
from provenn.papers.vl_sam.model import VLSAM, Flow, Found, views_of, vl_sam_llava_7b, vl_sam_scenes
from provenn.papers.vl_sam.names import parse_names
from provenn.papers.vl_sam.prompts import largest_component, point_pair
from provenn.papers.vl_sam.segmenters import Sam2Segmenter, SamSegmenter, open_segmenter

__all__ = [
    "VLSAM",
    "ChatCaptioner",
    "Flow",
    "Found",
    "HuggingFaceCaptioner",
    "Sam2Segmenter",
    "SamSegmenter",
    "Told",
    "aggregate",
    "column_factor",
    "flow_matrix",
    "flow_rows",
    "head_weights",
    "largest_component",
    "load_captioner",
    "open_segmenter",
    "parse_names",
    "point_pair",
    "views_of",
    "vl_sam_llava_7b",
    "vl_sam_scenes",
]

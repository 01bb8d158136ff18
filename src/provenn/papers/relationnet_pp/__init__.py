"""RelationNet++: Bridging Visual Representations for Object Detection via Transformer Decoder (arXiv:2010.15831)."""

from provenn.papers.relationnet_pp.bridge import Bridge, RegionBridge, attach_bvr
from provenn.papers.relationnet_pp.layers import (
    BVR,
    DirectGeometry,
    KeyAttention,
    Keys,
    PointHead,
    PointMaps,
    SharedGeometry,
    select_keys,
    sine_embedding,
)
from provenn.papers.relationnet_pp.losses import gaussian_radius, point_losses, point_targets
from provenn.papers.relationnet_pp.model import (
    BVRRetinaHead,
    bvr_atss_r50,
    bvr_faster_rcnn_r50,
    bvr_fcos_r50,
    bvr_retinanet_r50,
    bvr_retinanet_tiny,
)

__all__ = [
    "BVR",
    "BVRRetinaHead",
    "Bridge",
    "DirectGeometry",
    "KeyAttention",
    "Keys",
    "PointHead",
    "PointMaps",
    "RegionBridge",
    "SharedGeometry",
    "attach_bvr",
    "bvr_atss_r50",
    "bvr_faster_rcnn_r50",
    "bvr_fcos_r50",
    "bvr_retinanet_r50",
    "bvr_retinanet_tiny",
    "gaussian_radius",
    "point_losses",
    "point_targets",
    "select_keys",
    "sine_embedding",
]

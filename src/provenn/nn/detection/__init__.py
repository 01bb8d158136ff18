"""Detectors: boxes, assignment and losses, and RetinaNet, FCOS, ATSS, SSDLite and Faster R-CNN on any backbone."""

from provenn.nn.detection.batch import DetectionBatch, Detections, pad_batch
from provenn.nn.detection.dense import (
    ATSS,
    FCOS,
    Bridge,
    DenseDetector,
    DenseHead,
    DenseOutput,
    FocalDetector,
    RetinaNet,
)
from provenn.nn.detection.single_shot import SSDLite
from provenn.nn.detection.two_stage import FasterRCNN, RegionBridge, RegionOutput, roi_align

__all__ = [
    "ATSS",
    "FCOS",
    "Bridge",
    "DenseDetector",
    "DenseHead",
    "DenseOutput",
    "DetectionBatch",
    "Detections",
    "FasterRCNN",
    "FocalDetector",
    "RegionBridge",
    "RegionOutput",
    "RetinaNet",
    "SSDLite",
    "pad_batch",
    "roi_align",
]

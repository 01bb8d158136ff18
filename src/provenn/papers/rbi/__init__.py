"""RBI: images of a batch that attend to each other before they are classified (Le et al., 2024, arXiv:2412.19606)."""

from provenn.nn.vit import ViT
from provenn.papers.rbi.backbones import ConvNeXt, DenseNet, SmallCNN, convnext, densenet, vit_b16
from provenn.papers.rbi.layers import RPE, RRA, Related, normalised_psnr
from provenn.papers.rbi.model import (
    RBI,
    RelationLayer,
    View,
    rbi_after,
    rbi_convnext_b,
    rbi_densenet169,
    rbi_densenet201,
    rbi_regions,
    rbi_resnet50,
    rbi_vit_b16,
)
from provenn.papers.rbi.plugging import Plugged, plug_in, unplug

__all__ = [
    "RBI",
    "RPE",
    "RRA",
    "ConvNeXt",
    "DenseNet",
    "Plugged",
    "Related",
    "RelationLayer",
    "SmallCNN",
    "ViT",
    "View",
    "convnext",
    "densenet",
    "normalised_psnr",
    "plug_in",
    "rbi_after",
    "rbi_convnext_b",
    "rbi_densenet169",
    "rbi_densenet201",
    "rbi_regions",
    "rbi_resnet50",
    "rbi_vit_b16",
    "unplug",
    "vit_b16",
]

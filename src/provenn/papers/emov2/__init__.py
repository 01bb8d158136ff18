"""EMOv2: Pushing 5M Vision Model Frontier (arXiv:2412.06674)."""

from provenn.papers.emov2.detection import emov2_small_ssdlite, emov2_ssdlite
from provenn.papers.emov2.diffusion import DEMOv2, ModulatedI2RMB, emov2_diffusion, emov2_diffusion_digits
from provenn.papers.emov2.emo import EMO, emo
from provenn.papers.emov2.layers import I2RMB, SEWMHSA, group_pixels, ungroup_pixels
from provenn.papers.emov2.model import (
    EMOv2,
    emov2,
    emov2_baseline,
    emov2_retinanet,
    emov2_segmenter,
    emov2_small,
    emov2_small_retinanet,
    emov2_small_segmenter,
)

__all__ = [
    "EMO",
    "I2RMB",
    "SEWMHSA",
    "DEMOv2",
    "EMOv2",
    "ModulatedI2RMB",
    "emo",
    "emov2",
    "emov2_baseline",
    "emov2_diffusion",
    "emov2_diffusion_digits",
    "emov2_retinanet",
    "emov2_segmenter",
    "emov2_small",
    "emov2_small_retinanet",
    "emov2_small_segmenter",
    "emov2_small_ssdlite",
    "emov2_ssdlite",
    "group_pixels",
    "ungroup_pixels",
]

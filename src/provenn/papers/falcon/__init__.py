"""FALCON: visual registers for high-resolution multimodal language models (arXiv:2501.16297)."""

from provenn.papers.falcon.crops import (
    Crops,
    choose_grid,
    cut,
    cut_image,
    grids_up_to,
    markers_of,
    places_of,
    write_prompt,
)
from provenn.papers.falcon.layers import ReAtten, VisualRegisters, attend_jointly
from provenn.papers.falcon.model import (
    CropEncoder,
    Encoded,
    Falcon,
    RegisterViT,
    Tokens,
    falcon_8b,
    falcon_encoder,
    falcon_encoder_small,
    falcon_scenes,
)
from provenn.papers.falcon.official import load_stage

__all__ = [
    "CropEncoder",
    "Crops",
    "Encoded",
    "Falcon",
    "ReAtten",
    "RegisterViT",
    "Tokens",
    "VisualRegisters",
    "attend_jointly",
    "choose_grid",
    "cut",
    "cut_image",
    "falcon_8b",
    "falcon_encoder",
    "falcon_encoder_small",
    "falcon_scenes",
    "grids_up_to",
    "load_stage",
    "markers_of",
    "places_of",
    "write_prompt",
]

"""FreeEdit: image editing by instructions with a reference in them (arXiv:2409.18071)."""

from provenn.papers.freeedit.attaching import (
    Attached,
    Features,
    ReferAttention,
    attach_refer_attention,
    self_attentions,
)
from provenn.papers.freeedit.instruction import InstructionEncoder, QFormer, splice
from provenn.papers.freeedit.layers import drra, merged_drra, rasa, reference_only
from provenn.papers.freeedit.model import Design, FreeEdit, Guidance, freeedit_sd15, freeedit_small, parts_of
from provenn.papers.freeedit.start import take_stable_diffusion

__all__ = [
    "Attached",
    "Design",
    "Features",
    "FreeEdit",
    "Guidance",
    "InstructionEncoder",
    "QFormer",
    "ReferAttention",
    "attach_refer_attention",
    "drra",
    "freeedit_sd15",
    "freeedit_small",
    "merged_drra",
    "parts_of",
    "rasa",
    "reference_only",
    "self_attentions",
    "splice",
    "take_stable_diffusion",
]

"""Wings: multimodal models without text-only forgetting (Zhang et al., 2024, arXiv:2406.03496)."""

from provenn.papers.wings.adapter import (
    LearnerOptions,
    add_textual,
    attach,
    detach,
    freeze_for_stage,
    load_learners,
    options_of,
    save_learners,
)
from provenn.papers.wings.laws import Laws, attention_laws, attention_shift, laws_with_learners, shift_of
from provenn.papers.wings.layers import AttentionRouter, LowRankResidualAttention, WingsBlock
from provenn.papers.wings.model import (
    Wings,
    wings_llama3_1_8b,
    wings_qwen1_5_1_8b,
    wings_qwen1_5_7b,
    wings_small,
)

__all__ = [
    "AttentionRouter",
    "Laws",
    "LearnerOptions",
    "LowRankResidualAttention",
    "Wings",
    "WingsBlock",
    "add_textual",
    "attach",
    "attention_laws",
    "attention_shift",
    "detach",
    "freeze_for_stage",
    "laws_with_learners",
    "load_learners",
    "options_of",
    "save_learners",
    "shift_of",
    "wings_llama3_1_8b",
    "wings_qwen1_5_1_8b",
    "wings_qwen1_5_7b",
    "wings_small",
]

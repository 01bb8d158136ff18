"""FALCON's checkpoints: the authors' parameter names to ours, those of a whole model, of its encoder, or of a stage."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.falcon.model import Falcon, RegisterViT

VISION, PROJECTOR = "vision_model.", "vision2text."
_VISION = (
    (r"^vision_queries$", "registers.registers"),
    (r"^crop_embedding_h\.", "registers.rows."),
    (r"^crop_embedding_w\.", "registers.columns."),
    (r"^vision_tower\.(?:vision_model\.)?encoder\.layers\.(\d+)\.interact_attn\.", r"interact.\1.attention."),
    (r"^vision_tower\.(?:vision_model\.)?", "tower."),
)
_PROJECTOR = ((r"^0\.", "linear1."), (r"^2\.", "linear2."))
_DECODER = (
    (r"^embed_tokens\.", "embed."),
    (r"^layers\.", "blocks."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.self_attn\.q_proj\.", ".attention.query."),
    (r"\.self_attn\.k_proj\.", ".attention.key."),
    (r"\.self_attn\.v_proj\.", ".attention.value."),
    (r"\.self_attn\.o_proj\.", ".attention.out."),
    (r"\.mlp\.gate_proj\.", ".feedforward.gate."),
    (r"\.mlp\.up_proj\.", ".feedforward.linear1."),
    (r"\.mlp\.down_proj\.", ".feedforward.linear2."),
)
# Not read by the model: SigLIP's pooling head, CLIP's norm of the class token, numbers 0, 1, 2, … of positions.
_UNUSED = re.compile(r"(\.|^)vision_tower\.(vision_model\.)?head\.|\.position_ids$|\.inv_freq$")


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def rename(state: Mapping[str, Any], vision: str = "vision.") -> dict[str, Any]:
    """The authors' names to ours, of a whole model, of its encoder or of any part; what nothing reads is left out.

    Args:
        state: of a `JiutianLlamaForCausalLM`, its `vision_model`, or what a stage trained of one.
        vision: what stands before our names of the encoder.

    Raises:
        UserError: a name that is none of theirs.
    """
    ours: dict[str, Any] = {}
    for name, value in state.items():
        if _UNUSED.search(name):
            continue
        plain = re.sub(r"^(module\.)?(base_model\.model\.)?(model\.)?", "", name)
        if plain.startswith(PROJECTOR):
            ours[f"projector.{_renamed(plain.removeprefix(PROJECTOR), _PROJECTOR)}"] = value
        elif plain.startswith("lm_head."):
            ours[f"decoder.head.{plain.removeprefix('lm_head.')}"] = value
        elif plain.startswith(("embed_tokens.", "layers.", "norm.")):
            ours[f"decoder.{_renamed(plain, _DECODER)}"] = value
        else:
            plain = plain.removeprefix(VISION)
            new = _renamed(plain, _VISION)
            if new == plain:
                raise UserError(f"{name} is no parameter of FALCON: expected a state dict of the authors' model")
            ours[vision + new] = value
    return ours

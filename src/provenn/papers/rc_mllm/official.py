"""The authors' weights, which are those of transformers' Qwen2-VL: parameter names to ours."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from provenn.core.errors import UserError

# Names of transformers, old and new, to ours.
NAMES = (
    (r"^(?:model\.)?visual\.merger\.ln_q\.", "model.projector.norm."),
    (r"^(?:model\.)?visual\.merger\.mlp\.0\.", "model.projector.linear1."),
    (r"^(?:model\.)?visual\.merger\.mlp\.2\.", "model.projector.linear2."),
    (r"^(?:model\.)?visual\.", "model.vision."),
    (r"^lm_head\.", "model.decoder.head."),
    (r"^model\.(?:language_model\.)?embed_tokens\.", "model.decoder.embed."),
    (r"^model\.(?:language_model\.)?norm\.", "model.decoder.norm."),
    (r"^model\.(?:language_model\.)?layers\.", "model.decoder.blocks."),
)
INSIDE = (
    (".input_layernorm.", ".norm1."),
    (".post_attention_layernorm.", ".norm2."),
    (".self_attn.q_proj.", ".attention.query."),
    (".self_attn.k_proj.", ".attention.key."),
    (".self_attn.v_proj.", ".attention.value."),
    (".self_attn.o_proj.", ".attention.out."),
    (".mlp.gate_proj.", ".feedforward.gate."),
    (".mlp.up_proj.", ".feedforward.linear1."),
    (".mlp.down_proj.", ".feedforward.linear2."),
)
PRESETS = {(28, 1536, 151_936): "rc_qwen2_vl_2b", (28, 3584, 152_064): "rc_qwen2_vl_7b"}
HEAD = 128  # channels of a head in both sizes
TOLD = {"num_attention_heads": "heads", "rope_theta": "base", "max_position_embeddings": "max_length"}


def convert(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, preset: str | None = None, **options: Any
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From a state dict of Qwen2-VL to ours: the preset, its options, and what `load_state_dict` takes.

    Args:
        state: of `Qwen2VLForConditionalGeneration`.
        config: its config.json, for sizes that no preset has.
        preset: where neither layers nor widths are a preset's.
        options: such as `heads` and `vision_heads`, where no config says them.

    Raises:
        UserError: parameters of another model, or a size that neither shapes, config nor options say.
    """
    ours = {_renamed(name): value for name, value in state.items() if not name.endswith("inv_freq")}
    try:
        vocab, dim = ours["model.decoder.embed.weight"].shape
        hidden = len(ours["model.decoder.blocks.0.feedforward.gate.weight"])
        keys = len(ours["model.decoder.blocks.0.attention.key.weight"])
        vision, _, _, patch, _ = ours["model.vision.patch_embed.proj.weight"].shape
        inner = len(ours["model.vision.blocks.0.mlp.fc1.weight"])
    except (KeyError, ValueError, IndexError):
        raise UserError(
            "expected a state dict of Qwen2-VL with its vision tower (visual.patch_embed. …), found other parameters"
        ) from None
    layers = len({name.split(".")[3] for name in ours if name.startswith("model.decoder.blocks.")})
    known = PRESETS.get((layers, dim, vocab))
    name = known or preset or "rc_qwen2_vl_2b"
    head = ours.get("model.decoder.head.weight")
    tied = head is None or (head.shape == (vocab, dim) and torch.equal(head, ours["model.decoder.embed.weight"]))
    if tied:
        ours.pop("model.decoder.head.weight", None)
    made: dict[str, Any] = {}
    if known is None:
        depth = len({key.split(".")[3] for key in ours if key.startswith("model.vision.blocks.")})
        made = {
            "vocab_size": vocab, "dim": dim, "layers": layers, "hidden": hidden, "vision_dim": vision,
            "vision_layers": depth, "vision_hidden": inner, "patch": patch,
        }  # fmt: skip
        text = {**(config or {}), **((config or {}).get("text_config") or {})}
        made |= {mine: text[theirs] for theirs, mine in TOLD.items() if theirs in text}
        scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
        made |= {"sections": tuple(scaling["mrope_section"])} if scaling.get("mrope_section") else {}
        made |= {"base": scaling["rope_theta"]} if "rope_theta" in scaling else {}
        made |= (
            {"vision_heads": heads} if (heads := ((config or {}).get("vision_config") or {}).get("num_heads")) else {}
        )
        made |= {"image_token": token} if (token := (config or {}).get("image_token_id")) is not None else {}
    if tied != (name == "rc_qwen2_vl_2b"):
        made["tied"] = tied
    made |= {key: value for key, value in options.items() if value is not None}
    if known is None:
        if "heads" not in made or "vision_heads" not in made:
            raise UserError(
                f"no preset has {layers} layers of width {dim}: say heads and vision_heads, or put config.json beside "
                "the weights"
            )
        made["kv_heads"] = keys * made["heads"] // dim
    return name, made, ours


def _renamed(name: str) -> str:
    for pattern, replacement in NAMES:
        name, replaced = re.subn(pattern, replacement, name)
        if replaced:
            break
    if name.startswith("model.decoder."):
        for theirs, ours in INSIDE:
            name = name.replace(theirs, ours)
    return name

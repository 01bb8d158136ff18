"""Checkpoints of AIDC-AI/Wings, as its trainer writes them, to ours.

The released Wings-Qwen1_5-8B has this layout too. A checkpoint of the first stage has no routers. The trainer writes
its textual learners all the same, which are not in the graph, and which ours leaves out.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from provenn.core.errors import UserError

# Parts of names, theirs and ours, in order.
NAMES = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision.tower."),
    (r"^model\.mm_projector\.0\.", "model.projector.linear1."),
    (r"^model\.mm_projector\.2\.", "model.projector.linear2."),
    (r"^lm_head\.", "model.decoder.head."),
    (r"^model\.embed_tokens\.", "model.decoder.embed."),
    (r"^model\.norm\.", "model.decoder.norm."),
    (r"^model\.layers\.", "model.decoder.blocks."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.mlp\.gate_proj\.", ".feedforward.gate."),
    (r"\.mlp\.up_proj\.", ".feedforward.linear1."),
    (r"\.mlp\.down_proj\.", ".feedforward.linear2."),
    (r"\.self_attn\.q_proj\.", ".attention.query."),
    (r"\.self_attn\.k_proj\.", ".attention.key."),
    (r"\.self_attn\.v_proj\.", ".attention.value."),
    (r"\.self_attn\.o_proj\.", ".attention.out."),
    (r"\.attn_pool\.", ".visual."),
    (r"\.attn_t_pool\.", ".textual."),
    (r"\.reweight_module\.", ".router."),
    (r"\.q_proj\.0\.", ".query.down."),
    (r"\.q_proj\.1\.", ".query.up."),
    (r"\.k_proj\.0\.", ".key.down."),
    (r"\.k_proj\.1\.", ".key.up."),
    (r"\.v_proj\.0\.", ".value.down."),
    (r"\.v_proj\.1\.", ".value.up."),
    (r"\.o_proj\.0\.", ".out.down."),
    (r"\.o_proj\.1\.", ".out.up."),
)
# Of each preset: layers, width, vocabulary and width inside the feed-forward part; heads and base of the positions are
# the preset's.
PRESETS = {
    "wings_qwen1_5_7b": (32, 4096, 151_936, 11_008),
    "wings_qwen1_5_1_8b": (24, 2048, 151_936, 5504),
    "wings_llama3_1_8b": (32, 4096, 128_256, 14_336),
}
# How a task has to read for their weights. No word has the number −200.
READ = {"image_token": -200, "image_size": 384, "fit": "pad"}
TOLD = {  # our options, and the keys of the config that the trainer writes beside the weights
    "heads": "num_attention_heads",
    "base": "rope_theta",
    "eps": "rms_norm_eps",
    "max_length": "max_position_embeddings",
    "system_length": "system_prompt_length",
}


def convert(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, preset: str | None = None, **options: Any
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From a state dict of the authors' model to ours: the preset, its options, and what `load_state_dict` takes.

    The model computes as theirs does (`as_released`): see `WingsBlock`.

    Args:
        state: of `WingsQwen2ForCausalLM` or `WingsLlamaForCausalLM`.
        config: their config.json, for sizes that no preset has.
        preset: where neither layers nor widths are a preset's.
        options: such as `heads`, where no config says them.

    Raises:
        UserError: parameters of another model, a size that neither shapes, config nor options say, or a config with
            rotary positions that the decoder lacks.
    """
    ours = {_renamed(name): value for name, value in state.items() if not name.endswith(("inv_freq", "position_ids"))}
    try:
        vocab, dim = ours["model.decoder.embed.weight"].shape
        hidden = len(ours["model.decoder.blocks.0.feedforward.gate.weight"])
        learner = ours["model.decoder.blocks.0.visual.query.down.weight"]
        keys = len(ours["model.decoder.blocks.0.attention.key.weight"])
        shapes = _vision(ours)
    except (KeyError, ValueError, IndexError):
        raise UserError(
            "expected a state dict of a Wings model with its vision tower (model.layers.0.attn_pool. …), found other "
            "parameters"
        ) from None
    layers = len({name.split(".")[3] for name in ours if name.startswith("model.decoder.blocks.")})
    sizes = (layers, dim, vocab, hidden)
    known = next((name for name, expected in PRESETS.items() if expected == sizes), None)
    llama = "model.decoder.blocks.0.attention.query.bias" not in ours
    name = known or preset or ("wings_llama3_1_8b" if llama else "wings_qwen1_5_7b")
    made: dict[str, Any] = {"rank": len(learner), "as_released": True, **READ, **shapes}
    if "model.decoder.blocks.0.router.linear.weight" not in ours:
        made["stage"] = 1
        ours = {key: value for key, value in ours.items() if ".textual." not in key}
    else:
        made["max_len"] = ours["model.decoder.blocks.0.router.linear.weight"].shape[1]
    if known is None:
        made |= dict(zip(("layers", "dim", "vocab_size", "hidden"), sizes))
    told = {ours_: config[theirs] for ours_, theirs in TOLD.items() if config and theirs in config}
    ours.setdefault("model.decoder.head.weight", ours["model.decoder.embed.weight"])  # tied heads are not written
    made |= told | _stretch(config or {}) | {key: value for key, value in options.items() if value is not None}
    if known is None and "heads" not in made:
        raise UserError(
            f"no preset has {layers} layers of width {dim}: say heads=…, or put config.json beside the weights"
        )
    if llama and "heads" in made:
        made["kv_heads"] = keys * made["heads"] // dim
    return name, made, ours


def _stretch(config: Mapping[str, Any]) -> dict[str, Any]:
    """How rotary positions are stretched, where the config says."""
    if "rope_scaling" not in config:
        return {}
    said = config["rope_scaling"] or {}
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return {"stretch": None}
    if kind != "llama3":
        raise UserError(f"config.json has rope_scaling of the type {kind!r}; what is read: llama3, default")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    lacking = [name for name in names if name not in said]
    if lacking:
        raise UserError(f"config.json has rope_scaling of the type llama3 without {lacking[0]}")
    return {"stretch": [said[name] for name in names]}


def _vision(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of the tower that differ from SigLIP so400m's at 384 pixels; its heads have 72 channels there."""
    dim, _, patch, _ = ours["model.vision.tower.embeddings.patch_embedding.weight"].shape
    side = round(len(ours["model.vision.tower.embeddings.position_embedding.weight"]) ** 0.5)
    layers = {name.split(".")[5] for name in ours if name.startswith("model.vision.tower.encoder.layers.")}
    hidden = len(ours["model.vision.tower.encoder.layers.0.mlp.fc1.weight"])
    given = {"vision_dim": dim, "vision_layers": len(layers), "vision_hidden": hidden, "patch": patch}
    usual = {"vision_dim": 1152, "vision_layers": 26, "vision_hidden": 4304, "patch": 14}
    changed = {key: value for key, value in given.items() if value != usual[key]}
    return changed if side == 27 and patch == 14 else {**changed, "image_size": side * patch}


def _renamed(name: str) -> str:
    for number, (pattern, replacement) in enumerate(NAMES):
        name, replaced = re.subn(pattern, replacement, name)
        if replaced and not number:
            return name  # towers keep their names
    return name

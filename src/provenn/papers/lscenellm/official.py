"""LSceneLLM's checkpoints: the authors' parameter names to ours."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from provenn.core.errors import UserError

HEAD = 128  # channels of a head of LLaMA-2-7B
SCENE, PROMPT = 32_002, 32_000  # <scene_placehold> and <vp_placehold> behind the 32,000 tokens of LLaMA-2
_NAMES = (
    (r"^llm\.lm_head\.", "decoder.head."),
    (r"^llm\.model\.embed_tokens\.", "decoder.embed."),
    (r"^llm\.model\.layers\.", "decoder.blocks."),
    (r"^llm\.model\.norm\.", "decoder.norm."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
    (r"\.self_attn\.q_proj\.", ".attention.query."),
    (r"\.self_attn\.k_proj\.", ".attention.key."),
    (r"\.self_attn\.v_proj\.", ".attention.value."),
    (r"\.self_attn\.o_proj\.", ".attention.out."),
    (r"\.self_attn\.k_proj_hd\.", ".dense_key."),
    (r"\.self_attn\.v_proj_hd\.", ".dense_value."),
    (r"\.mlp\.gate_proj\.", ".feedforward.gate."),
    (r"\.mlp\.up_proj\.", ".feedforward.linear1."),
    (r"\.mlp\.down_proj\.", ".feedforward.linear2."),
    (r"^encoder_to_llm_projection\.", "projector."),
    (r"^xyz_projection\.", "xyz."),
    (r"^box_prompt_projector\.", "box."),
    (r"^click_prompt_projector\.", "click."),
    (r"^pos_emb3d\.gauss_B$", "positions.gauss"),
)
_DENSE = re.compile(r"layers\.(\d+)\.self_attn\.[kv]_proj_hd\.")
_WRAPPERS = re.compile(r"^module\.|_fsdp_wrapped_module\.|_orig_mod\.")
_BUFFERS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def rename(state: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' names to ours; tables of rotary positions are left out.

    Raises:
        UserError: a name that is none of theirs.
    """
    ours: dict[str, Any] = {}
    for name, value in state.items():
        if _BUFFERS.search(name):
            continue
        new = plain = _WRAPPERS.sub("", name)
        for pattern, said in _NAMES:
            new = re.sub(pattern, said, new)
        if new == plain:
            raise UserError(f"{name} is no parameter of LSceneLLM: expected a state dict of the authors' AdaptiveLLM")
        ours[new] = value
    return ours


def unread(names: Iterable[str]) -> list[str]:
    """Which parameters of a model with a magnifier the authors' code holds, and never reads.

    - W'_K and W'_V of the first layer of the magnifier, which only selects
    - the map of positions, which is left out where there is a magnifier

    >>> unread(["llm.model.layers.8.self_attn.k_proj_hd.weight", "llm.model.layers.9.self_attn.k_proj_hd.weight"])
    ['llm.model.layers.8.self_attn.k_proj_hd.weight']
    """
    names = list(names)
    layers = [int(found[1]) for name in names if (found := _DENSE.search(name))]
    if not layers:
        return []
    first = min(layers)
    return [
        name
        for name in names
        if "xyz_projection." in name or ((found := _DENSE.search(name)) and int(found[1]) == first)
    ]


def convert(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, preset: str | None = None, **options: Any
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From a state dict of the authors' `AdaptiveLLM` to ours: preset, options and weights.

    What their code never reads is left out: W'_K and W'_V of the first layer of the magnifier, which only selects, and
    with a magnifier the map of positions.

    Args:
        state: of their model, with or without a magnifier.
        config: not needed.
        preset: as the user gives it.
        options: of the preset; `heads` where those of the decoder are not 128 wide, and the numbers of tokens where
            they are not those of the paper, since no shape says them.

    Raises:
        UserError: parameters of another model, or of a part of one.
    """
    ours = rename(state)
    try:
        vocab, dim = ours["decoder.embed.weight"].shape
        hidden = len(ours["decoder.blocks.0.feedforward.linear1.weight"])
        queries, keys = (len(ours[f"decoder.blocks.0.attention.{part}.weight"]) for part in ("query", "key"))
        features = ours["projector.0.weight"].shape[1]
        pointed = len(ours["box.2.bias"])
    except KeyError as error:
        raise UserError(f"the authors' whole model is expected, and {error} is missing: bring its base_model") from None
    heads = options.get("heads")
    if heads is None:
        if queries % HEAD:
            raise UserError(f"the decoder's {queries} channels are no heads of {HEAD}: give their number, heads=…")
        heads = queries // HEAD
    magnified = sorted({int(name.split(".")[2]) for name in ours if name.endswith(".dense_key.weight")})
    found = {
        "vocab_size": vocab,
        "features": features,
        "dim": dim,
        "layers": len({name.split(".")[2] for name in ours if name.startswith("decoder.blocks.")}),
        "heads": heads,
        "kv_heads": keys * heads // queries,
        "hidden": hidden,
        "magnify": bool(magnified),
        "prompt_tokens": pointed // dim,
        "scene_token": options.get("scene_token", SCENE),
        "prompt_token": options.get("prompt_token", PROMPT),
    }
    left = set() if options.get("use_xyz") else set(rename(dict.fromkeys(unread(state), 0)))
    if magnified:
        found["start_layer"] = magnified[0]
        left |= {f"decoder.blocks.{magnified[0]}.{part}.weight" for part in ("dense_key", "dense_value")}
    return "lscenellm_7b", found, {name: value for name, value in ours.items() if name not in left}

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


def convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    **options: Any,
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From a state dict of the authors' whole model or of its `vision_model` to ours: preset, options and weights.

    Sizes follow from the shapes. Weights of the first three stages have no `interact_attn`, and the encoder is built
    without ReAtten; see `load_stage` for the last stage's start.

    Args:
        state: `pytorch_model.bin`, or the shards of it in one.
        config: their config.json, for the heads and positions of the decoder where it is not Llama-3.1-8B.
        preset, options: as the user gives them; `heads` of a ViT whose heads are not 64 wide.

    Raises:
        UserError: parameters of another model, or of a part of one.
    """
    ours = rename(state)
    try:
        sizes = _vision_sizes(ours)
    except (KeyError, ValueError):
        some = next(iter(state), "nothing")
        raise UserError(
            f"expected FALCON's whole model or its vision_model, found {len(state)} tensors such as {some}: what a stage "
            "trained goes into a model that is there by provenn.papers.falcon.load_stage"
        ) from None
    heads = options.get("heads", options.get("tower_heads"))
    if heads is None:
        if sizes["dim"] % 64:
            raise UserError(f"the ViT's {sizes['dim']} channels are no heads of 64: give their number, heads=…")
        heads = sizes["dim"] // 64
    sizes["heads"] = heads
    if not any(name.startswith("decoder.") for name in ours):
        encoder = {name.removeprefix("vision."): value for name, value in ours.items() if name.startswith("vision.")}
        return "falcon_encoder", sizes, {f"vit.{name}": value for name, value in encoder.items()}
    return _whole(ours, sizes, config or {}, options)


def _vision_sizes(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `falcon_encoder` that the shapes say."""
    dim, in_channels, patch, _ = ours["vision.tower.embeddings.patch_embedding.weight"].shape
    layout = "clip" if "vision.tower.embeddings.class_embedding" in ours else "siglip"
    sites = len(ours["vision.tower.embeddings.position_embedding.weight"]) - (layout == "clip")
    depth = len({name.split(".")[4] for name in ours if name.startswith("vision.tower.encoder.layers.")})
    return {
        "dim": dim,
        "depth": depth,
        "hidden": len(ours["vision.tower.encoder.layers.0.mlp.fc1.bias"]),
        "side": round(sites**0.5) * patch,
        "patch": patch,
        "in_channels": in_channels,
        "layout": layout,
        "registers": ours["vision.registers.registers"].shape[1],
        "limit": len(ours["vision.registers.rows.weight"]) - 1,
        "interact": any(name.startswith("vision.interact.") for name in ours),
    }


def load_stage(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Put what a stage of the authors trained into a model, in place: `model_trainables.bin`, or a whole checkpoint.

    Where the model has ReAtten and the file has none of its parameters, it starts as a copy of the self-attention, as
    the last stage does.

    Args:
        model: a `RegisterViT`, or a model with one inside.
        state: the authors' names.

    Returns:
        The names of the model's parameters that the file does not bring, but those of ReAtten that were copied.

    Raises:
        UserError: a parameter that the model does not have, or of another shape.
    """
    vit = next((part for part in model.modules() if isinstance(part, RegisterViT)), None)
    if vit is None:
        raise UserError(f"{type(model).__name__} has no RegisterViT inside: build a preset of falcon")
    whole: nn.Module = next((part for part in model.modules() if isinstance(part, Falcon)), vit)
    given = rename(state, "vision.vit." if whole is not vit else "")
    own = whole.state_dict()
    for name, value in given.items():
        if name not in own or own[name].shape != value.shape:
            there = f"of shape {tuple(own[name].shape)}" if name in own else "without it"
            raise UserError(f"{name} of shape {tuple(value.shape)} does not fit a model {there}")
    whole.load_state_dict({**own, **given})
    brought = set(given)
    if vit.interact is not None and not any("interact." in name for name in given):
        vit.copy_attention()
        brought |= {name for name in own if "interact." in name}
    return [name for name in own if name not in brought]

"""FALCON's checkpoints: the authors' parameter names to ours, those of a whole model, of its encoder, or of a stage."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.folders import read_config, read_tensors
from provenn.nn.vision_language import ImageChat
from provenn.papers.falcon.crops import grids_up_to, markers_of
from provenn.papers.falcon.model import Falcon, RegisterViT, falcon_8b

HEAD = 128  # channels of a head of Llama-3.1-8B
# How a task has to read for their weights: see paper.toml for the size. No word has the number −200.
READ = {"image_token": -200, "image_size": 6144, "fit": "keep"}
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
        preset: as the user gives it.
        options: likewise, of the preset; `heads`, of a whole model `tower_heads`, where those of the ViT are not 64
            wide.

    Raises:
        UserError: parameters of another model, or of a part of one.
    """
    ours = rename(state)
    try:
        sizes = _vision_sizes(ours)
    except (KeyError, ValueError):
        some = next(iter(state), "nothing")
        raise UserError(
            f"expected FALCON's whole model or its vision_model, found {len(state)} tensors such as {some}: "
            "what a stage trained goes into a model that is there by provenn.papers.falcon.load_stage"
        ) from None
    whole = any(name.startswith("decoder.") for name in ours)
    name = "tower_heads" if whole else "heads"
    if name not in options and sizes["dim"] % 64:
        raise UserError(f"the ViT's {sizes['dim']} channels are no heads of 64: give their number, {name}=…")
    sizes["heads"] = options.get(name, sizes["dim"] // 64)
    if not whole:
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


def _whole(
    ours: Mapping[str, Tensor], sizes: Mapping[str, Any], config: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Options of `falcon_8b`, and the weights of the whole model."""
    try:
        vocab, dim = ours["decoder.embed.weight"].shape
        text_hidden = len(ours["decoder.blocks.0.feedforward.linear1.weight"])
        rows = [len(ours[f"decoder.blocks.0.attention.{part}.weight"]) for part in ("query", "key")]
        head = ours["decoder.head.weight"]
    except KeyError as error:
        raise UserError(f"the language model lacks {error}: bring all shards of the checkpoint") from None
    heads = options.get("heads", config.get("num_attention_heads"))
    if heads is None:
        if rows[0] % HEAD:
            raise UserError(f"the decoder's {rows[0]} channels are no heads of {HEAD}: give their number, heads=…")
        heads = rows[0] // HEAD
    scaling = config.get("rope_scaling") or {}
    found = {
        "vocab_size": vocab,
        "registers": sizes["registers"],
        "limit": sizes["limit"],
        "interact": sizes["interact"],
        "tower_dim": sizes["dim"],
        "tower_depth": sizes["depth"],
        "tower_heads": sizes["heads"],
        "tower_hidden": sizes["hidden"],
        "side": sizes["side"],
        "patch": sizes["patch"],
        "dim": dim,
        "layers": len({name.split(".")[2] for name in ours if name.startswith("decoder.blocks.")}),
        "heads": heads,
        "kv_heads": rows[1] * heads // rows[0],
        "text_hidden": text_hidden,
        "rope_base": config.get("rope_theta", 500000.0),
        "rope_factor": scaling.get("factor", 1.0) if config else 8.0,
        "eps": config.get("rms_norm_eps", 1e-5),
        **READ,
    }
    if sizes["layout"] != "siglip" or sizes["in_channels"] != 3 or len(head) != vocab:
        raise UserError("Falcon-8B has SigLIP's layout, colour images and as many outputs as words; found others")
    weights = {f"model.{name.replace('vision.', 'vision.vit.', 1)}": value for name, value in ours.items()}
    return "falcon_8b", found, weights


def read_folder(folder: str | Path, **options: Any) -> ImageChat:
    """The model in a folder that the authors' trainer wrote: config.json, and weights in one file or in shards.

    Its tokenizer is transformers': `AutoTokenizer.from_pretrained(folder)`. With `mark_crops` each crop's own text goes
    before its registers.

    Args:
        folder: such as a copy of renns/Falcon-8B.
        options: of `falcon_8b` that neither shapes nor config say, such as `tower_heads`. `standardised="clip"` is for
            whole images that the authors' processor made; those of the tasks here come by ImageNet's statistics.

    Raises:
        UserError: no such folder, another model, or files that are damaged or lacking.
    """
    config = read_config(folder, ("jiutian",))
    preset, found, weights = convert(read_tensors(folder), config, **options)
    if preset != "falcon_8b":
        raise UserError(f"{folder} holds the weights of an encoder alone: expected a whole model")
    with torch.device("meta"):
        model = falcon_8b(**{**found, **options})
    lacking = sorted(set(model.state_dict()) ^ set(weights))
    if lacking:
        raise UserError(f"{folder}: {lacking[0]} is lacking or too many: bring all files of the checkpoint")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def mark_crops(model: ImageChat, tokens_of: Callable[[str], Sequence[int]]) -> None:
    """Let each crop's own text, such as `<crop_img_row0_col1>`, stand before its registers, in place.

    Args:
        model: of a preset.
        tokens_of: from a text to its tokens, without those of a beginning, such as
            `lambda text: tokenizer(text, add_special_tokens=False).input_ids`.
    """
    falcon = next((part for part in model.modules() if isinstance(part, Falcon)), None)
    if falcon is None:
        raise UserError(f"{type(model).__name__} is no FALCON")
    names = {name for grid in grids_up_to(falcon.vision.limit) for name in markers_of(grid)}
    falcon.markers = {name: list(tokens_of(name)) for name in sorted(names)}

"""Checkpoints of xiaozhen228/Bayes-PFL, and of the CLIP below it: the authors' parameter names to ours.

Their trainer saves the head alone, under `MyModel`. CLIP comes from a folder of Hugging Face, or from the same file in
its names of OpenAI behind `clip.`. Decoders and the layers behind them are in their files and compute nothing: they are
left out. Their test reads the stage from the file's name. Here it follows from what the file holds, see `stage_of`, and
is said.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.nn.folders import read_tensors
from provenn.nn.towers import interpolate_positions

CLIP = "clip."
UNUSED = re.compile(r"(?:context|state)_decoder\.|PFL_\w+\.(?:p_mu|decoder)\.")
TIED = {"PFL_context": "context_encoder", "PFL_normal": "state_encoder", "PFL_abnormal": "state_encoder"}
_HEAD = (
    (r"^prompt_context$", "context"),
    (r"^prompt_state_(normal|abnormal)$", r"\1"),
    (r"^context_encoder\.", "specific.encoder."),
    (r"^state_encoder\.", "agnostic.encoder."),
    (r"\.weight_mean\.module\.", ".mean."),
    (r"\.weight_log_variance\.module\.", ".spread."),
    (r"^PFL_context\.amor_", "specific.amortised."),
    (r"^RCA\.q_proj_pre\.", "attention.query."),
    (r"^RCA\.linear_proj\.", "to_text."),
    (r"^fuse\.fuse_modules\.", "fuse.mix."),
    (r"^fuse\.compress\.", "fuse.weigh."),
    (r"^fuse\.post_process\.", "fuse.out."),
    (r"^class_mapping\.", "text_mapping."),
)
_CLIP = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
LATE = ("fuse.", "image_mapping.")  # parts that the second stage adds
PATCHES = {14: "bayes_vit_l14", 16: "bayes_vit_b16"}
TAKEN = (1024, 768), (768, 512)  # widths of the towers of both presets


def convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    clip: str | None = None,
    image_size: int | None = None,
    stage: int | None = None,
    **options: Any,
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of a `MyModel` to ours: the preset, its options and what `load_state_dict` takes.

    Args:
        state: the head's, with CLIP's behind `clip.` or without.
        config: the authors write none.
        preset: the user's own word, which must agree.
        clip: a folder of Hugging Face with the CLIP that the head was trained upon.
        image_size: side of the images, in pixels. Default: 518, or what the positions in the file are made for.
        stage: 1 or 2, as the authors' trainer writes it at the end of a name: `epoch_post_7_1.pth` is of stage 1.
            Default: what `stage_of` reads from the file, which is said.
        options: what else the preset is built with.

    Raises:
        UserError: other parameters; encoders that should be one and differ; a CLIP that is missing or does not fit.
    """
    pair = {name.removeprefix(CLIP): value for name, value in state.items() if name.startswith(CLIP)}
    authors = {name: value for name, value in state.items() if not name.startswith(CLIP)}
    asked, stage = stage, stage_of(authors) if stage is None else stage
    head = _head(authors, stage)
    if pair:
        towers = openai_clip(pair)
    elif clip is not None:
        towers = {name: value for name, value in read_tensors(clip).items() if not name.endswith(".position_ids")}
    else:
        raise UserError(
            "the file holds the head alone, as the authors' trainer saves it: name the CLIP that it was trained upon "
            "with --set clip=FOLDER, a folder of Hugging Face such as clip-vit-large-patch14-336"
        )
    try:
        sizes = _sizes(towers, head)
    except (KeyError, IndexError, ValueError):
        raise UserError("expected a Bayes-PFL head and a CLIP of OpenAI's layout, found other parameters") from None
    name = PATCHES.get(sizes["patch"], "bayes_vit_l14")
    known = TAKEN[list(PATCHES.values()).index(name)]
    if (sizes["vision_dim"], sizes["text_dim"]) == known:
        kept = ("flows", "prompts", "context", "state", "image_size")
        defaults = {
            "flows": 10,
            "prompts": 3,
            "context": 5,
            "state": 5,
            "image_size": 512 if name.endswith("16") else 518,
        }
        side = image_size or (sizes["image_size"] if pair else defaults["image_size"])
        given = {
            key: value for key, value in {**sizes, "image_size": side}.items() if key in kept and value != defaults[key]
        }
    else:
        side = image_size or sizes["image_size"]
        given = {**sizes, "image_size": side}
    towers = _resized(towers, side // sizes["patch"])
    converted = {**head, **{f"{CLIP}{key}": value for key, value in towers.items()}}
    if asked is None:
        why, other = ("never", 2) if stage == 1 else ("already", 1)
        progress.say(
            f"taken as a file of stage {stage}: its fuse and image_mapping have {why} learned; --set stage={other} "
            f"takes it as one of stage {other}"
        )
    return name, {**given, **({} if stage == 2 else {"stage": stage})}, converted


def stage_of(state: Mapping[str, Tensor]) -> int:
    """The stage in which the authors' trainer wrote a head: 1 where nothing that stage 2 adds has learned.

    Their files hold these parts in both stages. They begin with biases of exactly 0, and stage 1 gives them no
    gradient, so they stay so. The first step of stage 2 moves them.

    Args:
        state: the head's, in the authors' names.

    >>> stage_of({"fuse.post_process.bias": torch.zeros(3), "image_mapping.bias": torch.zeros(3)})
    1
    """
    late = [value for name, value in state.items() if name.startswith(LATE) and name.endswith(".bias")]
    return 2 if any(bool(value.any()) for value in late) else 1


def _head(state: dict[str, Tensor], stage: int) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        tied = re.match(r"(PFL_\w+)\.encoder\.(.*)", name)
        if tied is not None:
            twin = state.get(f"{TIED.get(tied[1], '')}.{tied[2]}")
            if twin is None or not torch.equal(twin, value):
                raise UserError(
                    f"{name}: expected what {TIED.get(tied[1], 'no encoder')} holds, since both are one; the file is "
                    "damaged"
                )
            continue
        if UNUSED.match(name) or name.startswith(("PFL_normal.", "PFL_abnormal.")):
            continue
        if stage == 1 and name.startswith(LATE):
            continue  # not trained
        for pattern, replacement in _HEAD:
            name = re.sub(pattern, replacement, name)
        ours[name] = value[..., 0] if name == "attention.query.weight" and value.dim() == 3 else value
    for what, axis in (("u", -1), ("w", -2), ("b", None)):
        pair = [state.get(f"PFL_{kind}.amor_{what}") for kind in ("normal", "abnormal")]
        if any(value is None for value in pair):
            raise UserError(f"PFL_normal.amor_{what} or PFL_abnormal.amor_{what} is missing: this is no Bayes-PFL head")
        both = torch.cat([value for value in pair if value is not None])
        ours[f"agnostic.free.{what}"] = both[..., 0, 0] if axis is None else both.squeeze(axis)
    states = [state.get(f"PFL_{kind}.state") for kind in ("normal", "abnormal")]
    if any(value is None for value in states):
        raise UserError("PFL_normal.state or PFL_abnormal.state is missing: this is no Bayes-PFL head")
    ours["agnostic.states"] = torch.cat([value for value in states if value is not None])
    return ours


def openai_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's state dict in OpenAI's names, of the authors' copy or another, in those of transformers and ours."""
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in ("input_resolution", "context_length", "vocab_size", "prompt_text_projection"):
            continue
        if name == "visual.proj":
            ours["visual_projection.weight"] = value.T.contiguous()
            continue
        if name == "text_projection":
            ours["text_projection.weight"] = value.T.contiguous()
            continue
        new = name
        for pattern, replacement in _CLIP:
            new = re.sub(pattern, replacement, new)
        fused = re.match(r"(.*)\.attn\.in_proj_(weight|bias)$", new)
        if fused is not None:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                ours[f"{fused[1]}.self_attn.{part}_proj.{fused[2]}"] = piece.contiguous()
            continue
        ours[new] = value
    words = "text_model.embeddings.token_embedding.weight"
    if words in ours and len(ours[words]) % 2:  # the authors' copy has a token more, of zeros
        ours[words] = ours[words][:-1]
    return ours


def _sizes(towers: dict[str, Tensor], head: dict[str, Tensor]) -> dict[str, Any]:
    patches = towers["vision_model.embeddings.patch_embedding.weight"]
    words = towers["text_model.embeddings.token_embedding.weight"]
    positions = towers["vision_model.embeddings.position_embedding.weight"]
    depth = {
        what: len({n.split(".")[3] for n in towers if n.startswith(f"{what}_model.encoder.")})
        for what in ("vision", "text")
    }
    side = round((len(positions) - 1) ** 0.5)
    layers = len([name for name in head if name.startswith("to_text.")])
    return {
        "vision_dim": patches.shape[0],
        "vision_depth": depth["vision"],
        "vision_heads": max(1, patches.shape[0] // 64),
        "patch": patches.shape[-1],
        "text_dim": words.shape[1],
        "text_depth": depth["text"],
        "vocab": words.shape[0],
        "image_size": side * patches.shape[-1],
        "layers": tuple(depth["vision"] * (place + 1) // layers for place in range(layers)),
        "prompts": head["context"].shape[0],
        "context": head["context"].shape[1],
        "state": head["normal"].shape[1],
        "flows": head["agnostic.free.b"].shape[1],
    }


def _resized(towers: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    name = "vision_model.embeddings.position_embedding.weight"
    before = round((len(towers[name]) - 1) ** 0.5)
    return {**towers, name: interpolate_positions(towers[name], before, (side, side), antialias=True)}

"""The authors' checkpoints (SkyworkAI/MoH, MoH-ViT and MoH-DiT): their parameter names to ours."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.moh import dit, vit

# Ours for theirs, tried from the top; `\1` and the like are the numbers of stages and blocks.
_VIT = {
    r"^block(\d)\.(\d+)\.mlp\.fc": r"stages.\1.\2.feedforward.linear",
    r"^block(\d)\.(\d+)\.mlp\.dwconv\.dwconv\.": r"stages.\1.\2.feedforward.conv.",
    r"^block(\d)\.(\d+)\.attn\.": r"stages.\1.\2.attention.",
    r"^block(\d)\.(\d+)\.": r"stages.\1.\2.",
}
_DIT = {
    r"^x_embedder\.proj\.": "patches.",
    r"^t_embedder\.mlp\.0\.": "time1.",
    r"^t_embedder\.mlp\.2\.": "time2.",
    r"^y_embedder\.embedding_table\.": "classes.",
    r"^pos_embed$": "positions",
    r"^blocks\.(\d+)\.attn\.": r"blocks.\1.attention.",
    r"^blocks\.(\d+)\.mlp\.fc": r"blocks.\1.linear",
    r"^(blocks\.\d+|final_layer)\.adaLN_modulation\.1\.": r"\1.modulation.",
    r"^final_layer\.linear\.": "head.",
}
_ATTENTION = {
    "wg.": "router.routed.",
    "wg_0.": "router.kinds.",
    "wg_1.": "router.common.",
    "q.": "query.",
    "proj.": "out.",
    "sr.": "reduce.",
    "cpb_fc1.": "position1.",
    "cpb_fc2.": "position2.",
    "relative_pos_bias_local": "local_bias",
    "learnable_tokens": "local_tokens",
    "learnable_bias": "local_shift",
}
_FUSED = {"qkv.": ("query.", "key.", "value."), "kv.": ("key.", "value.")}


def convert(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of an authors' model to ours: the preset, its options and what `load_state_dict` takes.

    Which heads are shared, and how many there are, is read from the routers. A `module.` left by data-parallel training
    is dropped.

    Raises:
        UserError: when the parameters are not those of one of the authors' models.
    """
    plain = {name.replace("module.", ""): value for name, value in state.items()}
    if "x_embedder.proj.weight" in plain and any(".attn.wg" in name for name in plain):
        ours = _renamed(plain, _DIT)
        options = {"num_classes": plain["y_embedder.embedding_table.weight"].shape[0] - 1}
        presets: Mapping[str, Callable[..., nn.Module]] = dit.PRESETS
    elif "patch_embed1.proj.weight" in plain and any(".attn.wg" in name for name in plain):
        ours = {_counted_from_0(name): value for name, value in _renamed(plain, _VIT).items()}
        options = {
            "num_classes": plain["head.weight"].shape[0],
            "in_channels": plain["patch_embed1.proj.weight"].shape[1],
        }
        presets = vit.PRESETS
    else:
        raise UserError("expected a state dict of MoH's moh_transnext_* or MoH-DiT, found other parameters")
    shapes = {name: tuple(value.shape) for name, value in ours.items()}
    for name, build in presets.items():
        if shapes == _shapes(build, options):
            return name, options, ours
    raise UserError(f"these parameters have the names, but not the sizes, of one of {', '.join(presets)}")


def _shapes(build: Callable[..., nn.Module], options: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build(**options).state_dict().items()}


def _renamed(plain: dict[str, Tensor], rules: dict[str, str]) -> dict[str, Tensor]:
    ours = {}
    for name, value in plain.items():
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        block, found, inner = name.partition(".attention.")
        if not found:
            ours[name] = value
            continue
        fused = next((parts for start, parts in _FUSED.items() if inner.startswith(start)), None)
        if fused is not None:
            for part, piece in zip(fused, value.chunk(len(fused))):
                ours[f"{block}.attention.{part}{inner.split('.', 1)[1]}"] = piece
            continue
        for theirs, own in _ATTENTION.items():
            if inner.startswith(theirs):
                inner = own + inner.removeprefix(theirs)
                break
        ours[f"{block}.attention.{inner}"] = value
    return ours


def _counted_from_0(name: str) -> str:
    """Stages are numbered from 1 there; a patch embedding is a convolution and a norm in one."""
    if match := re.match(r"patch_embed(\d)\.(proj|norm)\.(.*)", name):
        return f"embeds.{2 * (int(match[1]) - 1) + (match[2] == 'norm')}.{match[3]}"
    name = re.sub(r"^stages\.(\d)", lambda match: f"stages.{int(match[1]) - 1}", name)
    return re.sub(r"^norm(\d)", lambda match: f"norms.{int(match[1]) - 1}", name)

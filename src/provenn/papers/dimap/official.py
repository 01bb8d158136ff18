"""Swin's checkpoints: the names of microsoft/Swin-Transformer, of timm and of transformers, to ours.

DIMAP's own repository (he-y/Data-independent-Module-Aware-Pruning) holds links to checkpoints of the first kind alone.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from provenn.core.errors import UserError

_PRESETS: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {  # by C, and the blocks and heads of each stage
    (96, (2, 2, 6, 2), (3, 6, 12, 24)): "swin_t",
    (96, (2, 2, 18, 2), (3, 6, 12, 24)): "swin_s",
    (128, (2, 2, 18, 2), (4, 8, 16, 32)): "swin_b",
}
# What transformers calls things, before its version 5 and since, in Microsoft's names.
_TRANSFORMERS = (
    (r"^swin\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:self|relative_position_bias)(\.relative_position_bias_table)$", r".attn\1"),
    (r"\.attention\.(?:self\.query|q_proj|query)\.", ".attn.q."),
    (r"\.attention\.(?:self\.key|k_proj|key)\.", ".attn.k."),
    (r"\.attention\.(?:self\.value|v_proj|value)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^head\.fc\.", "head."),
)
_OURS = (
    (r"^patch_embed\.proj\.", "embed."),
    (r"^patch_embed\.norm\.", "embed_norm."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1."),
    (r"^layers\.(\d+)\.downsample\.", r"merges.\1."),
    (r"\.attn\.relative_position_bias_table$", ".attention.bias"),
    (r"\.attn\.proj\.", ".attention.project."),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)
# Buffers that follow from the sizes.
_MADE = ("relative_position_index", "attn_mask")


def convert(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of a Swin to ours: the preset, its options and what `load_state_dict` takes.

    Queries, keys and values may be one matrix or three. A `module.` left by data-parallel training is dropped.

    Raises:
        UserError: when the parameters are not those of a Swin-T, -S or -B with its classifier.
    """
    ours = renamed(state)
    try:
        dim, in_channels, patch = ours["embed.weight"].shape[:3]
        num_classes = len(ours["head.weight"])
        depths: list[int] = []
        heads: list[int] = []
        while (bias := ours.get(f"stages.{len(depths)}.0.attention.bias")) is not None:
            stage = rf"stages\.{len(depths)}\.(\d+)\."
            depths.append(len({match[1] for name in ours if (match := re.match(stage, name))}))
            heads.append(bias.shape[1])
        sites = len(ours["stages.0.0.attention.bias"])
    except (KeyError, ValueError, IndexError):
        raise UserError("expected a state dict of a Swin with a classifier, found other parameters") from None
    preset = _PRESETS.get((dim, tuple(depths), tuple(heads)))
    if preset is None or patch != 4:
        raise UserError(f"no Swin of the paper has C = {dim}, {depths} blocks, {heads} heads and patches of {patch}")
    window = (round(sites**0.5) + 1) // 2
    options: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    return preset, options if window == 7 else {**options, "window": window}, ours


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a Swin of any size, in our names."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        if not name.endswith(_MADE):
            plain[_by(_TRANSFORMERS, name)] = value
    # timm puts the merging before the stage that it leads to.
    if "layers.0.downsample.reduction.weight" not in plain:
        plain = {re.sub(r"^(layers\.)(\d+)(\.downsample\.)", _one_before, name): v for name, v in plain.items()}
    ours = {_by(_OURS, name): value for name, value in _fused(plain).items()}
    last = max((int(match[1]) for name in ours if (match := re.match(r"stages\.(\d+)\.", name))), default=0)
    return {re.sub(r"^norm\.", f"norms.{last}.", name): value for name, value in ours.items()}


def _by(table: Sequence[tuple[str, str]], name: str) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def _one_before(match: re.Match) -> str:
    return f"{match[1]}{int(match[2]) - 1}{match[3]}"


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, with queries, keys and values in one matrix."""
    fused: dict[str, Tensor] = {}
    for name, value in state.items():
        match = re.match(r"(.*\.attn)\.([qkv])\.(weight|bias)$", name)
        if match is None:
            fused[name] = value
            continue
        parts = [state.get(f"{match[1]}.{part}.{match[3]}") for part in "qkv"]
        if any(part is None for part in parts):
            raise UserError(f"{name} has not all of q, k and v beside it: the file is not whole")
        fused[f"{match[1]}.qkv.{match[3]}"] = torch.cat([part for part in parts if part is not None])
    return fused

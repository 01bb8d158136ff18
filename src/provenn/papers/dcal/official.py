"""Checkpoints of the backbones: the names of facebookresearch/deit and timm, and of transformers, to ours.

DCAL's own code was never released. Its networks start from DeiT (ImageNet-1k), and from ViT-B and R50-ViT-B
(ImageNet-21k).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from provenn.core.errors import UserError
from provenn.nn.vit import ViT, positions_for
from provenn.papers.dcal.model import DCAL

_PRESETS = {192: "deit_tiny", 384: "deit_small", 768: "deit_base"}  # by D
# Of transformers, before its version 5 and since.
_TRANSFORMERS = (
    (r"^(?:vit|deit)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
LAYERS, PATCH = 12, 16


def convert(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of a DeiT, ViT or R50-ViT to ours: the preset, its options and what `load_state_dict` takes.

    Queries, keys and values may be one matrix or three. Height and width of the image follow from the positions, if
    these are a square.

    Raises:
        UserError: the parameters are not those of a DeiT-T, -S or -B, or R50-ViT-B, with 12 blocks, patches of 16 and a
            classifier.
    """
    ours = renamed(state)
    try:
        dim, in_channels, patch = ours["patch_embed.proj.weight"].shape[:3]
        stem = ours.get("patch_embed.backbone.stem.conv.weight")
        num_classes, sites = len(ours["head.weight"]), ours["pos_embed"].shape[1] - 1
    except (KeyError, ValueError, IndexError):
        raise UserError("expected a state dict of a DeiT or ViT with a classifier, found other parameters") from None
    layers = len({name.split(".")[1] for name in ours if name.startswith("blocks.")})
    side = round(sites**0.5)
    preset, trained = _PRESETS.get(dim), 14
    if stem is not None:
        preset, trained = ("r50_vit_base", 24) if (dim, patch) == (768, 1) else (None, 24)
        in_channels, patch = stem.shape[1], PATCH
    if preset is None or (layers, patch) != (LAYERS, PATCH) or side**2 != sites:
        raise UserError(
            f"no backbone of the paper has D = {dim}, {layers} blocks, patches of {patch} and {sites} positions: "
            "expected DeiT-T, -S or -B, or R50-ViT-B, with 12 blocks, patches of 16 and a square of positions"
        )
    options: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    return preset, options if side == trained else {**options, "image": (16 * side, 16 * side)}, ours


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a DeiT or ViT of any size, in our names.

    Raises:
        UserError: a distilled DeiT, which has a second token, or a file that lacks a part of a matrix.
    """
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        for pattern, replacement in _TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        if name.endswith(("dist_token", "distillation_token")):
            raise UserError("a distilled DeiT has a second token, which is no network of the paper: take the plain one")
        if not name.startswith(("pre_logits.", "pooler.", "embeddings.mask_token")):
            plain[name] = value
    fused: dict[str, Tensor] = {}
    for name, value in plain.items():
        match = re.match(r"(.*\.attn)\.([qkv])\.(weight|bias)$", name)
        if match is None:
            fused[name] = value
            continue
        parts = [plain.get(f"{match[1]}.{part}.{match[3]}") for part in "qkv"]
        if any(part is None for part in parts):
            raise UserError(f"{name} has not all of q, k and v beside it: the file is not whole")
        fused[f"{match[1]}.qkv.{match[3]}"] = torch.cat([part for part in parts if part is not None])
    return fused


def load_backbone(model: ViT | DCAL, state: Mapping[str, Tensor]) -> list[str]:
    """Start from a pretrained DeiT or ViT, in place. Positions are resized; a classifier of other classes is left out.

    Args:
        model: of the same width, depth and patches.
        state: of facebookresearch/deit (the entry `model` of its files), timm or transformers.

    Returns:
        The names of the parameters that stay as they were.

    Raises:
        UserError: another network's parameters.
    """
    network: Any = model.backbone if isinstance(model, DCAL) else model
    given, own = renamed(state), network.state_dict()
    if "pos_embed" in given and given["pos_embed"].shape != own["pos_embed"].shape:
        side = round((given["pos_embed"].shape[1] - 1) ** 0.5)
        given["pos_embed"] = positions_for(given["pos_embed"], (side, side), network.sites)
    kept = [
        name for name in own if name.startswith("head.") and getattr(given.get(name), "shape", None) != own[name].shape
    ]
    left = {name: value for name, value in given.items() if not (name.startswith("head.") and kept)}
    odd = sorted({*own} - {*kept} ^ {*left})
    odd += [name for name in left if name in own and left[name].shape != own[name].shape]
    if odd:
        raise UserError(f"{odd[0]}: expected the parameters of a ViT of this width, depth and patch, found others")
    network.load_state_dict({**own, **left})
    return kept

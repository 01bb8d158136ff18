"""The authors' checkpoints (maomao0819/BEVANet): their parameter names to ours."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from provenn.core.errors import UserError

EXPECTED = "expected a state dict of BEVANet, for segmentation or ImageNet, found other parameters"
# Planes and basic blocks of layer1, layer2 and semantic 3; the last number of `blocks` has no effect on these networks.
SIZES: dict[tuple[int, tuple[int, ...]], str] = {
    (32, (2, 2, 3, 3)): "bevanet_s",
    (64, (2, 2, 4, 4)): "bevanet",
    (64, (2, 2, 3, 3)): "bevanet_sw",
    (64, (3, 3, 4, 4)): "bevanet_l",
}
# Networks that the authors fine-tuned on other data than Cityscapes, by their classes.
TUNED = {("bevanet_s", 11): "bevanet_s_camvid", ("bevanet", 150): "bevanet_ade20k"}
# In this order: what stands first is looked for first.
NAMES = (
    (r"^conv1\.", "stem."),
    (r"^layer3_semantic\.", "semantic3."),
    (r"^layer3_detail\.", "detail3."),
    (r"^compression([34])\.", r"compress\1."),
    (r"^fuse_sd_([34])\.f_x\.", r"exchange\1.detail."),
    (r"^fuse_sd_([34])\.f_y\.", r"exchange\1.semantic."),
    (r"^layer4_detail_conv\.0\.", "detail4.0."),
    (r"^layer4_detail\.", "detail4.1."),
    (r"^norm4_detail\.", "detail4.2."),
    (r"^layer5_detail_semantic\.0\.", "detail5."),
    (r"^layer5_detail_boundary\.0\.", "boundary5."),
    (r"^layer([45])_down_semantic(_seg|_cls)?\.0\.", r"semantic\1.0."),
    (r"^layer([45])_semantic_1(_seg|_cls)?\.", r"semantic\1.1."),
    (r"^norm([45])_semantic_1(_seg|_cls)?\.", r"semantic\1.2."),
    (r"^layer([45])_semantic_2(_seg|_cls)?\.", r"semantic\1.3."),
    (r"^norm([45])_semantic_2(_seg|_cls)?\.", r"semantic\1.4."),
    (r"^layer5_semantic_bn_cls\.0\.", "semantic5.5."),
    (r"^layer5_down\.", "down."),
    (r"^last_layer\.", "last."),
    # heads
    (r"^seghead_ds\.", "auxiliary_head."),
    (r"^seghead_db\.", "boundary_head."),
    (r"^((?:auxiliary_|boundary_)?head)\.bn1\.", r"\1.0."),
    (r"^((?:auxiliary_|boundary_)?head)\.conv1\.", r"\1.2."),
    (r"^((?:auxiliary_|boundary_)?head)\.bn2\.", r"\1.3."),
    (r"^((?:auxiliary_|boundary_)?head)\.conv2\.", r"\1.5."),
    # fusion and pooling
    (r"^dfm\.conv_p\.", "fusion.detail."),
    (r"^dfm\.conv_i\.", "fusion.semantic."),
    (r"^dfm\.out\.", "fusion.join."),
    (r"^spp\.scale0\.", "pooling.enter."),
    (r"^spp\.bn\.", "pooling.norm."),
    (r"^spp\.layer_scale_lska$", "pooling.scale.scale"),
    (r"^spp\.lska\.", "pooling.spatial."),
    (r"^spp\.scale1\.", "pooling.pooled.0."),
    (r"^spp\.scale2\.", "pooling.pooled.1."),
    (r"^spp\.scale4\.", "pooling.pooled.2."),
    (r"^spp\.scale5\.", "pooling.pooled.3."),
    (r"^spp\.process1\.", "pooling.process.0."),
    (r"^spp\.process2\.", "pooling.process.1."),
    (r"^spp\.process_lska\.", "pooling.process.2."),
    (r"^spp\.process4\.", "pooling.process.3."),
    (r"^spp\.process5\.", "pooling.process.4."),
    (r"^spp\.compression\.", "pooling.compress."),
    (r"^spp\.shortcut\.", "pooling.shortcut."),
    # blocks
    (r"\.(?:dw|pw)conv\.(weight|bias)$", r".\1"),
    (r"\.attn\.", ".spatial."),
    (r"\.mlp\.fc1\.", ".feed_forward.0."),
    (r"\.mlp\.dwconv\.", ".feed_forward.1."),
    (r"\.mlp\.fc2\.", ".feed_forward.3."),
    (r"\.layer_scale_([12])$", r".scale\1.scale"),
    (r"\.proj_1\.", ".enter."),
    (r"\.proj_2\.", ".leave."),
    (r"\.spatial_gating_unit\.pwconv\.", ".attention.point."),
    (r"\.spatial_gating_unit\.DW_conv\.", ".attention.spread.small."),
    (r"\.spatial_gating_unit\.FS_kernel\.", ".attention.spread.select."),
    (r"(pooling\.spatial)\.spatial_gating_unit\.DW_conv_h\.", r"\1.attention.spread.0."),
    (r"(pooling\.spatial)\.spatial_gating_unit\.DW_conv_v\.", r"\1.attention.spread.1."),
    (r"(pooling\.spatial)\.spatial_gating_unit\.DW_D_conv_h\.", r"\1.attention.spread.2."),
    (r"(pooling\.spatial)\.spatial_gating_unit\.DW_D_conv_v\.", r"\1.attention.spread.3."),
    (r"\.spatial_gating_unit\.DW_D_conv_h\.", ".attention.spread.horizontal."),
    (r"\.spatial_gating_unit\.DW_D_conv_v\.", ".attention.spread.vertical."),
    (r"\.select\.fc_reduce\.0\.", ".select.reduce.point."),
    (r"\.select\.fc_reduce\.1\.", ".select.reduce.depth."),
    (r"\.select\.fc_reduce\.2\.", ".select.reduce.norm."),
    (r"\.fc_expand_(small|big_h|big_v)\.0\.", r".fc_expand_\1.point."),
    (r"\.fc_expand_(small|big_h|big_v)\.1\.", r".fc_expand_\1.depth."),
    (r"\.fc_expand_(small|big_h|big_v)\.2\.", r".fc_expand_\1.norm."),
    (r"\.select\.conv_squeeze\.", ".select.squeeze."),
)
HEADS = ("small", "big_h", "big_v")  # of the selection, which we keep side by side


def convert(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of an authors' model to ours: the preset, its options and what `load_state_dict` takes.

    Prefixes that their trainers leave (`module.`, `model.`) and entries of losses are dropped. Where the training heads
    are missing, the model is built without.

    Raises:
        UserError: when the parameters are not those of one of the authors' models.
    """
    plain = {re.sub(r"^(module\.|model\.)+", "", name): value for name, value in state.items()}
    plain = {name: value for name, value in plain.items() if not name.startswith(("sem_loss.", "boundary_loss."))}
    ours = _merge_heads({_renamed(name): value for name, value in plain.items()})
    try:
        planes, in_channels = ours["stem.0.weight"].shape[:2]
        depths = tuple(_count(ours, layer) for layer in ("layer1", "layer2", "semantic3"))
        size = SIZES.get((planes, (*depths, depths[-1])))
        if size is None or not any(".attention.spread.select." in name for name in ours):
            raise UserError(
                f"no BEVANet of the authors has {planes} planes and {depths} blocks: "
                + ", ".join(f"{name} {p} and {blocks[:3]}" for (p, blocks), name in SIZES.items())
            )
        options: dict[str, Any] = {"in_channels": in_channels}
        if "last.0.weight" in ours:
            preset = f"{size}_imagenet"
            if preset not in ("bevanet_s_imagenet", "bevanet_imagenet"):
                raise UserError(f"the authors pre-train BEVANet and BEVANet-S; these weights are of {size}")
            return preset, {**options, "num_classes": ours["head.weight"].shape[0]}, ours
        options["num_classes"] = ours["head.5.weight"].shape[0]
        if "auxiliary_head.5.weight" not in ours:
            options["training_heads"] = False
        return TUNED.get((size, options["num_classes"]), size), options, ours
    except KeyError:
        raise UserError(EXPECTED) from None


def pretrained(model: torch.nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Start a segmentation model from an ImageNet state dict of ours: what has the same name and shape is copied.

    That is the stem, stages 1 to 4 and detail 5. Semantic 5 stays as it is built: the authors name it otherwise in the
    two kinds of model, and so pass nothing of it on.

    Args:
        model: a `BEVANet`, changed in place.
        state: of a `BEVANetClassifier` of the same planes and blocks.

    Returns:
        The names that were copied.

    Raises:
        UserError: none were.
    """
    target = model.state_dict()
    copied = [
        name
        for name, value in state.items()
        if name in target and target[name].shape == value.shape and not name.startswith(("semantic5.", "head."))
    ]
    if not copied:
        raise UserError("no parameter of these weights has the name and shape of one of the model's")
    model.load_state_dict({**target, **{name: state[name] for name in copied}})
    return copied


def _renamed(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _merge_heads(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The selection's three heads of each attention as one, in the order small, horizontal, vertical."""
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        prefix, head, rest = name.partition(".fc_expand_small.")
        if head:
            parts = [state.get(f"{prefix}.fc_expand_{which}.{rest}") for which in HEADS]
            if any(part is None for part in parts):
                raise UserError(EXPECTED)
            merged[f"{prefix}.expand.{rest}"] = value if value.ndim == 0 else torch.cat(parts)  # type: ignore[arg-type]
        elif ".fc_expand_big_" not in name:
            merged[name] = value
    return merged


def _count(state: Mapping[str, Tensor], layer: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{layer}.")})

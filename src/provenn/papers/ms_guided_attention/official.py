"""Weights of sinAshish/Multi-Scale-Attention to ours.

The authors' network has 955,412 parameters that never get a gradient (`conv6_*`, `conv7_*`, `attention*`, `refine*`).
They have no place here, and are left out.
"""

import re

from torch import Tensor

from provenn.core.errors import UserError

DEAD = re.compile(r"^(conv6_\d|conv7_\d|attention\d|refine\d)\.")
# Scales are counted from the coarsest in the authors' convolutions, from the finest elsewhere and here.
_NAMES = [
    (r"^resnext\.layer0\.0\.", lambda m: "trunk.conv1."),
    (r"^resnext\.layer0\.1\.", lambda m: "trunk.bn1."),
    (r"^resnext\.layer1\.1\.", lambda m: "trunk.layer1."),
    (r"^resnext\.layer([234])\.", lambda m: f"trunk.layer{m[1]}."),
    (r"^down(\d)\.", lambda m: f"down.{int(m[1]) - 1}."),
    (r"^fuse1\.fuse_attn\.([0-8])\.", lambda m: f"fuse.{int(m[1]) // 3}.{int(m[1]) % 3}."),
    (r"^pam_attention_(\d)_(\d)\.attn\.(\d)\.", lambda m: _layer(m, "position")),
    (r"^cam_attention_(\d)_(\d)\.attn\.(\d)\.", lambda m: _layer(m, "channel")),
    (r"^semanticModule_(\d)_1\.enc(\d)\.encode\.", lambda m: f"semantic.{int(m[1]) - 1}.enc{m[2]}."),
    (r"^semanticModule_(\d)_1\.dec(\d)\.decode\.6\.", lambda m: f"semantic.{int(m[1]) - 1}.up{m[2]}."),
    (r"^semanticModule_(\d)_1\.dec(\d)\.decode\.", lambda m: f"semantic.{int(m[1]) - 1}.dec{m[2]}."),
    (r"^conv_sem_(\d)_(\d)\.", lambda m: f"semantic_conv.{int(m[1]) - 1}.{4 - int(m[2])}."),
    (r"^conv8_(\d)\.", lambda m: f"attention.0.{4 - int(m[1])}.mix."),
    (r"^conv8_1(\d)\.", lambda m: f"attention.1.{4 - int(m[1])}.mix."),
    (r"^predict(\d)\.", lambda m: f"classify_features.{int(m[1]) - 1}."),
    (r"^predict(\d)_2\.", lambda m: f"classify.0.{int(m[1]) - 1}."),
]


def convert(
    state: dict[str, Tensor], config: object = None, preset: str | None = None, **options: object
) -> tuple[str, dict[str, object], dict[str, Tensor]]:
    """The preset that the authors' weights belong to, its options, and the weights under our names.

    Args:
        state: the authors' state dict, bare as their script saves it.
        config: there is none.
        preset: which one the user says it is; there is one.
        options: that the user gives.

    Raises: UserError for weights of another network.
    """
    try:
        stem, group = state["resnext.layer0.0.weight"], state["resnext.layer1.1.0.conv2.weight"]
        classes = state["predict1_2.weight"].shape[0]
    except KeyError as error:
        raise UserError(
            f"these are not guided attention's weights: {error} is missing; expected DAF_stack of "
            "sinAshish/Multi-Scale-Attention"
        ) from error
    if group.shape[1] != 8:
        raise UserError(f"the authors' trunk is ResNeXt-101 32×8d; these weights have groups of {group.shape[1]}")
    shapes: dict[str, object] = {"num_classes": classes, "in_channels": stem.shape[1]}
    live = {name: tensor for name, tensor in state.items() if not DEAD.match(name)}
    return "guided_attention_released", shapes, {_rename(name): tensor for name, tensor in live.items()}


def _layer(match: re.Match[str], part: str) -> str:
    index = int(match[3])
    place = f"enter.{index}" if index < 3 else "attention" if index == 3 else f"leave.{index - 4}"
    return f"attention.{int(match[1]) - 1}.{int(match[2]) - 1}.layers.{part}.{place}."


def _rename(name: str) -> str:
    for pattern, ours in _NAMES:
        match = re.match(pattern, name)
        if match:
            name = ours(match) + name[match.end() :]
            break
    return re.sub(r"(query|key|value)_conv", r"\1", name)

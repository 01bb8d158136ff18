"""The authors' checkpoints (BangguWu/ECANet): their parameter names to ours."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from provenn.core.errors import UserError

# Blocks of each stage, and whether they are bottlenecks.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "eca_resnet18",
    ((3, 4, 6, 3), False): "eca_resnet34",
    ((3, 4, 6, 3), True): "eca_resnet50",
    ((3, 4, 23, 3), True): "eca_resnet101",
    ((3, 8, 36, 3), True): "eca_resnet152",
}


def convert(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of an authors' model to ours: the preset, its options and what `load_state_dict` takes.

    The kernel sizes, one for each width, are read from the weights: any `--ksize` of the authors' trainer loads.
    A `module.` left by data-parallel training is dropped.

    Raises:
        UserError: when the parameters are not those of one of the authors' models.
    """
    plain = {name.replace("module.", ""): value for name, value in state.items()}
    try:
        return _mobilenet(plain) if "classifier.1.weight" in plain else _resnet(plain)
    except (KeyError, IndexError):
        raise UserError(
            "expected a state dict of ECANet's eca_resnet* or eca_mobilenet_v2, found other parameters"
        ) from None


def _resnet(plain: dict[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    if "fc.weight" not in plain or not any(".eca." in name for name in plain):
        raise KeyError("fc.weight and .eca.")
    ours = {name.replace(".eca.", ".gate."): value for name, value in plain.items()}
    depths = tuple(len({n.split(".")[1] for n in plain if n.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4))
    preset = _RESNETS.get((depths, "layer1.0.conv3.weight" in plain))
    if preset is None:
        raise UserError(f"no ECA-ResNet of the paper has stages of {depths} blocks")
    sizes = [ours[f"layer{stage}.0.gate.conv.weight"].shape[-1] for stage in (1, 2, 3, 4)]
    options = {
        "num_classes": plain["fc.weight"].shape[0],
        "in_channels": plain["conv1.weight"].shape[1],
        "kernel_size": sizes,
    }
    return preset, options, ours


def _mobilenet(plain: dict[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    # The module stands at the end of the block's sequence there, and is the only one in it with a `conv` of its own.
    named = {re.sub(r"^features\.", "layers.", name): tensor for name, tensor in plain.items()}
    ours = {re.sub(r"(layers\.\d+)\.conv\.\d+\.conv\.", r"\1.gate.conv.", name): t for name, t in named.items()}
    firsts = (1, 2, 4, 7, 11, 14, 17)  # the first block of each width
    sizes = [ours[f"layers.{block}.gate.conv.weight"].shape[-1] for block in firsts]
    options = {
        "num_classes": plain["classifier.1.weight"].shape[0],
        "in_channels": plain["features.0.0.weight"].shape[1],
        "kernel_size": sizes,
    }
    return "eca_mobilenet_v2", options, ours

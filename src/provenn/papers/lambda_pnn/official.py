"""Weights of matciotola/Lambda-PNN to ours."""

import re

from torch import Tensor

from provenn.core.errors import UserError

_NAMES = [
    (r"^conv_1\.", "first."),
    (r"^conv_2\.", "second."),
    (r"^conv_3\.", "last."),
    (r"^CBAM_(\d)\.ChannelGate\.mlp\.1\.", r"attend\1.channel.mlp.0."),
    (r"^CBAM_(\d)\.ChannelGate\.mlp\.3\.", r"attend\1.channel.mlp.2."),
    (r"^CBAM_(\d)\.SpatialGate\.spatial\.conv_1\.", r"attend\1.spatial.conv."),
    (r"^res_block_(\d)\.body\.", r"residual\1.body."),
]
PRESETS = {9: "lambda_pnn_wv3", 5: "lambda_pnn_ge1"}


def convert(
    state: dict[str, Tensor], config: object = None, preset: str | None = None, **options: object
) -> tuple[str, dict[str, object], dict[str, Tensor]]:
    """The preset that the authors' weights belong to, its options, and the weights under our names.

    The files for WV3 and WV2 have the same shapes: weights of eight bands are taken for WV3's; `--preset
    lambda_pnn_wv2` says otherwise.

    Args:
        state: the authors' state dict.
        config: there is none.
        preset: which one the user says it is.
        options: that the user gives.

    Raises: UserError for weights of another network or of other bands.
    """
    try:
        channels = state["conv_1.weight"].shape[1]
    except KeyError as error:
        raise UserError(
            f"these are not λ-PNN weights: {error} is missing; expected a model of matciotola/Lambda-PNN"
        ) from error
    if channels not in PRESETS:
        raise UserError(f"λ-PNN weights of {channels - 1} bands fit no preset; expected 8 or 4")
    name = preset if channels == 9 and preset == "lambda_pnn_wv2" else PRESETS[channels]
    return name, {}, {_rename(name): tensor for name, tensor in state.items()}


def _rename(name: str) -> str:
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name

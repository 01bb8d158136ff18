"""Weights of AVC2-UESTC/CRAFT-SR to ours."""

import math
import re

from torch import Tensor

from provenn.core.errors import UserError

# Offsets and indices of the position bias, which follow from the window and are not learnt.
_BUFFERS = {"relative_position_index_h", "relative_position_index_v", "biases_h", "biases_v"}

_NAMES = [
    (r"^conv_first\.", "first."),
    (r"^conv_after_body\.", "last."),
    (r"^norm\.body\.", "norm."),
    (r"^layers\.(\d+)\.conv\.", r"groups.\1.conv."),
    (r"^layers\.(\d+)\.residual_group", r"groups.\1.blocks"),
    (r"\.hfer_blocks\.(\d+)\.", r".\1.high."),
    (r"\.hf_blocks\.(\d+)\.", r".\1.fuse."),
    (r"\.high\.last_fc\.", ".high.merge."),
    (r"\.high\.fc\.", ".high.sharp."),
    (r"\.high\.conv\.", ".high.local."),
    (r"\.fuse\.(norm\d)\.body\.", r".fuse.\1."),
    (r"\.fuse\.attn\.(q|kv)\.", r".fuse.attention.\1.0."),
    (r"\.fuse\.attn\.(q|kv)_dwconv\.", r".fuse.attention.\1.1."),
    (r"\.fuse\.attn\.project_out\.", ".fuse.attention.project."),
    (r"\.fuse\.attn\.temperature$", ".fuse.attention.temperature"),
    (r"\.fuse\.ffn\.project_in\.", ".fuse.feed.expand.0."),
    (r"\.fuse\.ffn\.dwconv\.", ".fuse.feed.expand.1."),
    (r"\.fuse\.ffn\.project_out\.", ".fuse.feed.project."),
    (r"\.proj\.", ".project."),
    (r"\.get_v\.", ".locality."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
    (r"\.attns\.(\d)\.pos\.", r".attention.bias.\1."),
    (r"\.pos_proj\.", ".embed."),
    (r"\.pos1\.(\d)\.", r".hidden.\1."),
    (r"\.pos2\.0\.", ".hidden.3."),
    (r"\.pos2\.2\.", ".hidden.5."),
    (r"\.pos3\.(\d)\.", r".head.\1."),
]


def convert(state: dict[str, Tensor]) -> tuple[str, dict[str, object], dict[str, Tensor]]:
    """The preset that the authors' weights belong to, its options, and the weights under our names.

    Args:
        state: the authors' state dict, taken out of `params` or `params_ema`.

    Raises: UserError for weights of another network or of another width.
    """
    try:
        out, dim = state["upsample.0.weight"].shape[:2]
        width = state["layers.0.residual_group.srwa_blocks.0.attns.0.pos.pos_proj.weight"].shape[0]
    except KeyError as error:
        raise UserError(
            f"these are not CRAFT weights: {error} is missing; expected a model of AVC2-UESTC/CRAFT-SR"
        ) from error
    # The last convolution puts out 3·scale² channels, which `PixelShuffle` turns into pixels.
    scale = math.isqrt(out // 3)
    if dim != 48 or 3 * scale**2 != out or scale not in (2, 3, 4):
        raise UserError(
            f"CRAFT weights of {dim} channels and {out} outputs fit no preset; expected 48 and 12, 27 or 48"
        )
    options: dict[str, object] = {} if width == 1 else {"position_dim": width}
    return f"craft_x{scale}", options, {_rename(name): t for name, t in state.items() if name not in _BUFFERS}


def _rename(name: str) -> str:
    # Blocks alternate between plain and shifted: 2i and 2i + 1 are the two of block i.
    name = re.sub(r"\.srwa_blocks\.(\d+)\.", lambda match: f".{int(match[1]) // 2}.low.{int(match[1]) % 2}.", name)
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name

"""The authors' checkpoints (ysj9909/SHViT): their parameter names to ours."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from provenn.core.errors import UserError

_PRESETS: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {  # by the widths of the stages and the blocks in each
    ((128, 224, 320), (2, 4, 5)): "shvit_s1",
    ((128, 308, 448), (2, 4, 5)): "shvit_s2",
    ((192, 352, 448), (3, 5, 5)): "shvit_s3",
    ((224, 336, 448), (4, 7, 6)): "shvit_s4",
}
# The authors' downsampling is three entries of a stage: a pair, the merging, a pair. Ours is one of five.
_MERGING = {"conv1.": "0.", "conv2.": "2.", "se.fc1.": "4.squeeze.", "se.fc2.": "4.excite.", "conv3.": "5."}
_NAMES = (
    (r"\.m\.", ".branch."),
    (r"\.c\.", ".conv."),
    (r"\.bn\.", ".norm."),
    (r"\.pre_norm\.", ".norm."),
    (r"\.pw1\.", ".0."),
    (r"\.pw2\.", ".2."),
    (r"\.proj\.", ".project."),
    (r"^(head|head_dist)\.l\.", r"\1.linear."),
    (r"^patch_embed\.", "stem."),
)


def convert(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of an authors' model to ours: the preset, its options and what `load_state_dict` takes.

    A checkpoint of their detection backbone, which has no classifier, gives a preset with `num_classes=0`; one with a
    second classifier was distilled. A `module.` left by data-parallel training is dropped.

    Raises:
        UserError: when the parameters are not those of one of the authors' models.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        widths = tuple(
            len(plain[name])
            for name in ("patch_embed.6.c.weight", "blocks2.1.conv3.c.weight", "blocks3.1.conv3.c.weight")
        )
        blocks = [{int(n.split(".")[1]) for n in plain if n.startswith(f"blocks{i}.")} for i in (1, 2, 3)]
        in_channels = plain["patch_embed.0.c.weight"].shape[1]
    except (KeyError, ValueError):
        raise UserError("expected a state dict of SHViT's shvit_s1 to shvit_s4, found other parameters") from None
    depths = (len(blocks[0]), len(blocks[1]) - 3, len(blocks[2]) - 3)
    preset = _PRESETS.get((widths, depths))
    if preset is None:
        raise UserError(f"no SHViT of the paper has widths of {widths} and {depths} blocks")
    options: dict[str, Any] = {"num_classes": 0, "in_channels": in_channels}
    if "head.l.weight" in plain:
        options |= {"num_classes": len(plain["head.l.weight"]), "distillation": "head_dist.l.weight" in plain}
    ours = {}
    for name, value in plain.items():
        name = _placed(name)
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        # Squeeze-excite is of 1×1 convolutions there.
        ours[name] = value[:, :, 0, 0] if name.endswith(("squeeze.weight", "excite.weight")) else value
    return preset, options, ours


def _placed(name: str) -> str:
    """The name with the index of its block as ours counts them."""
    match = re.match(r"blocks(\d)\.(\d+)\.(.*)", name)
    if match is None:
        return name
    stage, index, rest = int(match[1]) - 1, int(match[2]), match[3]
    if stage == 0:
        return f"stages.0.{index}.{rest}"
    if index >= 3:
        return f"stages.{stage}.{index - 2}.{rest}"
    if index == 1:
        part = next((part for part in _MERGING if rest.startswith(part)), "")
        return f"stages.{stage}.0.2.{_MERGING.get(part, '')}{rest.removeprefix(part)}"
    within, _, rest = rest.partition(".")
    return f"stages.{stage}.0.{int(within) + (3 if index == 2 else 0)}.{rest}"

"""The authors' checkpoints (ChuanyangZheng/L2ViT): their parameter names to ours."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from provenn.core.errors import UserError
from provenn.papers.l2vit import model

# Ours for theirs, tried from the top; `\1` and the like are the numbers of stages and blocks.
_NAMES = {
    r"^downsample_layers\.0\.proj\.proj\.": "embeds.0.convs.",
    r"^downsample_layers\.(\d)\.proj\.": r"embeds.\1.conv.",
    r"^downsample_layers\.(\d)\.norm\.": r"embeds.\1.norm.",
    r"^norm(\d)\.": r"norms.\1.",
    r"^norm\.": "norms.3.",
}
_IN_A_BLOCK = {
    "attn.temperature": "attention.scale",
    "attn.proj.": "attention.out.",
    "attn.": "attention.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.2.",
    "local_mp.bn.": "concentration.norm.",
    "local_mp.": "concentration.",
}
_PRESETS = {"l2vit_tiny": model.TINY, "l2vit_small": model.SMALL, "l2vit_base": model.BASE}


def convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    window: int | None = None,
    **options: Any,
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of an authors' model to ours: the preset, its options and what `load_state_dict` takes.

    A classifier's, or that of a backbone for detection and segmentation, which has a norm for each of four maps and no
    head. A `module.` left by data-parallel training is dropped.

    Args:
        state: the authors' state dict.
        config: not read: what the authors' trainer saves beside the weights says nothing of the model.
        preset, window: the side of the windows leaves no trace in the weights. By default it is 7; of those that were
            tuned at 384², say `preset="l2vit_base_384"` or `window=12`.
        options: further ones of the model, such as `tile`; they change no parameter.

    Raises:
        UserError: when the parameters are not those of one of the authors' models.
    """
    if window is None:
        window = 12 if preset == "l2vit_base_384" else 7
    plain = {name.replace("module.", ""): value for name, value in state.items()}
    first = plain.get("downsample_layers.0.proj.proj.0.weight")
    if first is None or "stages.0.1.attn.temperature" not in plain or first.dim() != 4:
        raise UserError("expected a state dict of L2ViT's Tiny, Small or Base, found other parameters")
    head = plain.get("head.weight")
    built: dict[str, Any] = {"num_classes": 0 if head is None else len(head), "in_channels": first.shape[1]}
    ours = {_renamed(name): value for name, value in plain.items()}
    shapes = {name: tuple(value.shape) for name, value in ours.items()}
    for name, sizes in _PRESETS.items():
        with torch.device("meta"):
            expected = {n: tuple(v.shape) for n, v in model.L2ViT(**sizes, **built).state_dict().items()}
        if shapes == expected:
            if name == "l2vit_base" and window == 12:
                return "l2vit_base_384", built, ours
            return name, built if window == 7 else {**built, "window": window}, ours
    raise UserError(f"these parameters have the names, but not the sizes, of one of {', '.join(_PRESETS)}")


def _renamed(name: str) -> str:
    block = re.match(r"^stages\.(\d+)\.(\d+)\.", name)
    if block is None:
        for theirs, ours in _NAMES.items():
            name, count = re.subn(theirs, ours, name)
            if count:
                break
        return name
    inside = name[block.end() :]
    if int(block[2]) % 2 == 0:  # a window block has two of them, a global one a list of one
        inside = re.sub(r"^cpe\.(\d)\.proj\.", r"positions.\1.conv.", inside)
    inside = inside.replace("cpe.0.proj.", "positions.conv.")
    for theirs, ours in _IN_A_BLOCK.items():
        if inside.startswith(theirs):
            inside = ours + inside.removeprefix(theirs)
            break
    return block[0] + inside

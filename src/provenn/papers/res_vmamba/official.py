"""Checkpoints of VMamba's first version and of Res-VMamba (ChiShengChen/ResVMamba): their parameter names to ours."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from provenn.core.errors import UserError
from provenn.papers.res_vmamba.model import DEEP, NARROW, SHALLOW, SOURCES, WIDE

PRESETS: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
    (NARROW, SHALLOW): "vmamba_tiny",
    (NARROW, DEEP): "vmamba_small",
    (WIDE, DEEP): "vmamba_base",
}
# What VMamba's earlier code called them.
EARLIER = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^(norm|head)\.", r"classifier.\1."),
)


def convert(state: Mapping[str, Tensor], *, source: str | None = None) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of an authors' model to ours: the preset, its options and what `load_state_dict` takes.

    A file of VMamba and one of the released Res-VMamba look alike: the latter's residual convolutions were drawn anew
    at every call and are in no file. Names of VMamba's earlier code are known; a `module.` is dropped.

    Args:
        state: the authors' state dict.
        source: of the model. By default "stage" where the file holds residual weights, else "none", plain VMamba. Of a
            file without them, "stage" and "stem" start at zero: the output is plain VMamba's, to be trained from. The
            value "official_random" does as the released code does.

    Raises:
        UserError: parameters of another model.
    """
    if source is not None and source not in SOURCES:
        raise UserError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    ours = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        for pattern, new in EARLIER:
            name = re.sub(pattern, new, name)
        ours[name] = value
    if any(".mlp." in name or ".op.out_norm_shape" in name or ".norm2." in name for name in ours):
        raise UserError(
            "these are weights of a later VMamba, whose blocks have a feed-forward branch: not this paper's"
        )
    try:
        channels = ours["patch_embed.0.weight"].shape[1]
        firsts = [ours[f"layers.{i}.blocks.0.op.A_logs"] for i in range(4)]
        dims = tuple(ours[f"layers.{i}.blocks.0.norm.weight"].shape[0] for i in range(4))
        depths = tuple(len({n.split(".")[3] for n in ours if n.startswith(f"layers.{i}.blocks.")}) for i in range(4))
        classes = ours["classifier.head.weight"].shape[0]
        ours["layers.0.downsample.reduction.weight"]
    except (KeyError, IndexError):
        raise UserError(
            "expected a state dict of VMamba's first version or of ChiShengChen/ResVMamba, found other parameters"
        ) from None
    preset = PRESETS.get((dims, depths))
    if preset is None or any(first.shape[1] != 16 for first in firsts):
        raise UserError(f"no preset has widths {dims}, depths {depths} and {firsts[0].shape[1]} states a channel")
    options: dict[str, Any] = {"num_classes": classes, "in_channels": channels}
    with_residual = "residual.0.weight" in ours
    source = source or ("stage" if with_residual else "none")
    if source in ("none", "official_random"):
        ours = {name: value for name, value in ours.items() if not name.startswith("residual.")}
    elif not with_residual:
        for i, (dim, out) in enumerate(itertools.pairwise(dims)):
            ours |= {f"residual.{i}.weight": torch.zeros(out, dim, 1, 1), f"residual.{i}.bias": torch.zeros(out)}
    if source == "none":
        return preset, options, ours
    return f"res_{preset}", {**options, "source": source}, ours

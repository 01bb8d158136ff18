"""The authors' checkpoints (zhangzjn/EMOv2 and zhangzjn/EMO): their parameter names to ours."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from provenn.core.errors import UserError
from provenn.papers.emov2.emo import EMO_SIZES
from provenn.papers.emov2.model import SIZES

STEM = {"0.conv": "0", "0.norm": "1", "1.conv": "3", "1.norm": "4", "2.conv": "6"}
INSIDE = (  # of a block, theirs to ours; the first that fits
    (r"norm\.norm\.", "norm."),
    (r"eops\.0\.net\.conv\.", "operator.0."),
    (r"eops\.0\.qk\.conv\.", "operator.qk."),
    (r"eops\.0\.v\.conv\.", "operator.v.0."),
    (r"conv_local\.conv\.", "local.0."),
    (r"conv_local\.norm\.", "local.1."),
    (r"proj\.conv\.", "project."),
    (r"ls\.gamma$", "scale"),
    (r"norm\.", "norm."),
)
EMO_STEM = {
    "0.convs.0.0": "0", "0.convs.0.1": "1", "1.conv_local.conv": "2", "1.conv_local.norm": "3",
    "1.se.conv_reduce": "5.squeeze", "1.se.conv_expand": "5.excite", "1.proj.conv": "6",
}  # fmt: skip
BASELINE = (3, 3, 5, 5)  # kernels of what the authors' file calls EMO1


def convert(
    state: Mapping[str, Tensor], *, mode: str | None = None, **options: Any
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of the authors' EMO2 or EMO to ours: preset, options and what `load_state_dict` takes.

    All attention modes have the same parameters, and no window has any: kernels of 3, 3, 5, 5 are taken for the
    baseline with remote windows, all others for spanning ones, unless `mode` says otherwise.

    Args:
        state: as saved, with or without data-parallel training's `module.`.
        mode: of EMO2's stages with attention.
        options: of the preset, where the weights do not show them: `window`, and `image_size` of EMO2.

    Raises:
        UserError: when the parameters are not those of one of the authors' models.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    if "stage0.0.convs.0.0.weight" in plain:
        if mode is not None:
            raise UserError(f"EMO's attention is remote, and has no mode to choose, got {mode!r}")
        return _convert_emo(plain, options)
    try:
        widths = tuple(plain[f"stage{i}.0.proj.conv.weight"].shape[0] for i in (1, 2, 3, 4))
        kernels = tuple(plain[f"stage{i}.0.conv_local.conv.weight"].shape[-1] for i in (1, 2, 3, 4))
        channels, classes = plain["stage0.0.conv.weight"].shape[1], plain["head.weight"].shape[0]
        ours = {_ours(name): value.flatten() if name.endswith("ls.gamma") else value for name, value in plain.items()}
    except (KeyError, IndexError):
        raise UserError("expected a state dict of EMOv2's EMO2, found other parameters") from None
    depths = tuple(len({n.split(".")[1] for n in plain if n.startswith(f"stage{i}.")}) for i in (1, 2, 3, 4))
    variant = next((name for name, of in SIZES.items() if (of.depths, of.widths) == (depths, widths)), None)
    if variant is None:
        raise UserError(f"no EMOv2 of the paper has stages of {depths} blocks and {widths} channels")
    found = {"num_classes": classes, "in_channels": channels, **options}
    if kernels == BASELINE:
        return f"emov2_baseline_{variant}", {**found, **({"mode": mode} if mode else {})}, ours
    kernel_sizes = {} if set(kernels) == {5} else {"kernel_sizes": list(kernels)}
    return f"emov2_{variant}", {**found, **kernel_sizes, **({"mode": mode} if mode else {})}, ours


def _convert_emo(plain: Mapping[str, Tensor], options: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    try:
        widths = tuple(plain[f"stage{i}.0.proj.conv.weight"].shape[0] for i in (1, 2, 3, 4))
        channels, classes = plain["stage0.0.convs.0.0.weight"].shape[1], plain["head.weight"].shape[0]
        ours = {_ours_of_emo(name, plain): value for name, value in plain.items()}
    except (KeyError, IndexError):
        raise UserError("expected a state dict of EMO, found other parameters") from None
    gate = ("stem.5.squeeze.weight", "stem.5.excite.weight")  # there convolutions of 1×1
    ours |= {name: ours[name].flatten(1) for name in gate if name in ours}
    depths = tuple(len({n.split(".")[1] for n in plain if n.startswith(f"stage{i}.")}) for i in (1, 2, 3, 4))
    variant = next((name for name, of in EMO_SIZES.items() if (of.depths, of.widths) == (depths, widths)), None)
    if variant is None:
        raise UserError(f"no EMO of the authors has stages of {depths} blocks and {widths} channels")
    return f"emo_{variant}", {"num_classes": classes, "in_channels": channels, **options}, ours


def _ours_of_emo(name: str, plain: Mapping[str, Tensor]) -> str:
    """As EMO2's but for the stem, and for v, which is the whole operator where there are no queries."""
    if name.startswith("stage0."):
        module, _, leaf = name.removeprefix("stage0.").rpartition(".")
        return f"stem.{EMO_STEM[module]}.{leaf}"
    if block := re.match(r"stage\d\.\d+\.(?=(qk|v)\.)", name):
        attends = f"{block[0]}qk.conv.weight" in plain
        operator = "eops.0." if attends else "eops.0.net."
        name = block[0] + operator + name[block.end() :].removeprefix("" if attends else "v.")
    return _ours(name)


def _ours(name: str) -> str:
    if name.startswith("stage0."):
        module, _, leaf = name.removeprefix("stage0.").rpartition(".")
        return f"stem.{STEM[module]}.{leaf}"
    if block := re.match(r"stage(\d)\.(\d+)\.", name):
        rest = name[block.end() :]
        for theirs, ours in INSIDE:
            if re.match(theirs, rest):
                return f"stages.{int(block[1]) - 1}.{block[2]}.{re.sub(f'^{theirs}', ours, rest)}"
        raise KeyError(name)
    if name.startswith("norm.norm."):
        return name.removeprefix("norm.")
    if name.startswith("head."):
        return name
    raise KeyError(name)

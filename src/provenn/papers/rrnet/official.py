"""Weights of Chan-0312/RRNet to ours: `model_log/…/SP0/weight_best.pkl` and its like."""

import re

import torch
from torch import Tensor

from provenn.core.errors import UserError

_NAMES = [
    (r"^ResBlock_list\.(\d)\.0\.ResBlock\.", r"stages.\1.0.body."),
    (r"^ResBlock_list\.(\d)\.0\.downsample\.0\.", r"stages.\1.0.shortcut."),
    (r"^rnn\.", "rnn.rnn."),
    (r"^conv1\.0\.", "body.0."),
    (r"^conv2\.0\.", "body.2."),
    (r"^fc1\.0\.", "head.body.0."),
    (r"^fc2\.0\.", "head.body.3."),
    (r"^mu\.", "head.mean."),
    (r"^sigma\.0\.", "head.variance."),
]
LABELS = {3: "sp", 14: "ca"}


def convert(
    state: dict[str, Tensor], config: object = None, preset: str | None = None, **options: object
) -> tuple[str, dict[str, object], dict[str, Tensor]]:
    """The preset that the authors' weights belong to, its options, and the weights under our names.

    Where the recurrent network sits follows from its width: that of a segment of the spectrum, or of its features.

    Args:
        state: the authors' state dict.
        config: there is none.
        preset: which one the user says it is.
        options: that the user gives.

    Raises: UserError for weights of another network.
    """
    if "mu.weight" not in state or not ("conv1.0.weight" in state or "ResBlock_list.0.0.ResBlock.0.weight" in state):
        raise UserError("these are no weights of Chan-0312/RRNet: expected those of its RRNet or StarNet")
    labels = len(state["mu.weight"])
    star = "conv1.0.weight" in state
    mode = "raw"
    if "rnn.weight_ih_l0" in state:
        width = len(state["rnn.weight_ih_l0"])
        # 7,200 pixels in 40 segments have 180 each, their 14,400 features 360. StarNet's two modes have one shape.
        mode = str(options.get("mode", "post")) if star else ("pre" if width == 180 else "post")
    name = ("starnet" if star else "rrnet") + f"_{LABELS.get(labels, 'sp')}"
    built: dict[str, object] = {"mode": mode} | ({} if labels in LABELS else {"labels": labels})
    converted = {_rename(key): tensor for key, tensor in state.items()}
    return name, built, converted | {"examples_seen": torch.zeros((), dtype=torch.int64)}


def _rename(name: str) -> str:
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name

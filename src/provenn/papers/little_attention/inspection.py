"""What attention does with a picture of yours, for `provenn inspect`."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.papers.little_attention.placement import CHILD


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Tensor]:
    """What each attention block does to each channel: the mean over space of what it gives, minus what it was given.

    C-NL is our reconstruction. Of C-NL that adds, it is what is added at every position; of a gate, the mean change.
    """
    changes: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        changes[name] = (output - args[0]).mean((0, 2, 3))

    handles = [
        module.register_forward_hook(partial(note, name.removesuffix(f".{CHILD}")))
        for name, module in model.named_modules()
        if name.endswith(f".{CHILD}")
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return changes

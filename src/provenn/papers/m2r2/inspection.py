"""What `provenn inspect m2r2` shows: how near both streams are to where the decoder ends."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.papers.m2r2.model import ExitModel


@torch.no_grad()
def inspect(model: nn.Module, x: Tensor) -> dict[str, Float[Tensor, " states"]]:
    """The cosine of each stream's state with the decoder's last, the mean over tokens, layer by layer to the last gate.

    A rate of two shows as a line of the fast stream that runs ahead of the slow one's by as many layers again.
    """
    if not isinstance(model, ExitModel):
        return {}  # the second model of speculation has one stream
    streams = model.streams(x)
    fast = [*streams.fast[0], *(state for part in streams.fast[1:] for state in part[1:])]
    lines = {"slow stream": streams.slow[: len(fast)], "fast stream": fast}
    last = streams.slow[-1]
    return {
        name: torch.stack([F.cosine_similarity(state, last, dim=-1).mean() for state in states])
        for name, states in lines.items()
    }

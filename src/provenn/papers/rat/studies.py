"""Retrieval as a probe of chunk lengths: a model that reads pairs, and what its gates let in."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from provenn.nn.language import CausalLM
from provenn.nn.mixers import Mixers
from provenn.papers.rat.layers import RATMixer
from provenn.tasks.recall import PairEmbedding


def pair_reader(mixer: Mixers, keys: int, values: int, *, dim: int = 64, layers: int = 2) -> CausalLM:
    """A language model for the task `lookup`, whose tokens are pairs of a key and a value.

    Matrices start as N(0, 1/dim), which is what the paper's 0.02² is at its width of 2048.
    """
    model: Any = CausalLM(values, dim, layers, mixer, hidden=dim, tied=False)
    model.embed = PairEmbedding(keys, values, dim)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=dim**-0.5)
    return model


@torch.no_grad()
def open_gates(model: CausalLM, tokens: Int[Tensor, "batch tokens"], where: Tensor) -> list[float]:
    """The mean of 1 − g over the tokens of a mask, in each RAT layer: how much of them is taken in."""
    found: list[float] = []

    def look(mixer: RATMixer, inputs: tuple[Tensor, ...]) -> None:
        found.append((1 - mixer._project(inputs[0])[2])[where].mean().item())

    hooks = [block.mixer.register_forward_pre_hook(look) for block in model.blocks]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found

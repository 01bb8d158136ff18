"""Transfer: weights of a network trained on other skin wounds, taken into one for ulcers."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from provenn.core.tensors import read_tensors

SHIPPED = Path(__file__).with_name("weights")
HEAD = "head."
RATE_SHARE = 0.1  # of the recipe's learning rate, where weights are taken over


def read_start(path: str | Path) -> dict[str, Tensor]:
    """`read_tensors` of a file, of a run, or of a preset of this paper that ships."""
    return read_tensors(path, SHIPPED, "start")


def transfer(model: nn.Module, state: Mapping[str, Tensor], *, strict_head: bool = False) -> list[str]:
    """Take tensors of a source network into a model; returns the names of those that kept their fresh values.

    Args:
        model: takes them, and keeps its own head where the source's has another shape.
        state: of the source network.
        strict_head: refuse another head too.

    Raises:
        ValueError: a tensor other than the head's is missing, is unknown, or has another shape.
    """
    own = model.state_dict()
    taken: dict[str, Tensor] = {}
    for name, tensor in own.items():
        may_differ = name.startswith(HEAD) and not strict_head
        if name in state and state[name].shape == tensor.shape:
            taken[name] = state[name]
        elif not may_differ:
            came = tuple(state[name].shape) if name in state else "nothing"
            raise ValueError(f"{name}: expected {tuple(tensor.shape)} of the source network, got {came}")
    unknown = next((name for name in state if name not in own), None)
    if unknown is not None:
        raise ValueError(f"the source network has {unknown}, which this one has not")
    model.load_state_dict(taken, strict=False)
    return [name for name in own if name not in taken]


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Set the mean and variance of every batch norm to the average over batches of images; no weight changes.

    Args:
        model: is left in eval mode.
        batches: images as the network sees them, (batch, channels, height, width).
    """
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a running mean of all batches
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return model.eval()

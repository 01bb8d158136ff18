"""One window of a system as a function of tensors alone, to be written as a file."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from provenn.papers.temporal_residual_diffusion.model import Memory, Reconstructor
from provenn.tasks.base import Portable


class Step(nn.Module):
    """The next frame and what is carried on, as tensors by name.

    Args:
        network: the system.
        form: how its memory is nested.
    """

    def __init__(self, network: Reconstructor, form: TreeSpec):
        super().__init__()
        self.network, self.form = network, form

    def forward(self, voxel: Tensor, noise: Tensor, **carried: Tensor) -> tuple[Tensor, ...]:
        memory = tree_unflatten([carried[f"memory_{i}"] for i in range(len(carried))], self.form)
        frame, after = self.network.step(voxel, memory, noise)
        return frame, *tree_flatten(after)[0]


def one_step(network: Reconstructor, meta: dict[str, Any]) -> Portable:
    """From `voxel`, `noise` and `memory_0` … to `frame` and `next_0` …, which the next call is given as its memory.

    `memory_0` is the last frame; the others are states of the recurrent layers, zeros and frames at the start.

    Args:
        network: the system.
        meta: of its data; the file is for grids of its size.
    """
    side, bins = int(meta["size"]), int(meta["bins"])
    generator = torch.Generator().manual_seed(0)
    voxel = torch.randn(2, bins, side, side, generator=generator).round()
    noise = torch.randn(2, 1, side, side, generator=generator)
    frame = torch.rand(2, 1, side, side, generator=generator)
    with torch.no_grad():
        _, memory = network.step(voxel, Memory(frame), noise)
    leaves, form = tree_flatten(memory)
    carried = {f"memory_{i}": leaf.clone() for i, leaf in enumerate(leaves)}
    example = {"voxel": voxel, "noise": noise, **carried}
    return Portable(
        Step(network, form).eval(),
        example,
        ["frame", *(f"next_{i}" for i in range(len(leaves)))],
        {name: {0: "batch"} for name in example},
    )

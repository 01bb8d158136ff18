"""One window of a system as a function of tensors alone, to be written as a file."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from provenn.papers.temporal_residual_diffusion.model import Memory, Reconstructor
from provenn.tasks.base import Portable


class Step(nn.Module):
    """The next frame and what is carried on; all states of an example stand in one row of numbers.

    Args:
        network: the system.
        states: of a batch, as the system nests them.
    """

    def __init__(self, network: Reconstructor, states: Any):
        super().__init__()
        self.network = network
        leaves, self.form = tree_flatten(states)
        self.shapes = [tuple(leaf.shape[1:]) for leaf in leaves]

    def row(self, states: Any) -> Float[Tensor, "batch numbers"]:
        """States as a row an example."""
        return torch.cat([leaf.flatten(1) for leaf in tree_flatten(states)[0]], 1)

    def forward(
        self,
        voxel: Float[Tensor, "batch bins height width"],
        noise: Float[Tensor, "batch 1 height width"],
        last: Float[Tensor, "batch 1 height width"],
        memory: Float[Tensor, "batch numbers"],
    ) -> tuple[Float[Tensor, "batch 1 height width"], Float[Tensor, "batch numbers"]]:
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        leaves = [part.unflatten(1, shape) for part, shape in zip(memory.split(sizes, 1), self.shapes, strict=True)]
        frame, after = self.network.step(voxel, Memory(last, tree_unflatten(leaves, self.form)), noise)
        return frame, self.row(after.states)


def one_step(network: Reconstructor, meta: dict[str, Any]) -> Portable:
    """From `voxel`, `noise`, the `last` frame and `memory` to the next `frame` and the `kept` memory.

    At the start the memory is zeros; of a network that is told its own last frame, the first frame stands where it is.

    Args:
        network: the system.
        meta: of its data; the file is for grids of its size.
    """
    side, bins = int(meta["size"]), int(meta["bins"])
    generator = torch.Generator().manual_seed(0)
    voxel = torch.randn(2, bins, side, side, generator=generator).round()
    noise = torch.randn(2, 1, side, side, generator=generator)
    last = torch.rand(2, 1, side, side, generator=generator)
    with torch.no_grad():
        _, memory = network.step(voxel, Memory(last), noise)
    system = Step(network, memory.states).eval()
    example = {"voxel": voxel, "noise": noise, "last": last, "memory": system.row(memory.states)}
    return Portable(system, example, ["frame", "kept"], {name: {0: "batch"} for name in example})

"""Distances on graphs."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def shortest_paths(edges: Bool[Tensor, "*batch nodes nodes"]) -> Int[Tensor, "*batch nodes nodes"]:
    """The length of the shortest path between all nodes of graphs, −1 where there is none.

    Breadth first from all nodes at once: a product of matrices a step, and no more steps than the longest path has.

    >>> line = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    >>> shortest_paths(line)[0].tolist()
    [0, 1, 2, -1]
    """
    nodes = edges.shape[-1]
    reached = torch.eye(nodes, dtype=torch.bool, device=edges.device).expand(edges.shape)
    lengths = torch.where(reached, 0, -1)
    frontier, step = reached, 0
    while bool(frontier.any()):
        step += 1
        frontier = ((frontier.float() @ edges.float()) > 0) & ~reached
        lengths = torch.where(frontier, step, lengths)
        reached = reached | frontier
    return lengths

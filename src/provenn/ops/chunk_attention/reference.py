"""Attention of every token to the states of the chunks before its own, and to its own chunk's running state.

Keys k and values v are running states: those of token t sum up its chunk from the chunk's first token to t. So the
state of a finished chunk is that of its last token, and a token's own pair stands for the unfinished chunk that it is
in.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Earlier(NamedTuple):
    """States of chunks that were finished before the tokens at hand: the first `filled` slots of each stream."""

    keys: Float[Tensor, "batch heads slots dim"]
    values: Float[Tensor, "batch heads slots dim"]
    filled: Int[Tensor, " batch"]

    @property
    def mask(self) -> Tensor:
        """(batch, 1, 1, slots), True where a slot holds a finished chunk."""
        slots = torch.arange(self.keys.shape[2], device=self.filled.device)
        return slots < self.filled.view(-1, 1, 1, 1)


def joint_softmax(
    queries: Float[Tensor, "batch heads tokens dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    values: Float[Tensor, "batch heads tokens dim"],
    *,
    chunk: int,
    earlier: Earlier | None = None,
) -> Float[Tensor, "batch heads tokens dim"]:
    """The definition: one softmax over the finished chunks' scores and the own one, as a tokens × chunks matrix."""
    n, dim = queries.shape[2:]
    dtype = torch.promote_types(queries.dtype, torch.float32)
    q, k, v = (tensor.to(dtype) for tensor in (queries * dim**-0.5, keys, values))
    end_keys, end_values = k[:, :, chunk - 1 :: chunk], v[:, :, chunk - 1 :: chunk]
    chunk_of = torch.arange(n, device=q.device) // chunk
    finished = chunk_of.unsqueeze(1) > torch.arange(end_keys.shape[2], device=q.device)
    scores = [(q * k).sum(dim=-1, keepdim=True), (q @ end_keys.mT).masked_fill(~finished, -torch.inf)]
    if earlier is not None:
        scores.append((q @ earlier.keys.to(dtype).mT).masked_fill(~earlier.mask, -torch.inf))
    # One softmax over all of them, then apart again, since each kind weighs other values.
    sizes = [block.shape[-1] for block in scores]
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).split(sizes, dim=-1)
    outputs = weights[0] * v + weights[1] @ end_values
    if earlier is not None:
        outputs = outputs + weights[2] @ earlier.values.to(dtype)
    return outputs.to(values.dtype)

"""Attention to the states of finished chunks and to the running state of the own one (arXiv:2507.04416, section 3)."""

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import is_transformed

from . import triton
from .fast import merged_attention
from .reference import Earlier, joint_softmax

__all__ = ["Earlier", "chunk_attention", "joint_softmax", "merged_attention"]


def chunk_attention(
    queries: Float[Tensor, "batch heads tokens dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    values: Float[Tensor, "batch heads tokens dim"],
    *,
    chunk: int,
    earlier: Earlier | None = None,
) -> Float[Tensor, "batch heads tokens dim"]:
    """y_t = softmax([q_t·K̄_j for finished chunks j, q_t·k_t]) [V̄_j, v_t], scores divided by √dim.

    K̄_j and V̄_j are the keys and values of the last token of chunk j. Takes the fastest form there is for the device: a
    Triton kernel on CUDA, fused attention and a merge on the CPU, else a tokens × chunks matrix.

    Args:
        queries: q_t.
        keys, values: running states: those of token t sum up its chunk up to t.
        chunk: L, tokens a chunk; the last one may be shorter.
        earlier: states of chunks that were finished before these tokens, which all of them see.

    >>> one = torch.ones(1, 1, 4, 1)
    >>> values = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 1, 4, 1)
    >>> chunk_attention(0 * one, one, values, chunk=2).flatten().tolist()
    [1.0, 3.0, 4.0, 5.0]
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if not queries.shape == keys.shape == values.shape or queries.dim() != 4 or queries.shape[2] < 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (queries, keys, values))
        raise ValueError(
            f"queries, keys and values must be of one shape (batch, heads, tokens, dim) with a token, got {shapes}"
        )
    if is_transformed():
        return joint_softmax(queries, keys, values, chunk=chunk, earlier=earlier)
    # Made of PyTorch's kernel for the CPU, which has shapes and counts of operations on `meta` too.
    if queries.device.type in ("cpu", "meta"):
        return merged_attention(queries, keys, values, chunk=chunk, earlier=earlier)
    kernel = earlier is None and queries.dtype != torch.float64 and queries.shape[-1] <= triton.LARGEST_DIM
    kernel = kernel and queries.dtype == keys.dtype == values.dtype
    if kernel and not torch.compiler.is_compiling() and triton.available(queries.device):
        return triton.triton_attention(queries, keys, values, chunk=chunk)
    return joint_softmax(queries, keys, values, chunk=chunk, earlier=earlier)

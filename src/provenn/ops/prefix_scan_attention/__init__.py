"""Softmax attention of a fixed query over every prefix of a sequence, by a parallel prefix scan."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import is_transformed

from . import triton
from .fast import chunked_attention, log_depth_attention
from .reference import PrefixState, blockwise_attention, masked_softmax_attention, merge, recurrent_attention

__all__ = [
    "PrefixState",
    "blockwise_attention",
    "chunked_attention",
    "log_depth_attention",
    "masked_softmax_attention",
    "merge",
    "prefix_scan_attention",
    "recurrent_attention",
]


def prefix_scan_attention(
    scores: Float[Tensor, "*batch tokens"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    state: PrefixState | None = None,
) -> tuple[Float[Tensor, "*batch tokens dim"], PrefixState]:
    """o_k = Σ_{i≤k} exp(s_i) v_i / Σ_{i≤k} exp(s_i) for every k, in linear time (arXiv:2405.13956, section 3.2).

    Takes the fastest form there is for the device: a Triton kernel on CUDA, else the chunked scan.

    Args:
        scores: s_i, the query against every key, already scaled.
        values: v_i.
        mask: True where a token may be attended; broadcasts to `scores`. A prefix with nothing to attend gives 0.
        state: what came before, as returned by an earlier call; by default nothing.

    Returns the output at every token and the state after the last, from which another call goes on.

    >>> outputs, state = prefix_scan_attention(torch.zeros(1, 3), torch.tensor([[[1.0], [2.0], [6.0]]]))
    >>> outputs.flatten().tolist(), state.output.tolist()
    ([1.0, 1.5, 3.0], [[3.0]])
    """
    if scores.shape != values.shape[:-1] or scores.shape[-1] < 1:
        raise ValueError(
            "scores must be (..., tokens) and values (..., tokens, dim) with at least one token, "
            f"got {tuple(scores.shape)} and {tuple(values.shape)}"
        )
    fits = torch.float64 not in (values.dtype, scores.dtype) and values.shape[-1] <= triton.LARGEST_DIM
    # A compiler or an export traces the PyTorch form, which it can fuse and carry elsewhere.
    traced = torch.compiler.is_compiling() or is_transformed()
    if values.is_cuda and fits and not traced and values.numel() <= triton.QUICK and triton.available(values.device):
        return triton.triton_attention(scores, values, mask=mask, state=state)
    return chunked_attention(scores, values, mask=mask, state=state)

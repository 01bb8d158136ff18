"""Linear attention: a product of features in the place of exp(q·k), in linear time, with a state of constant size."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import is_transformed

from . import triton
from .fast import bidirectional_attention, causal_attention, chunked_product
from .reference import LinearState, linear_attention_weights, quadratic_attention, recurrent_attention

__all__ = [
    "LinearState",
    "bidirectional_attention",
    "causal_attention",
    "chunked_product",
    "linear_attention",
    "linear_attention_weights",
    "quadratic_attention",
    "recurrent_attention",
]


def linear_attention(
    queries: Float[Tensor, "*batch queries features"],
    keys: Float[Tensor, "*batch tokens features"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    causal: bool = True,
    mask: Bool[Tensor, "..."] | None = None,
    state: LinearState | None = None,
) -> tuple[Float[Tensor, "*batch queries dim"], LinearState]:
    """y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j), over j ≤ i where causal, in linear time (arXiv:2006.16236).

    Takes the fastest form there is for the device: a Triton kernel on CUDA, else chunks.

    Args:
        queries, keys: φ(q) and φ(k), features already mapped, so that no φ(q)·φ(k) is negative.
        values: v.
        causal: token i attends to the state and to tokens 1..i; else to the state and all tokens.
        mask: True where a token may be attended; broadcasts to (*batch, tokens). Nothing to attend gives 0.
        state: what came before, as returned by an earlier call; by default nothing.

    Returns the output of every query and the state after the last token, from which another call goes on.

    >>> ones = torch.ones(1, 3, 2)
    >>> outputs, state = linear_attention(ones, ones, torch.tensor([[[1.0], [2.0], [6.0]]]))
    >>> outputs.flatten().tolist(), state.z.tolist()
    ([1.0, 1.5, 3.0], [[3.0, 3.0]])
    """
    if keys.shape[:-1] != values.shape[:-1] or queries.shape[-1] != keys.shape[-1] or keys.shape[-2] < 1:
        raise ValueError(
            "expected queries (..., queries, features), keys (..., tokens, features) and values (..., tokens, dim) "
            f"with at least one token, got {tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if not causal:
        return bidirectional_attention(queries, keys, values, mask=mask, state=state)
    if queries.shape != keys.shape:
        raise ValueError(
            f"causal attention needs a query a token, got {queries.shape[-2]} queries and {keys.shape[-2]} tokens"
        )
    fits = torch.float64 not in (queries.dtype, keys.dtype, values.dtype)
    fits &= max(keys.shape[-1], values.shape[-1] + 1) <= triton.LARGEST
    # A compiler or an export traces the PyTorch form, which it can fuse and carry elsewhere.
    traced = torch.compiler.is_compiling() or is_transformed()
    if values.is_cuda and fits and not traced and triton.available(values.device):
        return causal_attention(queries, keys, values, mask=mask, state=state, product=triton.kernel_product)
    return causal_attention(queries, keys, values, mask=mask, state=state)

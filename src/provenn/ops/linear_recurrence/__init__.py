"""The gated linear recurrence h_t = a_t ⊙ h_{t−1} + x_t, all tokens at once."""

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import is_transformed

from . import triton
from .fast import chunked
from .reference import recurrent

__all__ = ["chunked", "linear_recurrence", "recurrent"]


def linear_recurrence(
    gates: Float[Tensor, "*batch tokens dim"],
    inputs: Float[Tensor, "*batch tokens dim"],
    *,
    state: Float[Tensor, "*batch dim"] | None = None,
) -> tuple[Float[Tensor, "*batch tokens dim"], Float[Tensor, "*batch dim"]]:
    """h_t = a_t ⊙ h_{t−1} + x_t for every t and channel, in linear work and float32 at least.

    Takes the fastest form there is for the device: a Triton kernel on CUDA, else the chunked scan.

    Args:
        gates: a_t, of any size and sign; 0 forgets all that came before.
        inputs: x_t.
        state: h_0; by default zero.

    Returns h_t for every t in the inputs' type, and the last one in the type it was summed in, from which another call
    goes on.

    >>> states, last = linear_recurrence(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1))
    >>> states.flatten().tolist(), last.tolist()
    ([1.0, 1.5, 1.75], [[1.75]])
    """
    if gates.shape != inputs.shape or inputs.dim() < 2 or inputs.shape[-2] < 1:
        raise ValueError(
            "gates and inputs must both be (..., tokens, dim) with at least one token, "
            f"got {tuple(gates.shape)} and {tuple(inputs.shape)}"
        )
    fits = torch.float64 not in (gates.dtype, inputs.dtype)
    # A compiler or an export traces the PyTorch form, which it can fuse and carry elsewhere.
    traced = torch.compiler.is_compiling() or is_transformed()
    if inputs.is_cuda and fits and not traced and triton.available(inputs.device):
        return triton.triton_recurrence(gates, inputs, state=state)
    return chunked(gates, inputs, state=state)

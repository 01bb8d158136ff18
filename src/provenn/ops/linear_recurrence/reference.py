"""The gated linear recurrence h_t = a_t ⊙ h_{t−1} + x_t, by its definition: one token after another."""

import torch
from jaxtyping import Float
from torch import Tensor


def recurrent(
    gates: Float[Tensor, "*batch tokens dim"],
    inputs: Float[Tensor, "*batch tokens dim"],
    *,
    state: Float[Tensor, "*batch dim"] | None = None,
) -> tuple[Float[Tensor, "*batch tokens dim"], Float[Tensor, "*batch dim"]]:
    """h_t = a_t ⊙ h_{t−1} + x_t with h_0 = `state` or zero, in float32 at least; every h_t, and the last unrounded."""
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    a, x = gates.to(dtype), inputs.to(dtype)
    h = torch.zeros_like(x[..., 0, :]) if state is None else state.to(dtype)
    states = []
    for t in range(x.shape[-2]):
        h = a[..., t, :] * h + x[..., t, :]
        states.append(h)
    return torch.stack(states, dim=-2).to(inputs.dtype), h

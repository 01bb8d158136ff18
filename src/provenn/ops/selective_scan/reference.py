"""The selective scan by its definition: one token after another."""

import torch
from jaxtyping import Float
from torch import Tensor


def recurrent(
    u: Float[Tensor, "batch dim tokens"],
    delta: Float[Tensor, "batch dim tokens"],
    A: Float[Tensor, "dim states"],
    B: Float[Tensor, "batch groups states tokens"],
    C: Float[Tensor, "batch groups states tokens"],
    *,
    state: Float[Tensor, "batch dim states"] | None = None,
) -> tuple[Float[Tensor, "batch dim tokens"], Float[Tensor, "batch dim states"]]:
    """h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t u_t B_t,  y_t = ⟨C_t, h_t⟩, with h_0 = `state` or zero; y and the last h.

    A channel uses B and C of its group; groups are as many channels wide each, in their order. Computed in the type of
    the inputs, which `selective_scan` makes float32 at least.
    """
    rows = u.shape[1] // B.shape[1]
    h = u.new_zeros(u.shape[0], *A.shape) if state is None else state
    outputs = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        b, c = (x[..., t].repeat_interleave(rows, dim=1) for x in (B, C))
        h = (step * A).exp() * h + step * u[:, :, t, None] * b
        outputs.append((h * c).sum(-1))
    return torch.stack(outputs, dim=-1), h

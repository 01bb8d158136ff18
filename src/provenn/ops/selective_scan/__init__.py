"""The selective scan of Mamba (Gu & Dao, 2023, arXiv:2312.00752): a linear recurrence whose gates the input sets."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import check_fixed_length, is_transformed, without_autocast

from . import triton
from .fast import chunked
from .reference import recurrent

__all__ = ["chunked", "recurrent", "selective_scan"]


def selective_scan(
    u: Float[Tensor, "batch dim tokens"],
    delta: Float[Tensor, "batch dim tokens"],
    A: Float[Tensor, "dim states"],
    B: Float[Tensor, "batch *groups states tokens"],
    C: Float[Tensor, "batch *groups states tokens"],
    D: Float[Tensor, " dim"] | None = None,
    *,
    delta_bias: Float[Tensor, " dim"] | None = None,
    delta_softplus: bool = False,
    state: Float[Tensor, "batch dim states"] | None = None,
) -> tuple[Float[Tensor, "batch dim tokens"], Float[Tensor, "batch dim states"]]:
    """h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t B_t u_t,  y_t = ⟨C_t, h_t⟩ + D u_t, every channel by itself.

    In linear work and in float32 at least, under autocast too. Takes the fastest form there is for the device: a Triton
    kernel on CUDA, else chunks side by side. Shapes and names are those of `mamba_ssm`.

    Args:
        u: u_t, the input.
        delta: Δ_t, how far a token moves the state: at 0 the state ignores the token, at large values the token
            replaces it.
        A: of the decay, as a rule negative.
        B, C: what is written and read; one for all channels, or one for each group of as many channels.
        D: of the path around the state; none by default.
        delta_bias: added to Δ.
        delta_softplus: Δ is softplus(Δ + bias).
        state: h_0; by default zero.

    Returns y in the input's type, and the last state in the type it was summed in, from which another call goes on.

    >>> one = torch.ones(1, 1, 3)
    >>> y, last = selective_scan(one, one, torch.full((1, 1), -0.6931), one, one)
    >>> [round(value, 3) for value in y.flatten().tolist()], last.shape
    ([1.0, 1.5, 1.75], torch.Size([1, 1, 1]))
    """
    check_fixed_length(u.shape[-1], "the scan over tokens")
    if B.dim() == 3:
        B = B.unsqueeze(1)
    if C.dim() == 3:
        C = C.unsqueeze(1)
    _check(u, delta, A, B, C, state)
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None and vector.shape != A.shape[:1]:
            raise ValueError(f"{name} must be ({A.shape[0]},), one number a channel, got {tuple(vector.shape)}")
    dtype = torch.promote_types(u.dtype, torch.float32)
    with without_autocast(u):
        wide = [x.to(dtype) for x in (u, delta, A, B, C)]
        if delta_bias is not None:
            wide[1] = wide[1] + delta_bias.to(dtype).unsqueeze(-1)
        if delta_softplus:
            wide[1] = F.softplus(wide[1])
        # A compiler or an export traces the PyTorch form, which it can carry elsewhere.
        traced = torch.compiler.is_compiling() or is_transformed()
        kernel = u.is_cuda and dtype == torch.float32 and A.shape[1] <= triton.LARGEST_STATE and not traced
        form = triton.triton_scan if kernel and triton.available(u.device) else chunked
        y, last = form(*wide, state=None if state is None else state.to(dtype))
        if D is not None:
            y = torch.addcmul(y, wide[0], D.to(dtype).unsqueeze(-1))
    return y.to(u.dtype), last


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> None:
    shapes = {"u": u, "delta": delta, "A": A, "B": B, "C": C, **({} if state is None else {"state": state})}
    got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in shapes.items())
    fits = u.dim() == 3 and delta.shape == u.shape and A.dim() == 2 and A.shape[0] == u.shape[1] and u.shape[2] > 0
    fits = fits and B.shape == C.shape and B.dim() == 4 and B.shape[0] == u.shape[0] and B.shape[1] > 0
    fits = fits and B.shape[2:] == (A.shape[1], u.shape[2]) and A.shape[0] % B.shape[1] == 0
    if not fits or (state is not None and state.shape != (u.shape[0], *A.shape)):
        raise ValueError(
            "expected u and delta (batch, dim, tokens) with a token, A (dim, states), B and C (batch, states, tokens) "
            f"or (batch, groups, states, tokens) with groups that divide dim, state (batch, dim, states); got {got}"
        )

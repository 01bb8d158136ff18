"""Softmax attention whose weights are multiplied by a number a pair: their rows no longer sum to 1."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .fast import doubled_keys
from .reference import explicit

__all__ = ["doubled_keys", "explicit", "rescaled_attention"]

FUSED_FROM = 512  # keys, from which on the fused form is clearly the quicker of the two, on one thread


def rescaled_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch heads keys head_dim"],
    v: Float[Tensor, "batch heads keys width"],
    *,
    bias: Float[Tensor, "#batch #heads #queries #keys"] | None = None,
    factors: Float[Tensor, "#batch #heads #queries #keys"] | None = None,
    visible: Bool[Tensor, "#batch #heads #queries #keys"] | None = None,
    scale: float | None = None,
    form: str = "auto",
) -> Float[Tensor, "batch heads queries width"]:
    """y_i = Σ_j p_ij c_ij v_j,  p = softmax_j(s q_i·k_j + b_ij)  (arXiv:2205.13401, section 4).

    Args:
        q, k, v: queries, keys and values of each head.
        bias: b, on the scores; None is 0.
        factors: c, of any sign, on what the softmax gives; None is 1.
        visible: True where a query may attend to a key; a query that may attend to none gets 0.
        scale: s; by default 1/√head_dim.
        form: "explicit" forms the weights of all pairs; "fused" leaves them to PyTorch's fused attention, over keys
            that stand twice; "auto" takes the fused one for long sequences where nothing is differentiated: a fused
            kernel gives no gradient to biases on a CPU.

    >>> v = torch.tensor([[[[1.0], [3.0]]]])
    >>> rescaled_attention(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2), v, factors=torch.tensor([[[[2.0, 0.0]]]]))
    tensor([[[[1.]]]])
    """
    if form not in ("auto", "explicit", "fused"):
        raise ValueError(f"form must be auto, explicit or fused, got {form!r}")
    if form == "auto":
        differentiated = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, bias, factors)
        )
        form = "explicit" if differentiated or k.shape[-2] < FUSED_FROM else "fused"
    run = doubled_keys if form == "fused" else explicit
    return run(q, k, v, bias=bias, factors=factors, visible=visible, scale=scale)

"""Softmax attention whose weights are multiplied by a number a pair: their rows no longer sum to 1."""

from jaxtyping import Bool, Float
from torch import Tensor

from .fast import tripled_keys
from .reference import explicit

__all__ = ["FORMS", "explicit", "rescaled_attention", "tripled_keys"]

FORMS = {"explicit": explicit, "fused": tripled_keys}


def rescaled_attention(
    q: Float[Tensor, "batch heads queries head_dim"],
    k: Float[Tensor, "batch heads keys head_dim"],
    v: Float[Tensor, "batch heads keys width"],
    *,
    bias: Float[Tensor, "#batch #heads #queries #keys"] | None = None,
    factors: Float[Tensor, "#batch #heads #queries #keys"] | None = None,
    visible: Bool[Tensor, "#batch #heads #queries #keys"] | None = None,
    scale: float | None = None,
    form: str = "explicit",
) -> Float[Tensor, "batch heads queries width"]:
    """y_i = Σ_j p_ij c_ij v_j,  p = softmax_j(s q_i·k_j + b_ij)  (arXiv:2205.13401, section 4).

    Args:
        q, k, v: queries, keys and values of each head.
        bias: b, on the scores; None is 0.
        factors: c, of any sign, on what the softmax gives; None is 1.
        visible: True where a query may attend to a key; a query that may attend to none gets 0.
        scale: s; by default 1/√head_dim.
        form: "explicit" forms the weights of all pairs; "fused" leaves them to PyTorch's fused attention, over keys
            that stand three times. On a CPU it is the slower of the two, and gives biases their gradient by forming the
            weights after all.

    >>> import torch
    >>> v = torch.tensor([[[[1.0], [3.0]]]])
    >>> rescaled_attention(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2), v, factors=torch.tensor([[[[2.0, 0.0]]]]))
    tensor([[[[1.]]]])
    """
    if form not in FORMS:
        raise ValueError(f"form must be {' or '.join(FORMS)}, got {form!r}")
    return FORMS[form](q, k, v, bias=bias, factors=factors, visible=visible, scale=scale)

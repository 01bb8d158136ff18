"""PyTorch's fused attention, with the derivatives that its CPU kernel lacks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import is_transformed, plain_gradients
from provenn.ops.softmax_attention.reference import explicit

CPU_KERNEL = "ScaledDotProductFlashAttentionForCpuBackward0"


def softmax_attention(
    q: Float[Tensor, "*batch queries head_dim"],
    k: Float[Tensor, "*batch keys head_dim"],
    v: Float[Tensor, "*batch keys width"],
    *,
    mask: Bool[Tensor, "*#batch #queries #keys"] | Float[Tensor, "*#batch #queries #keys"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "*batch queries width"]:
    """`explicit` by PyTorch's fused attention, with every derivative on a CPU.

    The CPU's kernel has neither second derivatives nor a forward mode. Under a transform the definition runs
    instead. A backward pass that is itself recorded is that of the definition.

    Args:
        q, k, v, mask, scale: as in `explicit`.
        causal: likewise; without a mask only, since the kernel takes one of the two.

    Raises:
        ValueError: both a mask and `causal`.

    >>> v = torch.tensor([[[1.0], [3.0]]])
    >>> softmax_attention(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), v, causal=True)
    tensor([[[1.],
             [2.]]])
    """
    if causal and mask is not None:
        raise ValueError("got a mask and causal=True: put what causality hides into the mask")
    if is_transformed():
        return explicit(q, k, v, mask=mask, causal=causal, scale=scale)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    if torch.compiler.is_compiling():
        return y
    node = y.grad_fn
    # Other kernels are left as they are: they differentiate themselves, or refuse in PyTorch's words.
    if node is not None and node.name() == CPU_KERNEL:
        node.register_hook(_recorded_gradients)
    return y


def _recorded_gradients(
    computed: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...] | None:
    """After the kernel's backward pass: what it computed, once more, as operations that autograd records.

    The kernel's own node holds all that this needs. A hook that held it as well would undo activation checkpoints,
    inside which PyTorch refuses second derivatives of attention.
    """
    if not torch.is_grad_enabled() or grads[0] is None:
        return None
    node: Any = torch._C._current_autograd_node()  # without a public name, as its saved tensors are
    mask, causal, scale = node._saved_attn_mask, node._saved_is_causal, node._saved_scale

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return explicit(q, k, v, mask=mask, causal=causal, scale=scale)

    recorded = plain_gradients(plain, (node._saved_query, node._saved_key, node._saved_value), grads[0])
    return tuple(None if old is None else new for old, new in zip(computed, recorded))

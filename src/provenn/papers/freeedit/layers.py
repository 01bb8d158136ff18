"""Decoupled residual refer-attention, DRRA (FreeEdit, He et al., 2024, arXiv:2409.18071), and what it is compared with.

All take queries, keys and values of one self-attention layer with its heads split. K_R and V_R are keys and values of
the same layer of the detail extractor, which has seen the reference. No code was released: the formula is the paper's,
its merged form is ours.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.ops.autograd import is_transformed
from provenn.ops.softmax_attention import softmax_attention
from provenn.ops.softmax_merge import Partial, softmax_merge

Queries = Float[Tensor, "batch heads tokens head_dim"]
References = Float[Tensor, "batch heads references head_dim"]
Scale = float | int | Float[Tensor, "batch 1 1 1"]


def rasa(q: Queries, k: Queries, v: Queries, k_r: References, v_r: References) -> Queries:
    """softmax(Q [K_D, K_R]ᵀ/√d) [V_D, V_R], joined along tokens: refer-attention that replaces self-attention.

    The paper's ablation (RASA). Its result can not be told apart into the layer's own part and the reference's.

    Args:
        q, k, v: of the denoiser's layer.
        k_r, v_r: of the extractor's layer; the number of their tokens may differ.
    """
    return softmax_attention(q, torch.cat([k, k_r], dim=2), torch.cat([v, v_r], dim=2))


def drra(q: Queries, k: Queries, v: Queries, k_r: References, v_r: References, scale: Scale = 1.0) -> Queries:
    """softmax(Q K_Dᵀ/√d) V_D + λ · softmax(Q [K_D, K_R]ᵀ/√d) [V_D, V_R], as the formula stands: the definition.

    Args:
        q, k, v, k_r, v_r: as of `rasa`.
        scale: λ; of each example, where it is a tensor. 0 leaves plain self-attention.

    >>> one = torch.ones(1, 1, 2, 4)
    >>> drra(one, one, one, 3 * one, 3 * one, scale=0).equal(one)
    True
    """
    return softmax_attention(q, k, v) + scale * rasa(q, k, v, k_r, v_r)


def merged_drra(q: Queries, k: Queries, v: Queries, k_r: References, v_r: References, scale: Scale = 1.0) -> Queries:
    """`drra` by two attentions in place of three: N·N and N·N_R scores, and none of them twice (ours).

    With o₁, ℓ₁ of softmax attention over K_D and its log-sum-exp, and o₂, ℓ₂ of that over K_R, the refer branch is
    (e^ℓ₁ o₁ + e^ℓ₂ o₂) / (e^ℓ₁ + e^ℓ₂). That holds where both branches have the same queries, keys and values, which is
    what sharing their projections means.

    Args:
        q, k, v, k_r, v_r, scale: as of `drra`.
    """
    own, reference = partial_attention(q, k, v), partial_attention(q, k_r, v_r)
    return own.output + scale * softmax_merge(own, reference).output


def reference_only(q: Queries, k_r: References, v_r: References) -> Queries:
    """softmax(Q K_Rᵀ/√d) V_R: a branch without the denoiser's own keys, another method than the paper's (to compare).

    Args:
        q, k_r, v_r: as of `rasa`.
    """
    return softmax_attention(q, k_r, v_r)


def partial_attention(q: Queries, k: References, v: References) -> Partial:
    """softmax(Q Kᵀ/√d) V with the log-sum-exp of each query's scores.

    Without gradients by the CPU's fused kernel, which gives both and holds no scores. Else by explicit scores, whose
    log-sum-exp has a gradient.

    Args:
        q, k, v: queries, and any number of keys and values.
    """
    fused = q.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()
    if fused and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return Partial(*torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return Partial((scores - lse[..., None]).exp() @ v, lse)

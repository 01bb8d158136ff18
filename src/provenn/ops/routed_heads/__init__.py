"""Attention that computes only the chosen (token, head) pairs."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .fast import gathered_attention, gathered_decode
from .reference import causal_mask, dense_masked_attention

__all__ = [
    "causal_mask",
    "dense_masked_attention",
    "routed_attention",
    "routed_decode",
]


def _check(q: Tensor, k: Tensor, v: Tensor, active: Tensor, always: int, mask: Tensor | None = None) -> None:
    heads = q.shape[1]
    if k.shape[1] < 1 or heads % k.shape[1] or k.shape[:3] != v.shape[:3] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            "keys and values must have the queries' width and a number of heads that divides theirs, got queries "
            f"{tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}"
        )
    if active.shape != q.shape[:-1]:
        raise ValueError(f"active must be {tuple(q.shape[:-1])}, one for each query, got {tuple(active.shape)}")
    if mask is not None and mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"mask must be {(k.shape[0], k.shape[2])}, one for each key, got {tuple(mask.shape)}")
    if not 0 <= always <= heads:
        raise ValueError(f"always must lie between 0 and the {heads} heads, got {always}")


def routed_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch groups keys dim"],
    v: Float[Tensor, "batch groups keys width"],
    active: Bool[Tensor, "batch heads queries"],
    *,
    always: int = 0,
    causal: bool = False,
    mask: Bool[Tensor, "batch keys"] | None = None,
) -> Float[Tensor, "batch heads queries width"]:
    """H_i of every token that uses head i, and 0 for the others (arXiv:2410.11842, section 3.2).

    The products QKᵀ and AV are formed for active pairs alone: the work is the share of active pairs times that of
    multi-head attention. How many are active is read off the data, which cannot be traced: a compiler or an export gets
    `dense_masked_attention`, the same function.

    Args:
        q: queries, not yet scaled.
        k, v: keys and values of all tokens; with fewer heads than `q`, each serves so many neighbouring query heads.
        active: True where a token uses a head.
        always: how many of the first heads every token uses, which spares their sorting.
        causal: whether a query sees the keys up to its own token alone; the last query stands at the last key.
        mask: True where a key may be attended. A query that may attend to nothing gives 0.

    >>> q = k = v = torch.ones(1, 2, 3, 4)
    >>> active = torch.tensor([[[True, True, True], [False, True, False]]])
    >>> routed_attention(q, k, v, active, causal=True)[..., 0].tolist()
    [[[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]]
    """
    _check(q, k, v, active, always, mask)
    if torch.compiler.is_compiling() or q.is_meta:
        return dense_masked_attention(q, k, v, active, causal=causal, mask=mask)
    return gathered_attention(q, k, v, active, always, causal, mask)


def routed_decode(
    q: Float[Tensor, "batch heads dim"],
    k: Float[Tensor, "batch groups keys dim"],
    v: Float[Tensor, "batch groups keys width"],
    active: Bool[Tensor, "batch heads"],
    *,
    always: int = 0,
) -> Float[Tensor, "batch heads width"]:
    """The same for one token more of each stream: reads keys and values of the heads that it uses, and no others.

    Args:
        q: the query of the token that comes now.
        k, v: the cache, this token's own key and value at its end.
        active, always: as in `routed_attention`.
    """
    _check(q, k, v, active, always)
    return gathered_decode(q, k, v, active, always)

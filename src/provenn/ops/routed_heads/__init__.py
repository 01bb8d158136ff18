"""Attention that computes only the chosen (token, head) pairs."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import is_transformed

from .fast import active_rows, gathered_attention, gathered_decode, gathering_pays, put_back, take_rows
from .reference import causal_mask, dense_masked_attention

__all__ = [
    "active_rows",
    "cannot_count",
    "causal_mask",
    "dense_masked_attention",
    "gathering_pays",
    "put_back",
    "routed_attention",
    "routed_decode",
    "take_rows",
    "worth_gathering",
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
    bias: Float[Tensor, "heads queries keys"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries width"]:
    """H_i of every token that uses head i, and 0 for the others (arXiv:2410.11842, section 3.2).

    The products QKᵀ and AV are formed for active pairs alone: the work is the share of active pairs times that of
    multi-head attention. How many are active is read off the data, which cannot be traced: a compiler, an export or a
    transform of `torch.func` gets `dense_masked_attention`, the same function.

    Args:
        q: queries, not yet scaled.
        k, v: keys and values of all tokens; with fewer heads than `q`, each serves so many neighbouring query heads.
        active: True where a token uses a head.
        always: how many of the first heads every token uses, which spares their sorting.
        causal: whether a query sees the keys up to its own token alone; the last query stands at the last key.
        mask: True where a key may be attended. A query that may attend to nothing gives 0.
        bias: added to the scores; not with `causal`.
        scale: of the products of queries and keys; by default 1/√dim.

    >>> q = k = v = torch.ones(1, 2, 3, 4)
    >>> active = torch.tensor([[[True, True, True], [False, True, False]]])
    >>> routed_attention(q, k, v, active, causal=True)[..., 0].tolist()
    [[[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]]
    """
    _check(q, k, v, active, always, mask)
    if bias is not None and (causal or bias.shape != (q.shape[1], q.shape[2], k.shape[2])):
        expected = (q.shape[1], q.shape[2], k.shape[2])
        raise ValueError(f"bias must be {expected}, without causal, got {tuple(bias.shape)} and causal={causal}")
    if cannot_count(q):
        return dense_masked_attention(q, k, v, active, causal=causal, mask=mask, bias=bias, scale=scale)
    return gathered_attention(q, k, v, active, always, causal, mask, bias, scale)


def cannot_count(q: Tensor) -> bool:
    """Whether how many pairs are active cannot be read off the data: traced, on the meta device, or transformed."""
    return torch.compiler.is_compiling() or q.is_meta or is_transformed()


def worth_gathering(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch groups keys dim"],
    active: Bool[Tensor, "batch heads queries"],
    *,
    always: int = 0,
    causal: bool = False,
) -> bool:
    """Whether `routed_attention` is no slower than attention of all heads, by sizes alone: see `gathering_pays`.

    Only a processor was measured; on other devices, and where nothing can be counted, the answer is no.

    Args:
        q, k, active, always, causal: as in `routed_attention`.
    """
    sizes = q.shape[1], always, q.shape[2], k.shape[2]
    if q.device.type != "cpu" or cannot_count(q) or not gathering_pays(*sizes, longest=0, causal=causal):
        return False  # which would hold for the shortest rows there can be
    rest = active[:, always:]
    longest = int(rest.sum(dim=-1).max()) if rest.numel() else 0
    return gathering_pays(*sizes, longest, causal=causal)


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

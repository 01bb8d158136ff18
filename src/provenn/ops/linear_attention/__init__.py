"""Linear attention: a product of features instead of exp(q·k), in linear time, with a state of constant size."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import is_transformed

from . import triton
from .fast import CHUNK, bidirectional_attention, causal_attention, chunked_product, pooled_attention, short_attention
from .reference import LinearState, linear_attention_weights, quadratic_attention, recurrent_attention

__all__ = [
    "FORMS",
    "LinearState",
    "attention_outputs",
    "bidirectional_attention",
    "causal_attention",
    "chunked_product",
    "linear_attention",
    "linear_attention_weights",
    "pooled_attention",
    "quadratic_attention",
    "recurrent_attention",
    "resolved",
    "short_attention",
]

FORMS = ("auto", "linear", "quadratic")


def linear_attention(
    queries: Float[Tensor, "*batch queries features"],
    keys: Float[Tensor, "*batch tokens features"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    causal: bool = True,
    mask: Bool[Tensor, "..."] | None = None,
    state: LinearState | None = None,
) -> tuple[Float[Tensor, "*batch queries dim"], LinearState]:
    """y_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j), over j ≤ i where causal, in linear time (arXiv:2006.16236).

    Takes the fastest form there is for the device: a Triton kernel on CUDA, else chunks.

    Args:
        queries, keys: φ(q) and φ(k), features already mapped, so that no φ(q)·φ(k) is negative.
        values: v.
        causal: token i attends to the state and to tokens 1..i; else to the state and all tokens.
        mask: True where a token may be attended; broadcasts to (*batch, tokens). Nothing to attend gives 0.
        state: what came before, as returned by an earlier call; by default nothing.

    Returns the output of every query and the state after the last token, from which another call goes on.

    >>> ones = torch.ones(1, 3, 2)
    >>> outputs, state = linear_attention(ones, ones, torch.tensor([[[1.0], [2.0], [6.0]]]))
    >>> outputs.flatten().tolist(), state.z.tolist()
    ([1.0, 1.5, 3.0], [[3.0, 3.0]])
    """
    _check(queries, keys, values, causal)
    if not causal:
        return bidirectional_attention(queries, keys, values, mask=mask, state=state)
    fits = torch.float64 not in (queries.dtype, keys.dtype, values.dtype)
    fits &= max(keys.shape[-1], values.shape[-1] + 1) <= triton.LARGEST
    # A compiler or an export traces the PyTorch form, which it can fuse and carry elsewhere.
    traced = torch.compiler.is_compiling() or is_transformed()
    # Sizes are asked of a GPU's tensors alone: of an export's open ones, a question would be a rule.
    kernel = values.is_cuda and fits and not traced
    kernel = kernel and triton.is_quicker(keys[..., 0].numel(), keys.shape[-1], values.shape[-1])
    if kernel and triton.available(values.device):
        return causal_attention(queries, keys, values, mask=mask, state=state, product=triton.kernel_product)
    return causal_attention(queries, keys, values, mask=mask, state=state)


def attention_outputs(
    queries: Float[Tensor, "*batch queries features"],
    keys: Float[Tensor, "*batch tokens features"],
    values: Float[Tensor, "*batch tokens dim"],
    *,
    causal: bool = True,
    mask: Bool[Tensor, "..."] | None = None,
    form: str = "auto",
) -> Float[Tensor, "*batch queries dim"]:
    """The outputs of `linear_attention` from no state, where nothing goes on from the state after the last token.

    Args:
        queries, keys, values, causal, mask: as in `linear_attention`.
        form: "linear"; "quadratic", through tokens × tokens weights; "auto" is the faster of them (see `resolved`).

    >>> ones = torch.ones(1, 3, 2)
    >>> attention_outputs(ones, ones, torch.tensor([[[1.0], [2.0], [6.0]]])).flatten().tolist()
    [1.0, 1.5, 3.0]
    """
    _check(queries, keys, values, causal)
    tokens, features = keys.shape[-2:]
    if form == "auto" and (isinstance(tokens, torch.SymInt) or values.is_cuda):  # of an open length, and not timed
        form = "linear"
    sizes = {"features": features, "dim": values.shape[-1], "queries": queries.shape[-2]}
    if resolved(form, tokens, causal=causal, rows=math.prod(keys.shape[:-2]), **sizes) == "quadratic":
        return short_attention(queries, keys, values, causal=causal, mask=mask)
    if not causal:
        return pooled_attention(queries, keys, values, mask=mask)
    return linear_attention(queries, keys, values, causal=causal, mask=mask)[0]


class Cost(NamedTuple):
    """What the linear form's multiplications weigh beside the quadratic form's; fitted to what was timed.

    A factor for all of them, within how many tokens weights are formed besides, and multiplications that would take as
    long as the calls that only the linear form makes. Heads of 16, 24 and 64, twice as many features, 1 to 64 rows and
    16 to 512 tokens were timed on one thread of an Intel Xeon, forward and in training. They cross where this says to
    within a tenth of either's time.
    """

    factor: float
    within: int
    calls: float


CAUSAL, BIDIRECTIONAL = Cost(2.4, CHUNK, 9e5), Cost(1.06, 13, 9e5)


def resolved(
    form: str, tokens: int, *, features: int, dim: int, causal: bool, rows: int, queries: int | None = None
) -> str:
    """What "auto" stands for: the form whose multiplications, counted and weighed, take less time.

    The weights of a query and what is made of them take `tokens` · (features + dim) of them. In linear time it is as if
    there were `within` tokens, and each token and each query takes features · dim with the state (see `Cost`).

    Args:
        form: "auto", or the form itself.
        tokens: how many keys there are.
        features, dim, causal: of the attention.
        rows: batch times heads.
        queries: as many as tokens by default.

    >>> [resolved("auto", n, features=128, dim=64, causal=True, rows=8) for n in (128, 1024)]
    ['quadratic', 'linear']
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if form != "auto":
        return form
    queries = tokens if queries is None else queries
    cost = CAUSAL if causal else BIDIRECTIONAL
    quadratic = rows * queries * tokens * (features + dim)
    linear = rows * (queries * cost.within * (features + dim) + (queries + tokens) * features * dim)
    return "linear" if cost.factor * linear + cost.calls < quadratic else "quadratic"


def _check(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> None:
    if keys.shape[:-1] != values.shape[:-1] or queries.shape[-1] != keys.shape[-1] or keys.shape[-2] < 1:
        raise ValueError(
            "expected queries (..., queries, features), keys (..., tokens, features) and values (..., tokens, dim) "
            f"with at least one token, got {tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if causal and queries.shape != keys.shape:
        raise ValueError(
            f"causal attention needs a query a token, got {queries.shape[-2]} queries and {keys.shape[-2]} tokens"
        )

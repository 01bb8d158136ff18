"""A memory whose weights are trained, by the sequence that it reads, while it is read."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import check_fixed_length, without_autocast

from .fast import chunked_memory
from .reference import MemoryState, Surprise, read_memory, recurrent_memory

__all__ = [
    "MemoryState",
    "Surprise",
    "chunked_memory",
    "memory_update",
    "read_memory",
    "recurrent_memory",
]


def memory_update(
    queries: Float[Tensor, "batch heads tokens dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    values: Float[Tensor, "batch heads tokens width"],
    *,
    step: Float[Tensor, "gates batch heads tokens"],
    forget: Sequence[Float[Tensor, "batch heads tokens _"]],
    momentum: Float[Tensor, "gates batch heads tokens"] | None = None,
    state: MemoryState | Sequence[Float[Tensor, "heads _ _"]],
    chunk: int = 16,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    read: str = "post",
    residual: bool = True,
    limit: float | int | None = None,
    surprised: bool = False,
) -> tuple[Float[Tensor, "batch heads tokens width"], MemoryState, Surprise | None]:
    """y_t = M_t(q_t) with M_t = (1 − α_t) M_{t−1} + S_t and S_t = η_t S_{t−1} − θ_t ∇‖M(k_t) − v_t‖².

    The neural long-term memory of section 3.1 of arXiv:2501.00663, in the chunked dual form of `fast.py`: linear in the
    tokens, and differentiable in everything, through the inner gradients too. It runs in the state's precision, under
    autocast as well.

    Args:
        queries, keys, values: q_t, k_t, v_t.
        step: θ_t ≥ 0, the rate of the inner gradient: for each layer of the memory, or one that all of them share.
        forget: α_t in [0, 1], the share of the weights that is forgotten, as many as `step` has. One for all channels,
            or one for each: of the input of the first layer, of the output of the others.
        momentum: η_t in [0, 1], likewise; None for a memory without momentum, which is η = 0 at half the state.
        state: what came before; or the matrices of M_0, a (heads, rows, columns) for each layer, to start from.
        chunk: b; gradients are taken at the weights of the chunk's start, and 1 is the sequential rule.
        mask: True where a token may be remembered; others change nothing, and count as positions of their chunk.
        read: "post" reads after the token is written, "pre" before: y_t = M_{t−1}(q_t).
        residual: whether the memory is x + LN(MLP(x)) or MLP(x); as wide as the keys, if so.
        limit: a gradient of norm n, over all layers of a head, is brought to limit · tanh(n / limit); None leaves it.
        surprised: whether to return the inner loss and the gradient's norm (before the limit) at every token.

    Returns the outputs, the state after the last token, and the surprise of each token where asked for.

    >>> k = torch.eye(2).view(1, 1, 2, 2)
    >>> v = torch.tensor([[[[3.0], [5.0]]]])
    >>> half, none = torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, 1, 2, 1)
    >>> y, state, _ = memory_update(k, k, v, step=half, forget=[none], state=[torch.zeros(1, 2, 1)], residual=False)
    >>> y.flatten().tolist(), state.weights[0].flatten().tolist()
    ([3.0, 5.0], [3.0, 5.0])
    """
    if keys.shape != queries.shape or values.shape[:3] != keys.shape[:3] or keys.shape[2] < 1:
        raise ValueError(
            "queries and keys must be (batch, heads, tokens, dim) and values (batch, heads, tokens, width) with at "
            f"least one token, got {tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    check_fixed_length(keys.shape[2], "the memory's loop over chunks")
    if mask is not None and mask.shape != (keys.shape[0], keys.shape[2]):
        raise ValueError(f"mask must be (batch, tokens) = {(keys.shape[0], keys.shape[2])}, got {tuple(mask.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if read not in ("post", "pre"):
        raise ValueError(f"read must be post or pre, got {read!r}")
    if limit is not None and limit <= 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    if not isinstance(state, MemoryState):
        dtype = torch.promote_types(values.dtype, torch.float32)
        state = MemoryState.start([w.to(dtype) for w in state], keys.shape[0], momentum=momentum is not None)
    if bool(state.momentum) != (momentum is not None):
        given = "a" if state.momentum else "no"
        raise ValueError(f"the state has {given} momentum, and the tokens bring the opposite")
    if state.position >= chunk:
        raise ValueError(f"the state is at token {state.position} of its chunk, which has {chunk} tokens")
    first, last = state.weights[0], state.weights[-1]
    if (first.shape[2], last.shape[3]) != (keys.shape[3], values.shape[3]) or first.shape[:2] != keys.shape[:2]:
        raise ValueError(
            f"the memory maps {first.shape[2]} to {last.shape[3]} features for (batch, heads) = "
            f"{tuple(first.shape[:2])}, got keys {tuple(keys.shape)} and values {tuple(values.shape)}"
        )
    if residual and keys.shape[3] != values.shape[3]:
        raise ValueError(f"x + LN(MLP(x)) keeps the width, got keys of {keys.shape[3]} and values of {values.shape[3]}")
    _check_gates(keys, state.weights, step, forget, momentum)
    with without_autocast(values):
        return chunked_memory(
            queries, keys, values, step=step, forget=forget, momentum=momentum, state=state, chunk=chunk, mask=mask,
            read=read, residual=residual, limit=limit, surprised=surprised,
        )  # fmt: skip


def _check_gates(
    keys: Tensor, weights: Sequence[Tensor], step: Tensor, forget: Sequence[Tensor], momentum: Tensor | None
) -> None:
    tokens, depth = tuple(keys.shape[:3]), len(weights)
    for name, gate in (("step", step), ("momentum", momentum)):
        if gate is not None and (gate.shape[1:] != tokens or gate.shape[0] not in (1, depth)):
            raise ValueError(
                f"{name} must be (gates, batch, heads, tokens) = (1 or {depth}, {', '.join(map(str, tokens))}), "
                f"got {tuple(gate.shape)}"
            )
    if len(forget) != len(step) or (momentum is not None and len(momentum) != len(step)):
        raise ValueError(
            f"step, forget and momentum must be as many, got {len(step)} of step and {len(forget)} of forget"
        )
    for i, gate in enumerate(forget):
        channels = weights[i].shape[3 if i else 2]
        shared = len(forget) == 1 < depth
        if gate.shape[:3] != tokens or gate.shape[3:] not in ((1,), (1 if shared else channels,)):
            raise ValueError(
                f"forget must be (batch, heads, tokens, channels) = {(*tokens, 1)}"
                f"{'' if shared else f' or {(*tokens, channels)}'} for layer {i}, got {tuple(gate.shape)}"
            )

"""A memory whose weights are trained, by the sequence that it reads, while it is read."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.ops.autograd import without_autocast

from .fast import chunked_memory
from .reference import ACTIVATIONS, MemoryState, Surprise, current_weights, read_memory, recurrent_memory

__all__ = [
    "ACTIVATIONS",
    "MemoryState",
    "Surprise",
    "chunked_memory",
    "current_weights",
    "memory_update",
    "read_memory",
    "recurrent_memory",
]


def memory_update(
    queries: Float[Tensor, "batch heads tokens dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    values: Float[Tensor, "batch heads tokens width"],
    *,
    step: Float[Tensor, "batch heads tokens"],
    forget: Float[Tensor, "batch heads tokens"],
    momentum: Float[Tensor, "batch heads tokens"] | None = None,
    state: MemoryState | Sequence[Float[Tensor, "heads _ _"]],
    chunk: int = 16,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    read: str = "post",
    activation: str = "silu",
    limit: float | int | None = None,
    surprised: bool = False,
) -> tuple[Float[Tensor, "batch heads tokens width"], MemoryState, Surprise | None]:
    """y_t = M_t(q_t) with M_t = (1 − α_t) M_{t−1} + S_t and S_t = η_t S_{t−1} − θ_t ∇‖M(k_t) − v_t‖².

    The neural long-term memory of section 3.1 of arXiv:2501.00663, in the chunked dual form of `fast.py`: linear in the
    tokens, and differentiable in everything, through the inner gradients too.

    Args:
        queries, keys, values: q_t, k_t, v_t.
        step: θ_t ≥ 0, the rate of the inner gradient.
        forget: α_t in [0, 1], the share of the weights that is forgotten.
        momentum: η_t in [0, 1]; None for a memory without momentum, which is η = 0 at half the state.
        state: what came before; or the matrices of M_0, a (heads, rows, columns) for each layer, to start from.
        chunk: b; gradients are taken at the weights of the chunk's start, and 1 is the sequential rule.
        mask: True where a token may be remembered; others change nothing, and count as positions of their chunk.
        read: "post" reads after the token is written, "pre" before: y_t = M_{t−1}(q_t).
        activation: φ between the memory's layers, "silu" or "gelu".
        limit: a gradient of norm n, over all layers of a head, is brought to limit · tanh(n / limit); None leaves it.
        surprised: whether to return the inner loss and the gradient's norm (before the limit) at every token.

    Returns the outputs, the state after the last token, and the surprise of each token where asked for.

    >>> k = torch.eye(2).view(1, 1, 2, 2)
    >>> v = torch.tensor([[[[3.0], [5.0]]]])
    >>> half, none = torch.full((1, 1, 2), 0.5), torch.zeros(1, 1, 2)
    >>> y, state, _ = memory_update(k, k, v, step=half, forget=none, state=[torch.zeros(1, 2, 1)])
    >>> y.flatten().tolist(), state.weights[0].flatten().tolist()
    ([3.0, 5.0], [3.0, 5.0])
    """
    if keys.shape != queries.shape or values.shape[:3] != keys.shape[:3] or keys.shape[2] < 1:
        raise ValueError(
            "queries and keys must be (batch, heads, tokens, dim) and values (batch, heads, tokens, width) with at "
            f"least one token, got {tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    for name, gate in (("step", step), ("forget", forget), ("momentum", momentum)):
        if gate is not None and gate.shape != keys.shape[:3]:
            raise ValueError(
                f"{name} must be (batch, heads, tokens) = {tuple(keys.shape[:3])}, got {tuple(gate.shape)}"
            )
    if mask is not None and mask.shape != (keys.shape[0], keys.shape[2]):
        raise ValueError(f"mask must be (batch, tokens) = {(keys.shape[0], keys.shape[2])}, got {tuple(mask.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if read not in ("post", "pre"):
        raise ValueError(f"read must be post or pre, got {read!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if limit is not None and limit <= 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    if not isinstance(state, MemoryState):
        dtype = torch.promote_types(values.dtype, torch.float32)
        state = MemoryState.start([w.to(dtype) for w in state], len(keys), momentum=momentum is not None)
    moves = state.layers[0].shape[2] == 2
    if moves != (momentum is not None):
        raise ValueError(f"the state has {'a' if moves else 'no'} momentum, and the tokens bring the opposite")
    if state.position >= chunk:
        raise ValueError(f"the state is at token {state.position} of its chunk, which is no place in one of {chunk}")
    rows, columns = state.layers[0].shape[3], state.layers[-1].shape[4]
    if (rows, columns) != (keys.shape[3], values.shape[3]) or state.layers[0].shape[:2] != keys.shape[:2]:
        raise ValueError(
            f"the memory maps {rows} to {columns} features for (batch, heads) = {tuple(state.layers[0].shape[:2])}, "
            f"got keys {tuple(keys.shape)} and values {tuple(values.shape)}"
        )
    with without_autocast(values):
        return chunked_memory(
            queries, keys, values, step=step, forget=forget, momentum=momentum, state=state, chunk=chunk, mask=mask,
            read=read, activation=activation, limit=limit, surprised=surprised,
        )  # fmt: skip

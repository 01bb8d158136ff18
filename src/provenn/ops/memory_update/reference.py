"""A memory that learns while it is read, token by token: the definition (Behrouz et al., 2024, arXiv:2501.00663, 3.1).

The memory is an MLP M without biases whose weights are a state. A token brings a key k, a value v, a query q and three
gates; the gradient of the associative loss is its surprise, which passes through a momentum S into the weights:

    u_t = ∇_M ‖M(k_t) − v_t‖²,   S_t = η_t S_{t−1} − θ_t u_t,   M_t = (1 − α_t) M_{t−1} + S_t,   y_t = M_t(q_t)

(equations 8 to 15). In chunks of b tokens the gradient is taken at the weights of the chunk's start, as in training in
parallel (section 3.2); b = 1 is the rule itself.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


class MemoryState(NamedTuple):
    """A memory between two tokens; its size does not depend on how many were read.

    `layers` stacks a layer's weights and, where there is momentum, its momentum; `anchor` is the weights at the start
    of the chunk, at which gradients are taken, and `position` how many tokens of the chunk were read.
    """

    layers: tuple[Float[Tensor, "batch heads kinds _ _"], ...]
    anchor: tuple[Float[Tensor, "batch heads _ _"], ...]
    position: int = 0

    @classmethod
    def start(
        cls, weights: Sequence[Float[Tensor, "heads _ _"]], batch: int, *, momentum: bool = True
    ) -> "MemoryState":
        """M_0 for every sequence of a batch, with no momentum yet."""
        anchor = tuple(weight.expand(batch, *weight.shape) for weight in weights)
        layers = tuple(torch.stack([w, torch.zeros_like(w)] if momentum else [w], dim=2) for w in anchor)
        return cls(layers, anchor)

    @property
    def weights(self) -> tuple[Float[Tensor, "batch heads _ _"], ...]:
        """M_t, a matrix for each layer of the memory."""
        return current_weights(self)

    @property
    def momentum(self) -> tuple[Float[Tensor, "batch heads _ _"], ...]:
        """S_t, likewise; empty where there is no momentum."""
        return tuple(layer[:, :, 1] for layer in self.layers if layer.shape[2] == 2)


def current_weights(state: MemoryState) -> tuple[Float[Tensor, "batch heads _ _"], ...]:
    """M_t of a state; a function, since compilers do not trace properties of tuples."""
    return tuple(layer[:, :, 0] for layer in state.layers)


class Surprise(NamedTuple):
    """What the tokens were to the memory, at the weights where their gradients were taken."""

    loss: Float[Tensor, "batch heads tokens"]
    norm: Float[Tensor, "batch heads tokens"]


def read_memory(
    queries: Float[Tensor, "*batch tokens dim"],
    weights: Sequence[Float[Tensor, "*batch _ _"]],
    *,
    activation: str = "silu",
) -> Float[Tensor, "*batch tokens width"]:
    """y = M(q) without writing: x W_1, then φ(·) W_ℓ for every further layer."""
    y = queries @ weights[0]
    for weight in weights[1:]:
        y = ACTIVATIONS[activation](y) @ weight
    return y


def clamped(square: Float[Tensor, "*batch"], limit: float | int) -> Float[Tensor, "*batch"]:
    """limit · tanh(n / limit) / n, which brings a gradient of norm n softly under `limit`, from n²."""
    # Clamped before the root, whose slope at 0 is infinite.
    ratio = (square / limit**2).clamp_min(torch.finfo(square.dtype).eps).sqrt()
    return ratio.tanh() / ratio


def recurrent_memory(
    queries: Float[Tensor, "batch heads tokens dim"],
    keys: Float[Tensor, "batch heads tokens dim"],
    values: Float[Tensor, "batch heads tokens width"],
    *,
    step: Float[Tensor, "batch heads tokens"],
    forget: Float[Tensor, "batch heads tokens"],
    momentum: Float[Tensor, "batch heads tokens"] | None = None,
    state: MemoryState,
    chunk: int = 1,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    read: str = "post",
    activation: str = "silu",
    limit: float | int | None = None,
) -> tuple[Float[Tensor, "batch heads tokens width"], MemoryState, Surprise]:
    """The definition: a loop over tokens that asks autograd for each gradient.

    Arguments and results are those of `memory_update`.
    """
    dtype, differentiable = state.layers[0].dtype, torch.is_grad_enabled()
    weights, moving, anchor, position = state.weights, state.momentum, state.anchor, state.position
    outputs, losses, norms = [], [], []
    for t in range(keys.shape[2]):
        if position % chunk == 0:
            anchor, position = weights, 0
        position += 1
        q, k, v = (x[:, :, t : t + 1].to(dtype) for x in (queries, keys, values))
        θ, α = (x[:, :, t, None, None].to(dtype) for x in (step, forget))
        before = weights
        with torch.enable_grad():
            held = [a if a.requires_grad else a.detach().requires_grad_() for a in anchor]
            loss = (read_memory(k, held, activation=activation) - v).square().sum(dim=(2, 3))
            # Each sequence and head has weights of its own, so the gradient of the sum holds the gradient of each.
            gradients = torch.autograd.grad(loss.sum(), held, create_graph=differentiable)
        square = torch.stack([u.square().sum(dim=(2, 3)) for u in gradients]).sum(dim=0)
        if limit is not None:
            gradients = tuple(u * clamped(square, limit)[..., None, None] for u in gradients)
        if momentum is None:
            update = [-θ * u for u in gradients]
        else:
            η = momentum[:, :, t, None, None].to(dtype)
            update = [η * s - θ * u for s, u in zip(moving, gradients)]
        after = [(1 - α) * w + s for w, s in zip(weights, update)]
        if mask is not None:
            seen = mask[:, t, None, None, None]
            after = [torch.where(seen, new, old) for new, old in zip(after, weights)]
            update = [torch.where(seen, new, old) for new, old in zip(update, moving)] if moving else update
        weights = tuple(after)
        moving = tuple(update) if moving else ()
        outputs.append(read_memory(q, weights if read == "post" else before, activation=activation))
        losses.append(loss.detach())
        norms.append(square.detach().sqrt())
    if position == chunk:
        anchor, position = weights, 0
    layers = tuple(torch.stack(pair, dim=2) for pair in (zip(weights, moving) if moving else zip(weights)))
    y = torch.cat(outputs, dim=2).to(values.dtype)
    return y, MemoryState(layers, anchor, position), Surprise(torch.stack(losses, 2), torch.stack(norms, 2))

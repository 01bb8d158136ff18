"""A memory that learns while it is read, token by token: the definition (Behrouz et al., 2024, arXiv:2501.00663, 3.1).

The memory is an MLP M without biases whose weights are a state, M(x) = x + LN(GELU(… GELU(x W_1) …) W_L), or without
what is around the MLP. A token brings a key k, a value v, a query q and three gates; the gradient of the associative
loss is its surprise, which passes through a momentum S into the weights:

    u_t = ∇_M ‖M(k_t) − v_t‖²,   S_t = η_t S_{t−1} − θ_t u_t,   M_t = (1 − α_t) M_{t−1} + S_t,   y_t = M_t(q_t)

(equations 8 to 15 of the first version). Each layer of the memory may have gates of its own, and α may differ by
channel. In chunks of b tokens the gradient is taken at the weights of the chunk's start, as in training in parallel
(section 3.2); b = 1 is the rule itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

EPS = 1e-5  # of the layer norm


class MemoryState(NamedTuple):
    """A memory between two tokens; its size does not depend on how many were read.

    `weights` is M_t and `momentum` S_t, a matrix for each layer; without momentum it is an empty tuple. `anchor` is the
    weights at the start of the chunk, at which gradients are taken. `position` is how many tokens of the chunk were
    read.
    """

    weights: tuple[Float[Tensor, "batch heads _ _"], ...]
    momentum: tuple[Float[Tensor, "batch heads _ _"], ...]
    anchor: tuple[Float[Tensor, "batch heads _ _"], ...]
    position: int = 0

    @classmethod
    def start(
        cls, weights: Sequence[Float[Tensor, "heads _ _"]], batch: int, *, momentum: bool = True
    ) -> "MemoryState":
        """M_0 for every sequence of a batch, with no momentum yet."""
        first = tuple(weight.expand(batch, *weight.shape) for weight in weights)
        return cls(first, tuple(torch.zeros_like(weight) for weight in first) if momentum else (), first)


class Surprise(NamedTuple):
    """What the tokens were to the memory, at the weights where their gradients were taken."""

    loss: Float[Tensor, "batch heads tokens"]
    norm: Float[Tensor, "batch heads tokens"]


def read_memory(
    queries: Float[Tensor, "*batch tokens dim"],
    weights: Sequence[Float[Tensor, "*batch _ _"]],
    *,
    residual: bool = True,
) -> Float[Tensor, "*batch tokens width"]:
    """y = M(q) without writing: q W_1, then GELU(·) W_ℓ for every further layer; with `residual` q + LN(·)."""
    y = queries @ weights[0]
    for weight in weights[1:]:
        y = F.gelu(y) @ weight
    return queries + normed(y) if residual else y


def normed(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """LN without weights, written out: the third derivative of torch's own, which a hessian needs here, is wrong."""
    x = x - x.mean(dim=-1, keepdim=True)
    return x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()


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
    step: Float[Tensor, "gates batch heads tokens"],
    forget: Sequence[Float[Tensor, "batch heads tokens _"]],
    momentum: Float[Tensor, "gates batch heads tokens"] | None = None,
    state: MemoryState,
    chunk: int = 1,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    read: str = "post",
    residual: bool = True,
    limit: float | int | None = None,
) -> tuple[Float[Tensor, "batch heads tokens width"], MemoryState, Surprise]:
    """The definition: a loop over tokens that asks autograd for each gradient.

    Arguments and results are those of `memory_update`.
    """
    dtype, differentiable = state.weights[0].dtype, torch.is_grad_enabled()
    weights, moving, anchor, position = state
    depth = len(weights)
    outputs, losses, norms = [], [], []
    for t in range(keys.shape[2]):
        if position % chunk == 0:
            anchor, position = weights, 0
        position += 1
        q, k, v = (x[:, :, t : t + 1].to(dtype) for x in (queries, keys, values))
        θ = [x[..., t, None, None].to(dtype) for x in step]
        η = [] if momentum is None else [x[..., t, None, None].to(dtype) for x in momentum]
        α = [x[:, :, t].to(dtype) for x in forget]
        θ, η, α = ([*gate] * (depth if len(gate) == 1 else 1) for gate in (θ, η, α))
        # The first layer forgets by the channels of its input, the others by those of their output.
        left = [1 - gate.unsqueeze(-2 if i else -1) for i, gate in enumerate(α)]
        before = weights
        with torch.enable_grad():
            taken_at = [a if a.requires_grad else a.detach().requires_grad_() for a in anchor]
            loss = (read_memory(k, taken_at, residual=residual) - v).square().sum(dim=(2, 3))
            # Each sequence and head has weights of its own, so the gradient of the sum holds the gradient of each.
            gradients = torch.autograd.grad(loss.sum(), taken_at, create_graph=differentiable)
        square = torch.stack([u.square().sum(dim=(2, 3)) for u in gradients]).sum(dim=0)
        if limit is not None:
            gradients = tuple(u * clamped(square, limit)[..., None, None] for u in gradients)
        update = [-rate * u for rate, u in zip(θ, gradients)]
        if moving:
            update = [rate * s + u for rate, s, u in zip(η, moving, update)]
        after = [share * w + s for share, w, s in zip(left, weights, update)]
        if mask is not None:
            seen = mask[:, t, None, None, None]
            after = [torch.where(seen, new, old) for new, old in zip(after, weights)]
            update = [torch.where(seen, new, old) for new, old in zip(update, moving)]
        weights = tuple(after)
        moving = tuple(update) if momentum is not None else ()
        outputs.append(read_memory(q, weights if read == "post" else before, residual=residual))
        losses.append(loss.detach())
        norms.append(square.detach().sqrt())
    if position == chunk:
        anchor, position = weights, 0
    y = torch.cat(outputs, dim=2).to(values.dtype)
    surprise = Surprise(torch.stack(losses, 2), torch.stack(norms, 2))
    return y, MemoryState(weights, moving, anchor, position), surprise

"""Geometric complexity: the Dirichlet energy of a function over data (Dherin et al., 2022)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def geometric_complexity(f: Callable[[Tensor], Tensor], x: Float[Tensor, "batch ..."]) -> float:
    """GC = (1/|D|) Σ_x ‖∇_x f(x)‖_F², exactly, with one backward pass for each output.

    Args:
        f: maps a batch to one vector, or array, an example (logits or features), each from its own example alone.
        x: the examples D.
    """
    x, y = _outputs(f, x)
    outputs = y.shape[1]
    # (outputs, batch, outputs): row o picks output o of every example; one batched backward gives all Jacobians.
    picks = torch.eye(outputs, dtype=y.dtype, device=y.device)[:, None].expand(-1, len(y), -1)
    (rows,) = torch.autograd.grad(y, x, picks, is_grads_batched=True)
    return (rows.square().sum() / len(y)).item()


def estimate_geometric_complexity(
    f: Callable[[Tensor], Tensor], x: Float[Tensor, "batch ..."], samples: int, *, generator: torch.Generator
) -> tuple[float, float]:
    """GC as the mean of ‖Jᵀv‖² over random sign vectors v (Hutchinson): unbiased, for many outputs.

    Args:
        f: as in `geometric_complexity`.
        x: the examples D.
        samples: how many v are drawn for each example.
        generator: draws v.

    Returns:
        the estimate and its standard error.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    x, y = _outputs(f, x)
    # E[vvᵀ] = 1 for signs as for normal draws, and their estimate of ‖J‖² varies less.
    signs = torch.randint(2, (samples, *y.shape), generator=generator).to(y) * 2 - 1
    (rows,) = torch.autograd.grad(y, x, signs, is_grads_batched=True)
    # A sum over the batch is enough: f takes each example by itself, so no gradient crosses from one to another.
    draws = rows.flatten(1).square().sum(1) / len(y)
    return draws.mean().item(), (draws.std() / samples**0.5).item()


def _outputs(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(f, nn.Module) and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in f.modules()
    ):
        raise ValueError("a batch norm in training mode mixes the batch; call .eval() first")
    # A leaf, whose gradient does not run on into what made x.
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return x, f(x).flatten(1)

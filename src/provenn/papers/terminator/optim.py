"""Kar2 and Kar3: optimizers that step by signs alone, as in the authors' code."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from provenn.nn.arguments import check_finite


class _Signs(torch.optim.Optimizer):
    """p ← p − lr · (sign g + Σ sign m_i), and only then m_i ← β_i m_i + (1 − β_i) g."""

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float | int, betas: Sequence[float | int]
    ):
        check_finite(lr=lr)
        if lr < 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        for beta in betas:
            check_finite(betas=beta)
            if not 0 <= beta < 1:
                raise ValueError(f"betas must lie between 0 and 1, below 1, got {beta}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas)})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["averages"] = torch.zeros(len(group["betas"]), *p.shape, dtype=p.dtype, device=p.device)
                averages = state["averages"]
                p.sub_(group["lr"] * (p.grad.sign() + averages.sign().sum(dim=0)))
                for average, beta in zip(averages, group["betas"]):
                    average.lerp_(p.grad, 1 - beta)
        return loss


class Kar3(_Signs):
    """A step by the signs of the gradient and of two moving averages of it, as they were before this gradient.

        p ← p − lr · (sign g + sign m₁ + sign m₂);  m_i ← β_i m_i + (1 − β_i) g

    The first step moves each number by lr, later ones by up to three times as much. No weight decay.

    Args:
        params, lr: as torch's optimizers take them.
        betas: β₁ and β₂; (0.75, 0.99) for CIFAR-100.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | int = 1e-4,
        betas: tuple[float | int, float | int] = (0.5, 0.95),
    ):
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas}")
        super().__init__(params, lr, betas)


class Kar2(_Signs):
    """As `Kar3`, with one moving average, of β."""

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float | int = 1e-4, beta: float | int = 0.95
    ):
        super().__init__(params, lr, (beta,))

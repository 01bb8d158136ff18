"""Depth as a larger ensemble: a trained tower is frozen, and modules join it one by one, each at scale 0."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .layers import ResidualTower, residual_expansion
from .model import ResidualMLP, mlp_branch
from .studies import TRAIN, accuracy, batch_indices, digits
from .sweep import Batch, cross_entropy, train_grid

ACTIVATION = "tanh"  # smooth, as the theorem asks
ORDER = 3  # up to which the expansion is cut off as a predictor


class NewModule(nn.Module):
    """One new module, x + αF(x) with α = 0 at the start, before a decoder that stays as it is."""

    def __init__(self, decoder: nn.Linear):
        super().__init__()
        width = decoder.in_features
        self.tower = ResidualTower([mlp_branch(width, activation=ACTIVATION)], "skipinit", dim=width)
        self.register_buffer("weight", decoder.weight.detach())
        self.register_buffer("bias", decoder.bias.detach())

    def forward(self, stream: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        return F.linear(self.tower(stream), self.weight, self.bias)  # type: ignore[arg-type]


def joined(first: ResidualTower, second: ResidualTower) -> ResidualTower:
    """Both towers as one, the second behind the first; shares weights. The scales must not depend on the depth."""
    blocks, policies = ([*a, *b] for a, b in ((first.blocks, second.blocks), (first.policies, second.policies)))
    return ResidualTower(blocks, policies, dim=1).train(first.training)


@torch.no_grad()
def grow(
    model: ResidualMLP, seed: int, *, modules: int, epochs: int, lr: float, batch_size: int
) -> list[ResidualTower]:
    """The model's tower with 0, 1, … `modules` more, each trained alone while all that was there is frozen."""
    train, towers = digits()[0], [model.tower]
    for index in range(modules):
        new = _trained_module(model, towers[-1], train, 100 * seed + index, epochs, lr, batch_size)
        towers.append(joined(towers[-1], new))
    return towers


def _trained_module(
    model: ResidualMLP, tower: ResidualTower, train: Batch, seed: int, epochs: int, lr: float, batch_size: int
) -> ResidualTower:
    stream, labels = tower(model.encoder(train[0])), train[1]

    def batch(seed: int, step: int) -> Batch:
        chosen = batch_indices(seed, step, batch_size)
        return stream[chosen], labels[chosen]

    steps = epochs * (TRAIN // batch_size)
    grid = train_grid(lambda: NewModule(model.decoder), batch, seeds=(seed,), lrs=(lr,), steps=steps)
    (trained,) = grid.best(lambda seed: (stream, labels))
    return trained.model.tower  # type: ignore[return-value]


@torch.no_grad()
def growth_study(
    seed: int,
    *,
    scale: float,
    depth: int,
    width: int,
    base_epochs: int,
    base_lrs: Sequence[float],
    modules: int,
    epochs: int,
    lrs: Sequence[float],
    batch_size: int = 100,
) -> dict[str, Any]:
    """Test loss over the number of modules added to a frozen tower of `depth` tanh modules with a fixed scale.

    Beside it, one module trained as long as all of them together. Each takes the learning rate with the lowest
    validation loss at its end.

    Returns:
        `loss` and `accuracy` with 0 … `modules` added, `truncated` (the loss at order 0 … 3, one list an order),
        `one` (the loss with a single module), `scales` of the new modules and the learning rates.
    """
    (x, y), validate, test = digits()

    def batch(seed: int, step: int) -> Batch:
        chosen = batch_indices(seed, step, batch_size)
        return x[chosen], y[chosen]

    def build() -> ResidualMLP:
        return ResidualMLP(64, 10, dim=width, depth=depth, policy=f"const({scale:.6g})", activation=ACTIVATION)

    steps = base_epochs * (TRAIN // batch_size)
    (base,) = train_grid(build, batch, seeds=(seed,), lrs=base_lrs, steps=steps).best(lambda seed: validate)
    model: Any = base.model

    def loss(stream: Tensor, labels: Tensor) -> float:
        return cross_entropy(model.decoder(stream), labels).item()

    def validated(found: tuple[float, list[ResidualTower]]) -> float:
        """A tower that diverged is the worst."""
        value = loss(found[1][-1](model.encoder(validate[0])), validate[1])
        return value if math.isfinite(value) else math.inf

    def best(modules: int, epochs: int) -> tuple[float, list[ResidualTower]]:
        grown = {lr: grow(model, seed, modules=modules, epochs=epochs, lr=lr, batch_size=batch_size) for lr in lrs}
        return min(grown.items(), key=validated)

    lr, towers = best(modules, epochs)
    one_lr, one = best(1, modules * epochs)
    entering, labels = model.encoder(test[0]), test[1]
    sums = [residual_expansion(tower, entering, ORDER).partial_sums() for tower in towers]
    return {
        "loss": [loss(tower(entering), labels) for tower in towers],
        "accuracy": [accuracy(model.decoder(tower(entering)), labels) for tower in towers],
        "training": [loss(tower(model.encoder(x)), y) for tower in towers],
        "truncated": [[loss(total[order], labels) for total in sums] for order in range(ORDER + 1)],
        "one": loss(one[-1](entering), labels),
        "scales": [join.alpha.item() for join in towers[-1].policies[depth:]],  # type: ignore[union-attr, operator]
        "lrs": [base.lr, lr, one_lr],
    }

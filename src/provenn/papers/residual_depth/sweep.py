"""Train many small networks at once: every seed with every learning rate, stacked and stepped together.

Depth, scale and learning rate interact, so each policy's learning rate is tuned, with as many trials for each.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel

from provenn import progress

Batch = tuple[Tensor, Tensor]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over a batch, and over tokens where there are some."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Trained:
    """One network after its training.

    Attributes:
        curve: the loss of each step; its end is not finite where the training diverged.
        start: the network as it was built.
        diverged: how many of the seed's trials, one a learning rate, ended in a loss that is not finite.
    """

    seed: int
    lr: float
    model: nn.Module
    start: nn.Module
    curve: list[float]
    diverged: int


@dataclass(frozen=True)
class Grid:
    """Networks trained side by side: seeds outermost, learning rates within."""

    seeds: Sequence[int]
    lrs: Sequence[float]
    starts: list[nn.Module]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    history: list[list[float]]

    def best(self, data: Callable[[int], Batch]) -> list[Trained]:
        """The network with the lowest loss on `data(seed)` for each seed; a loss that is not finite is the worst."""
        drawn = [data(seed) for seed in self.seeds]
        x, t = (torch.stack([pair[i] for pair in drawn]).repeat_interleave(len(self.lrs), 0) for i in (0, 1))
        with torch.no_grad():
            losses = _losses(self.starts[0].eval(), self.weights, self.buffers, x, t)
        table = losses.nan_to_num(math.inf, posinf=math.inf).view(len(self.seeds), len(self.lrs))
        return [self._trained(i, int(row.argmin())) for i, row in enumerate(table)]

    def _trained(self, i: int, j: int) -> Trained:
        at, count = i * len(self.lrs) + j, len(self.lrs)
        model = deepcopy(self.starts[i])
        state = {name: w[at] for name, w in (*self.weights.items(), *self.buffers.items())}
        model.load_state_dict(state)
        diverged = sum(not math.isfinite(loss) for loss in self.history[-1][i * count : (i + 1) * count])
        curve = [row[at] for row in self.history]
        return Trained(self.seeds[i], self.lrs[j], model.eval(), self.starts[i].eval(), curve, diverged)


def train_grid(
    build: Callable[[], nn.Module],
    batch: Callable[[int, int], Batch],
    *,
    seeds: Sequence[int],
    lrs: Sequence[float],
    steps: int,
    adam: bool = False,
    clip: float | None = None,
    title: str = "training",
) -> Grid:
    """Train `build()` from each seed with each learning rate, cosine to 0, in one stack of networks.

    Args:
        build: makes the network; called after the seed is set.
        batch: `(seed, step)` to inputs and targets; all learning rates of a seed see the same.
        seeds, lrs: the grid.
        steps: of SGD with momentum 0.9, or of Adam.
        adam: use Adam (β 0.9, 0.95).
        clip: largest norm of each network's gradient; None leaves it, so that explosions show.
        title: of the progress bar.
    """
    starts = [_built(build, seed) for seed in seeds]
    params, buffers = (
        {name: value.detach().repeat_interleave(len(lrs), 0) for name, value in stacked.items()}
        for stacked in stack_module_state(starts)
    )
    names, weights = list(params), [p.requires_grad_() for p in params.values()]
    rate = torch.tensor(list(lrs) * len(seeds))
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights] if adam else []
    history = []
    with progress.bar(title, steps) as advance, torch.enable_grad():
        for step in range(steps):
            drawn = [batch(seed, step) for seed in seeds]
            x, t = (torch.stack([pair[i] for pair in drawn]).repeat_interleave(len(lrs), 0) for i in (0, 1))
            losses = _losses(starts[0], dict(zip(names, weights)), buffers, x, t)
            history.append(losses.tolist())
            advance()
            if not losses.isfinite().any():
                break
            grads = torch.autograd.grad(losses.sum(), weights, allow_unused=True, materialize_grads=True)
            size = rate * (1 + math.cos(math.pi * step / steps)) / 2
            with torch.no_grad():
                _update(weights, _clipped(grads, clip), size, first, second, step)
    return Grid(seeds, lrs, starts, {n: w.detach() for n, w in zip(names, weights)}, buffers, history)


def _losses(base: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    """The loss of each network of a stack, each on a batch of its own."""

    def loss(w: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(functional_call(base, (w, b), (x,)), t)

    # The fused attention of the CPU cannot be stacked.
    with sdpa_kernel(SDPBackend.MATH):
        return torch.vmap(loss)(weights, buffers, x, t)


def _built(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def _along(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 1))


def _clipped(grads: Sequence[Tensor], clip: float | None) -> list[Tensor]:
    if clip is None:
        return list(grads)
    norm = torch.stack([g.flatten(1).square().sum(1) if g.dim() > 1 else g.square() for g in grads]).sum(0).sqrt()
    return [g * _along((clip / norm).clamp(max=1), g) for g in grads]


def _update(
    weights: list[Tensor], grads: list[Tensor], size: Tensor, first: list[Tensor], second: list[Tensor], step: int
) -> None:
    """SGD with momentum 0.9, or Adam where there are second moments; `size` holds each network's learning rate."""
    if not second:
        torch._foreach_mul_(first, 0.9)
        torch._foreach_add_(first, grads)
        for w, m in zip(weights, first):
            w.sub_(_along(size, w) * m)
        return
    for w, g, m, v in zip(weights, grads, first, second):
        m.lerp_(g, 0.1)
        v.lerp_(g.square(), 0.05)
        direction = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        w.sub_(_along(size, w) * direction)

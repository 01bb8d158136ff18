"""The trained networks that the claims look at: digits by an MLP or a CNN, source text by a Transformer.

Each study tunes the learning rate of each seed on validation data and returns plain numbers, one entry a seed.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from .layers import SkipInit, geometric_complexity, residual_expansion
from .model import ByteTransformer, CifarResNet, ResidualMLP
from .sweep import Batch, Trained, cross_entropy, train_grid
from .text import standard_library, windows

TRAIN, VALIDATE = 1000, 200  # of 1797 digits; the other 597 are the test
SLOPES = 200  # test examples at which slopes are taken
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LESIONS = 5  # how many blocks are deleted together


@cache
def digits() -> tuple[Batch, Batch, Batch]:
    """scikit-learn's digits, shuffled once and standardised by the training part: 1000, 200 and 597 to test."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], torch.tensor(labels)[order]
    x = (x - x[:TRAIN].mean()) / x[:TRAIN].std()
    cuts = (slice(0, TRAIN), slice(TRAIN, TRAIN + VALIDATE), slice(TRAIN + VALIDATE, None))
    train, validate, test = ((x[cut], y[cut]) for cut in cuts)
    return train, validate, test


def noisy_labels(seed: int, share: float) -> tuple[Tensor, Tensor]:
    """The training labels with a share of them moved to another class, and which ones were."""
    labels = digits()[0][1]
    generator = torch.Generator().manual_seed(10_000 + seed)
    flipped = torch.rand(len(labels), generator=generator) < share
    others = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
    return torch.where(flipped, others, labels), flipped


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers; an output that is not finite is a wrong one."""
    right = (logits.argmax(-1) == labels) & logits.isfinite().all(-1)
    return right.double().mean().item()


@torch.no_grad()
def mlp_study(
    policy: str,
    seeds: Sequence[int],
    *,
    depth: int,
    width: int,
    epochs: int,
    lrs: Sequence[float],
    batch_size: int = 100,
    noise: float = 0.0,
    clip: float | None = None,
    details: bool = True,
) -> list[dict[str, Any]]:
    """Train MLP towers on the digits; `details` adds geometric complexity, level norms and lesions.

    With label noise the question is how much a network can fit, so its learning rate is the one with the lowest
    training loss; else the one with the lowest validation loss.
    """
    (x, _), validate, test = digits()
    labels = {seed: noisy_labels(seed, noise) for seed in seeds}

    def batch(seed: int, step: int) -> Batch:
        picks = batch_indices(seed, step, batch_size)
        return x[picks], labels[seed][0][picks]

    def build() -> ResidualMLP:
        return ResidualMLP(64, 10, dim=width, depth=depth, policy=policy)

    title, steps = f"{policy}, n = {depth}", epochs * (TRAIN // batch_size)
    grid = train_grid(build, batch, seeds=seeds, lrs=lrs, steps=steps, clip=clip, title=title)
    outcomes = []
    for run in grid.best(lambda seed: (x, labels[seed][0]) if noise else validate):
        noisy, flipped = labels[run.seed]
        logits = run.model(x)
        outcome = _outcome(run, accuracy(run.model(test[0]), test[1]), cross_entropy(logits, noisy).item())
        if noise:
            outcome["noise_fit"] = accuracy(logits[flipped], noisy[flipped])
        if details:
            outcome |= _details(run, test)
        outcomes.append(outcome)
    return outcomes


@torch.no_grad()
def cnn_study(
    policy: str,
    seeds: Sequence[int],
    *,
    blocks: int,
    width: int,
    epochs: int,
    lrs: Sequence[float],
    batch_size: int = 100,
) -> list[dict[str, Any]]:
    """Train CIFAR-style ResNets on the digits as 8 × 8 images."""
    train, validate, test = ((x.view(-1, 1, 8, 8), y) for x, y in digits())

    def batch(seed: int, step: int) -> Batch:
        picks = batch_indices(seed, step, batch_size)
        return train[0][picks], train[1][picks]

    def build() -> CifarResNet:
        return CifarResNet(blocks, in_channels=1, policy=policy, width=width)

    title, steps = f"{policy}, ResNet-{6 * blocks + 2}", epochs * (TRAIN // batch_size)
    grid = train_grid(build, batch, seeds=seeds, lrs=lrs, steps=steps, title=title)
    return [
        _outcome(run, accuracy(run.model(test[0]), test[1]), cross_entropy(run.model(train[0]), train[1]).item())
        for run in grid.best(lambda seed: validate)
    ]


@torch.no_grad()
def text_study(
    policy: str,
    seeds: Sequence[int],
    *,
    layers: int,
    dim: int,
    tokens: int,
    batch_size: int,
    steps: int,
    lrs: Sequence[float],
) -> list[dict[str, Any]]:
    """Train byte-level Transformers with Adam; half of the held-out text tunes, half tests (nats a byte)."""
    train, held = standard_library()
    generator = torch.Generator().manual_seed(0)
    tune, test = (windows(half, 64, tokens, generator) for half in held.chunk(2))

    def batch(seed: int, step: int) -> Batch:
        return windows(train, batch_size, tokens, torch.Generator().manual_seed(seed * 1_000_003 + step))

    def build() -> ByteTransformer:
        return ByteTransformer(dim=dim, heads=2, layers=layers, max_tokens=tokens, policy=policy)

    grid = train_grid(build, batch, seeds=seeds, lrs=lrs, steps=steps, adam=True, title=f"{policy}, {layers} layers")
    outcomes = []
    for run in grid.best(lambda seed: tune):
        logits = run.model(test[0])
        outcomes.append(_outcome(run, accuracy(logits, test[1]), cross_entropy(logits, test[1]).item()))
    return outcomes


def in_precision(name: str, device: str) -> torch.autocast:
    """Autocast to float16 or bfloat16; float32 as it is."""
    return torch.autocast(torch.device(device).type, PRECISIONS[name], enabled=name != "float32")


def precision_study(
    seed: int,
    *,
    policy: str,
    blocks: int,
    precision: str,
    steps: int,
    device: str,
    lr: float = 0.01,
    batch_size: int = 64,
    size: int = 28,
) -> dict[str, Any]:
    """A CIFAR-style ResNet in one precision: the module at which it overflows, and what it learns.

    Returns:
        `overflows_at`, counted in modules at the start, None where the stream stays finite; the `accuracy` on one
        batch of digits, brought to `size` pixels a side, after `steps` of SGD with momentum 0.9 on it; and the `loss`
        of each step.
    """
    torch.manual_seed(seed)
    model = CifarResNet(blocks, in_channels=1, policy=policy).to(device)
    x, y = (part[:batch_size].to(device) for part in digits()[0])
    x = F.interpolate(x.view(-1, 1, 8, 8), size, mode="bilinear")
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    with torch.no_grad(), in_precision(precision, device):
        lost = [i for i, state in enumerate(_stream(model, x)) if not state.isfinite().all()]
    losses = []
    for _ in range(steps):
        with in_precision(precision, device):
            loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad(), in_precision(precision, device):
        right = accuracy(model(x), y)
    return {"overflows_at": lost[0] if lost else None, "accuracy": right, "loss": losses}


def _stream(model: CifarResNet, x: Tensor) -> list[Tensor]:
    """What enters the first module and what leaves each."""
    states = [model.stem(x)]
    for i, tower in enumerate(model.towers):
        if i:
            states.append(model.turns[i - 1](states[-1]))
        states += tower.stream(states[-1])[1:]  # type: ignore[operator]
    return states


def batch_indices(seed: int, step: int, batch_size: int) -> Tensor:
    """A fresh order of the training examples every epoch, cut into batches."""
    epoch, index = divmod(step, TRAIN // batch_size)
    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[index * batch_size : (index + 1) * batch_size]


def _outcome(run: Trained, right: float, loss: float) -> dict[str, Any]:
    return {"lr": run.lr, "accuracy": right, "loss": loss, "diverged": run.diverged, "curve": run.curve}


def _details(run: Trained, test: Batch) -> dict[str, Any]:
    model: Any = run.model
    x, labels = test
    entering = model.encoder(x)
    trained = residual_expansion(model.tower, entering, 3)
    start: Any = run.start
    scales = [join.alpha.abs().item() for join in model.tower.policies if isinstance(join, SkipInit)]
    lesions, joint = _lesions(model, x, labels)
    return {
        "feature_complexity": geometric_complexity(lambda z: model.tower(model.encoder(z)), x[:SLOPES]),
        "complexity": geometric_complexity(model, x[:SLOPES]),
        "shares": trained.shares(),
        "start_shares": residual_expansion(start.tower, start.encoder(x), 3).shares(),
        "truncated": [accuracy(model.decoder(total), labels) for total in trained.partial_sums()],
        "whole": accuracy(model(x), labels),
        "scale": sum(scales) / len(scales) if scales else None,
        "lesion_drop": lesions,
        "lesion_interaction": joint,
    }


def _lesions(model: Any, x: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mean loss of accuracy when one block is deleted, and how far deletions are from adding up.

    The second is ‖Δ(several) − Σ Δ(each)‖/‖Δ(several)‖ of the stream: 0 where lesions are additive.
    """
    tower: Any = model.tower
    stream = model.encoder(x)
    whole = tower(stream)
    right = accuracy(model.decoder(whole), labels)
    n = len(tower.blocks)
    alone = [tower.without(i)(stream) for i in range(n)]
    drop = sum(right - accuracy(model.decoder(y), labels) for y in alone) / n
    chosen = [round(i * (n - 1) / (LESIONS - 1)) for i in range(LESIONS)]
    together = tower.without(*chosen)(stream) - whole
    summed = torch.stack([alone[i] - whole for i in chosen]).sum(0)
    return drop, ((together - summed).norm() / together.norm()).item()

"""Data, networks and what is read off them: digits by residual towers."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from provenn.tasks import TaskData, device_of, fingerprint, get_task

from .layers import Expansion, ResidualTower, SkipInit, geometric_complexity, residual_expansion
from .model import CausalAttention, CifarResNet, ResidualMLP, mlp_branch

WRONG = 0.2  # share of the labels that are moved to another class
SLOPES = 200  # test examples at which slopes are taken
Network = Any  # a `ResidualMLP`; a study hands its probes an nn.Module, of which torch types no part


def digits(seed: int, smoke: bool) -> TaskData:
    """A smoke run's networks have few modules."""
    data = get_task("image-classification").load("digits", seed=seed)
    return replace(data, options={"most": 6 if smoke else 10_000})


def wrong_digits(seed: int, smoke: bool) -> TaskData:
    """Digits of whose training labels a fifth is wrong. The rate is the one that fits these labels best.

    How much a network can fit is the question, so that what selects the rate is the training set itself.
    """
    data = digits(seed, smoke)
    images, labels = data.train[:]
    generator = torch.Generator().manual_seed(10_000 + seed)
    moved = torch.rand(len(labels), generator=generator) < WRONG
    changed = torch.where(moved, (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10, labels)
    train = TensorDataset(images, changed)
    return TaskData(
        "digits, a fifth of the labels wrong", train, train, data.test, fingerprint(images, changed), data.options,
        {"moved": moved.nonzero().flatten().tolist()},
    )  # fmt: skip


def tower(variant: tuple[str, int, int], most: int) -> nn.Module:
    """An MLP of modules that join by a policy: (policy, modules, width)."""
    policy, depth, width = variant
    return ResidualMLP(64, 10, dim=width, depth=min(depth, most), policy=policy)


def resnet(policy: str, most: int) -> nn.Module:
    """ResNet-110, 54 modules, of 8, 16 and 32 channels."""
    return CifarResNet(min(18, most // 3), in_channels=1, policy=policy, width=8)


def _images(model: Network, data: TaskData) -> Tensor:
    return data.test[:][0].flatten(1).to(device_of(model))


def feature_complexity(model: Network, data: TaskData) -> float:
    """Geometric complexity of what the tower gives to the decoder."""
    with torch.enable_grad():
        return geometric_complexity(lambda x: model.tower(model.encoder(x)), _images(model, data)[:SLOPES])


def _levels(model: Network, data: TaskData) -> Expansion:
    return residual_expansion(model.tower, model.encoder(_images(model, data)), 2)


def first_level(model: Network, data: TaskData) -> float:
    """‖level 1‖/‖T(x) − x‖."""
    return _levels(model, data).shares()[0]


def second_to_first(model: Network, data: TaskData) -> float:
    """‖level 2‖/‖level 1‖."""
    first, second = _levels(model, data).shares()
    return second / first


def learned_scale(model: Network, data: TaskData) -> float:
    """The mean size of the scales where they are learned, else 0."""
    scales = [join.alpha.abs().item() for join in model.tower.policies if isinstance(join, SkipInit)]
    return sum(scales) / max(len(scales), 1)


def wrong_labels_fitted(model: nn.Module, data: TaskData) -> float:
    """The share of the moved labels that the network gives as they were moved."""
    images, labels = (part.to(device_of(model)) for part in data.train[data.meta["moved"]])
    return (model(images).argmax(-1) == labels).double().mean().item()


def smooth_towers() -> dict[str, tuple[list[nn.Module], int, int, Tensor]]:
    """Modules, width, channel axis and input of one tower of each kind, in double precision."""
    torch.manual_seed(0)
    convolutions: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GELU(), nn.Conv2d(3, 3, 3, padding=1)) for _ in range(8)
    ]
    kinds: dict[str, tuple[list[nn.Module], int, int, Tensor]] = {
        "MLP": ([mlp_branch(6, activation="tanh") for _ in range(8)], 6, -1, torch.randn(3, 6)),
        "convolution": (convolutions, 3, 1, torch.randn(2, 3, 6, 6)),
        "attention": ([CausalAttention(8, 2) for _ in range(8)], 8, -1, torch.randn(2, 6, 8)),
    }
    return {
        kind: ([module.double() for module in modules], dim, axis, x.double())
        for kind, (modules, dim, axis, x) in kinds.items()
    }


def norms_over_depth(policy: str, depths: tuple[int, ...], seed: int) -> list[float]:
    """‖T_n(x)‖/‖x‖ at the start for each n, He two-layer ReLU branches of width 32, in double precision."""
    norms = []
    for n in depths:
        torch.manual_seed(seed)
        start = ResidualTower([mlp_branch(32) for _ in range(n)], policy, dim=32).double()
        x = torch.randn(64, 32).double()
        with torch.no_grad():
            norms.append((start(x).norm() / x.norm()).item())
    return norms


def branch_variances(depth: int, seed: int) -> Tensor:
    """Of each of `depth` batch-norm modules at the start, the variance of its branch over that of its stream."""
    torch.manual_seed(seed)
    start = ResidualTower([mlp_branch(32) for _ in range(depth)], "batchnorm", dim=32)
    with torch.no_grad():
        stream = torch.stack(copy.deepcopy(start).train().stream(torch.randn(256, 32)))
    return (stream[1:] - stream[:-1]).var((1, 2)) / stream[:-1].var((1, 2))

"""The hosts of slots: networks with one open slot, and how they are trained."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.experiments.compare import language
from provenn.tasks import get_task
from provenn.training import Recipe

Factory = Callable[..., nn.Module]
TEXTS = (".txt", ".md", ".rst", ".py", ".jsonl")


@dataclass(frozen=True)
class Host:
    """A network with one open slot, and how it is trained.

    Args:
        task: what it learns.
        build: makes it from a mechanism's factory and the options of the data.
        baselines: what every mechanism of the slot is compared with; the first is the reference.
        recipe: one for each budget.
        lrs: the learning rates that each candidate may choose from, on validation data.
        about: the host in one phrase.
        sizes: how the task loads the data.
        more: whether recall and the cost of a context are measured too (`provenn.experiments.compare.language`).
    """

    task: str
    build: Callable[[Factory, dict[str, Any]], nn.Module]
    baselines: Callable[[], dict[str, Factory]]
    recipe: dict[str, Recipe]
    lrs: tuple[float, ...]
    about: str
    sizes: dict[str, Any] = field(default_factory=dict)
    more: bool = False


def _gated_resnet(gate: Factory, options: dict[str, Any]) -> nn.Module:
    from provenn.nn.resnet import resnet20

    return resnet20(gate=gate, **options)


def _gates() -> dict[str, Factory]:
    from provenn.nn.channel_gates import CBAM, SqueezeExcitation

    return {"none": nn.Identity, "se": SqueezeExcitation, "cbam": CBAM}


def _series_encoder(mixer: Factory, options: dict[str, Any]) -> nn.Module:
    from provenn.nn.hosts import SeriesHost

    return SeriesHost(mixer, channels=options["channels"], num_classes=options["num_classes"])


def _mixers() -> dict[str, Factory]:
    from provenn.nn.attention import SoftmaxAttention
    from provenn.nn.mixers import NoMixer

    return {"none": NoMixer, "softmax": partial(SoftmaxAttention, heads=4)}


class Sum(nn.Module):
    """The plain join of a residual branch, x + f(x)."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: torch.Tensor, f: Callable[[torch.Tensor], torch.Tensor], depth: int) -> torch.Tensor:
        return x + f(x)


def _residual_tower(join: Factory, options: dict[str, Any]) -> nn.Module:
    from provenn.nn.hosts import ResidualHost

    return ResidualHost(join, **options)


def _bare_backbone(backbone: Factory, options: dict[str, Any]) -> nn.Module:
    return backbone(num_classes=options["num_classes"], in_channels=options["in_channels"])


def _backbones() -> dict[str, Factory]:
    from provenn.nn.mobilenet import MobileNetV2
    from provenn.nn.resnet import BasicBlock, ResNet

    # Both halve a small image twice, as ResNet-20 does, and have about as many parameters.
    small = ((1, 16, 1, 1), (4, 24, 2, 1), (4, 40, 3, 2), (4, 80, 3, 2))
    resnet = partial(ResNet, BasicBlock, (2, 2, 2), widths=(16, 32, 64), stem="small")
    mobilenet = partial(MobileNetV2, settings=small, stem_stride=1, last=320, dropout=0.0)
    return {"resnet14": resnet, "mobilenet": mobilenet}


_SGD = Recipe(batch_size=64, optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="onecycle")
_ADAMW = Recipe(batch_size=64, optimizer="adamw", lr=3e-3, weight_decay=5e-2, schedule="onecycle", clip=1.0)
_RADAM = Recipe(batch_size=16, optimizer="radam", lr=1e-3, clip=4.0)


def _budgets(recipe: Recipe, small: int, paper: int) -> dict[str, Recipe]:
    return {
        "smoke": replace(recipe, epochs=1, max_steps=2),
        "small": replace(recipe, epochs=small, max_steps=1000),
        "paper": replace(recipe, epochs=paper),
    }


HOSTS: dict[str, tuple[Host, ...]] = {
    "channel-gate": (
        Host(
            "image-classification",
            _gated_resnet,
            _gates,
            _budgets(_SGD, 8, 100),
            (0.03, 0.1, 0.3),
            "ResNet-20 with a gate on every branch",
        ),
    ),
    "token-mixer": (
        Host(
            "language-modelling",
            language.language_model,
            lambda: language.BASELINES,
            language.RECIPES,
            language.LRS,
            "a byte language model of two layers, 64 wide, all of the same size",
            sizes=language.SIZES,
            more=True,
        ),
        Host(
            "series-classification",
            _series_encoder,
            _mixers,
            _budgets(_RADAM, 25, 60),
            (3e-4, 1e-3, 3e-3),
            "a causal encoder of two layers, 64 wide",
        ),
    ),
    "residual": (
        Host(
            "image-classification",
            _residual_tower,
            lambda: {"sum": Sum},
            _budgets(replace(_SGD, lr=0.02), 15, 100),
            (0.007, 0.02, 0.06),
            "a tower of 24 branches, 64 wide, without normalisation",
        ),
    ),
    "backbone": (
        Host(
            "image-classification",
            _bare_backbone,
            _backbones,
            _budgets(_ADAMW, 5, 100),
            (1e-3, 3e-3, 1e-2),
            "each network as it is, from random weights",
        ),
    ),
}


def host_for(slot: str, data: str | Path) -> Host:
    """The host of a slot that fits the data: by the embedded name, or by what files a path names.

    Raises:
        UserError: a slot without a host, an empty folder, or data that is neither embedded nor a path.
    """
    if slot not in HOSTS:
        raise UserError(f"no host has the slot {slot!r} to compare in; these have: {', '.join(HOSTS)}")
    hosts = HOSTS[slot]
    for host in hosts:
        # A slot with one host has nothing to choose: its task itself says what is wrong with the data.
        if data in get_task(host.task).embedded or len(hosts) == 1:
            return host
    path = Path(data)
    if path.is_dir() and not any(file.is_file() for file in path.rglob("*")):
        raise UserError(f"{path} is an empty folder: expected {'; or '.join(get_task(h.task).reads for h in hosts)}")
    if str(data).startswith("hf:") or path.suffix.lower() in TEXTS:
        return hosts[0]
    if path.is_dir() and any(file.suffix.lower() in TEXTS for file in path.rglob("*")):
        return hosts[0]
    if not path.exists():
        tasks = [get_task(host.task) for host in hosts]
        reads, names = "; or ".join(task.reads for task in tasks), [name for task in tasks for name in task.embedded]
        raise UserError(
            f"no data at {str(data)!r}: give a path to {reads}; or an embedded data set: {', '.join(names)}"
        )
    return hosts[-1]

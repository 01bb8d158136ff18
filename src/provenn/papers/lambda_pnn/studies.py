"""Data, networks and probes of λ-PNN's experiments: photographs seen by a simulated sensor, with a hidden truth."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.papers.lambda_pnn.indices import local_correlation, q2n, sam
from provenn.papers.lambda_pnn.model import PNN, Adaptation, FusionNetwork, LambdaPNN, PanNet, weights_of
from provenn.papers.lambda_pnn.sensors import RATIO, SCALE
from provenn.papers.lambda_pnn.task import TEST, TRAIN, VALIDATE, Crops, Scenes, pieces
from provenn.papers.lambda_pnn.task.fusion import adapted, fuse, gsa, mtf_glp
from provenn.tasks import Task, TaskData, device_of, fingerprint, split_indices
from provenn.training import Fit, fit
from provenn.training.loop import NothingToTrain

WIDTH, BANDS, SENSOR = 32, 3, "photographs"
PHOTOGRAPHS = (*TRAIN, *VALIDATE, *TEST)
JOINT, SPECTRAL, SPATIAL, Z_PNN = (0.05, 1.25, 3.75), (0.05, 1.25, 0.0), (0.0, 0.0, 3.75), (0.0, 0.0, 3.75, 8.0)
ADAPTING = Adaptation(steps=100, tiles=3, tile=80, rate=2e-4)


def folds(seed: int, smoke: bool) -> TaskData:
    """Photographs in three parts drawn by the seed: two to test, one to validate, the others to train on.

    Of each photograph one square of 256 pixels counts in the test, so that large photographs weigh no more.
    """
    order = [PHOTOGRAPHS[i] for part in split_indices(len(PHOTOGRAPHS), (1.0,), seed) for i in part]
    cut = {"test": order[:2], "val": order[2:3], "train": order[3:5] if smoke else order[3:]}
    side = 128 if smoke else 256
    scenes = {part: [next(pieces(name, seed, side)) for name in names] for part, names in cut.items()}
    return TaskData(
        "photographs",
        Crops([(ms, pan) for ms, pan, _ in scenes["train"]], 2 if smoke else 16),
        Scenes(scenes["val"]),
        Scenes(scenes["test"]),
        fingerprint=fingerprint(*(x for part in scenes.values() for scene in part for x in scene)),
        options={"short": smoke},
        about=f"{len(PHOTOGRAPHS)} colour photographs, {len(cut['train'])} to train on, one to validate, two to test.",
    )


class Variant(NamedTuple):
    """A network of a study.

    Args:
        kind: of the network, made for the bands and the sensor.
        weights: of the loss, as `weights_of` takes them.
        reduced: trained by Wald's protocol.
        adaptation: how it adapts to each image of the test.
        options: further ones of the network.
    """

    kind: Callable[..., FusionNetwork] = LambdaPNN
    weights: Sequence[float] = JOINT
    reduced: bool = False
    adaptation: Adaptation | None = None
    options: tuple[tuple[str, Any], ...] = (("width", WIDTH),)


def network(part: Variant, short: bool = False) -> FusionNetwork:
    """The network of a variant, whose last convolution starts close to the interpolator; `short` adapts for a step."""
    made = part.kind(BANDS, sensor=SENSOR, weights=part.weights, **dict(part.options))
    made.adapting, made.reduced, made.adaptation = weights_of(part.weights), part.reduced, part.adaptation
    if short and made.adaptation is not None:
        made.adaptation = made.adaptation._replace(steps=1)
    last = [module for module in made.modules() if isinstance(module, nn.Conv2d)][-1:]
    with torch.no_grad():
        for module in last:
            module.weight.mul_(0.1)
    return made


class Classical(FusionNetwork):
    """A method without weights to learn, as a network: MS↑ and PAN in, the fused bands out.

    Args:
        bands, sensor, weights: of `FusionNetwork`.
        method: `gsa` or `mtf_glp`.
    """

    def __init__(self, bands: int, *, sensor: str, weights: Sequence[float], method: Callable[..., Tensor]):
        super().__init__(bands, sensor, weights)
        self.method = method

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch bands height width"]:
        # The interpolator gives the coarse pixels back exactly.
        return self.method(x[:, :-1, 2::RATIO, 2::RATIO], x[:, -1:], self.sensor)


def trained(build: Callable[[], nn.Module], task: Task, data: TaskData, *rest: Any, **options: Any) -> Fit:
    """`fit`; a method without weights is tested as it is."""
    try:
        return fit(build, task, data, *rest, **options)
    except NothingToTrain:
        method = build().eval()
        with torch.no_grad():
            return Fit(method, task.evaluate(method, data.test))


def each(measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, TaskData], float]:
    """A probe: the mean over the scenes of the test of an index of the fused bands and the hidden truth."""

    def probe(model: nn.Module, data: TaskData) -> float:
        values = []
        for index in range(len(data.test)):  # type: ignore[arg-type]  # it has a length
            ms, pan, truth = (part[None].to(device_of(model)) for part in data.test[index])
            fused = fuse(adapted(model, ms, pan), ms, pan)  # type: ignore[arg-type]  # a fusion network
            values.append(float(measure(fused, truth).mean()))
        return float(np.mean(values))

    return probe


def missing_detail(fused: Tensor, truth: Tensor) -> Tensor:
    """1 − the correlation of the high-passed bands with the truth's, in windows of 4×4 pixels."""
    return 1 - local_correlation(fused, truth, RATIO // 2).mean(dim=(1, 2, 3))


def distance_of_q2n(fused: Tensor, truth: Tensor) -> Tensor:
    """1 − Q2ⁿ to the truth."""
    return 1 - q2n(SCALE * fused, SCALE * truth)


PROBES = {"SAM": each(sam), "missing detail": each(missing_detail), "1 − Q2ⁿ": each(distance_of_q2n)}
VARIANTS = {
    "full": ("λ-PNN", Variant()),
    "reduced": ("λ-PNN, trained reduced", Variant(reduced=True)),
    "plain": ("λ-PNN without attention", Variant(options=(("width", WIDTH), ("attention", False)))),
    "spectral": ("spectral loss alone", Variant(weights=SPECTRAL)),
    "spatial": ("spatial loss alone", Variant(weights=SPATIAL)),
    "z-pnn": ("Z-PNN's loss", Variant(weights=Z_PNN)),
    "pnn": ("PNN", Variant(PNN)),
    "pnn reduced": ("PNN, trained reduced", Variant(PNN, reduced=True)),
    "pannet": ("PanNet", Variant(PanNet)),
    "pannet reduced": ("PanNet, trained reduced", Variant(PanNet, reduced=True)),
    "clusters": ("adapted on clustered tiles", Variant(adaptation=ADAPTING)),
    "random": ("adapted on random tiles", Variant(adaptation=ADAPTING._replace(choice="random"))),
    "whole": ("adapted on the whole image", Variant(adaptation=ADAPTING._replace(steps=29, choice="whole"))),
    "gsa": ("GSA", Variant(Classical, options=(("method", gsa),))),
    "glp": ("MTF-GLP", Variant(Classical, options=(("method", mtf_glp),))),
}

"""Data and networks of GAAM's experiments: frozen stacks, drifting series, densities, layers alone."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from provenn.evidence import Measurement, Run, Study
from provenn.evidence.measurement import Skill, Table
from provenn.papers.gaam.layers import GaussianAdaptiveAttention, importance_factor, layer_shares
from provenn.papers.gaam.mixture import GaussianMixtureAttention
from provenn.papers.gaam.model import StackClassifier
from provenn.papers.gaam.task import TASK
from provenn.papers.gaam.task.pretraining import pretrained_stacks, stack_data
from provenn.tasks import TaskData, batches, get_task
from provenn.training import Hardware, fit

HEADS = 8  # of the paper's first form, three layers each
STEPS = 24  # that a series is brought to
DRIFT = 1.0  # standard deviations of a channel that drift moves it by

# By name, the label and what stands between stack and decoder.
LAYER_VARIANTS: dict[str, tuple[str, str]] = {
    "none": ("none", "none"),
    "mha": ("MHA", "mha"),
    "mha_released": ("MHA, as released", "mha_released"),
    "mha_bn": ("MHA, batch norm", "mha_bn"),
    "gaam": ("GAAM", "gaam"),
    "gaam_v2": ("GAAM, one head", "gaam_v2"),
    "mixture": ("mixture", "mixture"),
    "gqa": ("GQA", "gqa"),
    "gqdaam": ("GQDAAM", "gqdaam"),
}


def stack_network(variant: str, num_classes: int, layers: int = 6, dim: int = 64) -> StackClassifier:
    """The decoder of six layers: heads of the gate have three layers each, as the paper's have; v2 has one head."""
    module = variant.removesuffix("_v2").removesuffix("_released")
    heads = {"gaam": 2, "gaam_v2": 1, "gqdaam": 1, "mixture": 2}.get(variant, 4)
    return StackClassifier(
        num_classes, layers, dim, module=module, heads=heads, hidden=32, width=dim, query_heads=4, kv_heads=2,
        across_batch=variant.endswith("_released"),
    )  # fmt: skip


def patch_stacks(seed: int, smoke: bool) -> TaskData:
    return pretrained_stacks("patches", seed, smoke)


def vowel_stacks(seed: int, smoke: bool) -> TaskData:
    return pretrained_stacks("vowels", seed, smoke)


def text_stacks(seed: int, smoke: bool) -> TaskData:
    return pretrained_stacks("docstrings", seed, smoke)


# JapaneseVowels as 24 steps of 12 channels.


class SeriesNetwork(nn.Module):
    """A linear map of every step, and the decoder with steps instead of layers."""

    def __init__(self, variant: str, num_classes: int, layers: int, dim: int):
        super().__init__()
        self.embed = nn.Linear(dim, 64)
        self.decoder = StackClassifier(num_classes, layers, 64, module=variant, heads=HEADS, hidden=64)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.embed(x))


def series_network(variant: str, num_classes: int, layers: int = STEPS, dim: int = 12) -> SeriesNetwork:
    return SeriesNetwork(variant, num_classes, layers, dim)


@cache
def speaker_series(seed: int) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """Series of the three splits, each brought to 24 steps by lines between its own."""
    data = get_task("series-classification").load("japanese-vowels", seed=seed)
    parts = []
    for dataset in (data.train, data.val, data.test):
        values, lengths, labels = dataset.tensors  # type: ignore[attr-defined]  # a TensorDataset
        rows = [
            torch.nn.functional.interpolate(x[:n].T[None], STEPS, mode="linear", align_corners=True)[0].T
            for x, n in zip(values, lengths.tolist())
        ]
        parts.append((torch.stack(rows), labels))
    return parts, data.meta["classes"]


def drifted(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Series (examples, steps, channels) with a slow random gain and offset of each example and channel.

    Both are two cosines of at most one and a half periods over the series, of random phase; the offset has `strength`
    standard deviations, and the logarithm of the gain half of it.
    """

    def slow() -> Tensor:
        shape = (x.shape[0], 2, 1, x.shape[2])
        periods, phase, size = (torch.rand(shape, generator=generator) for _ in range(3))
        time = torch.linspace(0, 1, x.shape[1])[None, None, :, None]
        return (2 * (size - 0.5) * torch.cos(2 * torch.pi * (1.5 * periods * time + phase))).sum(dim=1) * 6**0.5 / 2

    return x * torch.exp(strength / 2 * slow()) + strength * slow()


def speakers(seed: int, smoke: bool) -> TaskData:
    parts, classes = speaker_series(seed)
    return stack_data("japanese-vowels", parts, classes, "JapaneseVowels")


def drifting_speakers(seed: int, smoke: bool, drift: float = DRIFT) -> TaskData:
    parts, classes = speaker_series(seed)
    generator = torch.Generator().manual_seed(seed)
    moved = [(drifted(x, drift, generator), labels) for x, labels in parts]
    return stack_data("japanese-vowels, drifting", moved, classes, "JapaneseVowels with drift")


class NormalisedSeries(nn.Module):
    """A network that sees each channel of a series less its mean, in units of its deviation, over the steps.

    Shapes: (batch, steps, channels) to what the network makes of it.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        return self.network((x - mean) / (variance + 1e-5).sqrt())


def drift_network(variant: str, num_classes: int, layers: int = STEPS, dim: int = 12) -> nn.Module:
    """The network of series; "normalised" is the one without attention behind a norm of each series."""
    if variant == "normalised":
        return NormalisedSeries(series_network("none", num_classes, layers, dim))
    return series_network(variant, num_classes, layers, dim)


def lora(dim: int, *, rank: int, layers: int) -> nn.Module:
    """What LoRA adds to queries and keys of each layer."""
    pairs = [nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)]
    return nn.ModuleList(
        nn.ModuleList(type(p)(p.in_features, p.out_features, bias=False) for p in 2 * pairs) for _ in range(layers)
    )


# Densities that a gate is fitted to, as weights of 161 points. They are code, so processors must agree on every digit.

DIGITS = 12


def _rounded(values: Tensor) -> Tensor:
    # Plus zero, so that there is no negative one.
    return torch.tensor([round(value, DIGITS) + 0.0 for value in values.tolist()], dtype=torch.float64)


def _density(values: Tensor) -> Tensor:
    return _rounded(values / values.sum())


GRID = _rounded(torch.linspace(-4, 4, 161, dtype=torch.float64))


DENSITIES: dict[str, Tensor] = {
    "skewed": _density((GRID + 3).clamp(min=0) * torch.exp(-(GRID + 3).clamp(min=0))),
    "bimodal": _density(torch.exp(-(GRID + 1.5).square() / 0.5) + torch.exp(-(GRID - 1.5).square() / 0.5)),
    "uniform": _density((GRID.abs() <= 1.5).double()),
}


def total_variation(weights: Tensor, target: Tensor) -> float:
    """Half the sum of absolute differences: the mass at wrong points."""
    return (weights - target).abs().sum().item() / 2


def closest(gate: nn.Module, target: Tensor) -> Tensor:
    """The weights of a gate over the points, once its cross-entropy to the target is as low as L-BFGS takes it.

    They are scaled to sum to one.
    """
    x, lowest, best = GRID[None, :, None], torch.inf, torch.zeros_like(target)
    optimizer = torch.optim.LBFGS(gate.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def entropy() -> Tensor:
        nonlocal lowest, best
        optimizer.zero_grad()
        weights = gate.weights(x)[0, :, 0]  # type: ignore[operator]  # a gate's
        weights = weights / weights.sum()
        loss = -(target * weights.clamp(min=1e-30).log()).sum()
        loss.backward()
        if loss < lowest:  # which the last is not, where a width has gone to zero
            lowest, best = loss.item(), weights.detach()
        return loss

    with torch.enable_grad():
        optimizer.step(entropy)
    return best


def side_by_side(combine: str, gaussians: int) -> nn.Module:
    """One head of so many Gaussians, side by side and narrow enough to leave no gap."""
    gate = GaussianMixtureAttention(1, gaussians, combine=combine).double()
    with torch.no_grad():
        # In units of the points, and of their deviation.
        gate.offset.copy_(torch.linspace(-2.5, 2.5, gaussians)[None] if gaussians > 1 else torch.zeros(1, 1))
        gate.width.fill_(2 / gaussians if combine == "sum" else 0.5 * gaussians**0.5)
    return gate


def library_heads(heads: int) -> nn.Module:
    """Heads of one Gaussian, each on its slice of the points, as wide as that."""
    gate = GaussianMixtureAttention(heads, 1).double()
    with torch.no_grad():
        gate.width.fill_(1.0)
    return gate


def experiment_heads(heads: int) -> nn.Module:
    """The gate of the experiments, each head on its slice of the points."""
    return GaussianAdaptiveAttention(1, heads, uneven=True, positive=True).double()


# The Importance Factor against what layers predict alone.


def ranks(values: list[float]) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; 0 where one side has no order."""
    first, second = ranks(a), ranks(b)
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


@torch.no_grad()
def shares_of(model: StackClassifier, dataset: Any) -> list[float]:
    """Each layer's share in the Importance Factor of a data set's mean gate."""
    rows = [model.weights(stacks).sum(dim=0) for stacks, _ in batches(dataset, 256, torch.device("cpu"))]
    return layer_shares(importance_factor(torch.stack(rows).sum(dim=0) / len(dataset))).tolist()


def one_layer(data: TaskData, layer: int) -> TaskData:
    """The same examples, of one layer alone."""
    sets = []
    for dataset in (data.train, data.val, data.test):
        stacks, labels = dataset[:]
        sets.append(TensorDataset(stacks[:, layer : layer + 1], labels))
    train, val, test = sets
    return replace(data, train=train, val=val, test=test, options={**data.options, "layers": 1})


@dataclass(frozen=True)
class LayersAlone:
    """One training of a study's GAAM for each seed, and one of the decoder without attention for each layer.

    Args:
        study: of frozen stacks.
        rate: of all trainings.
    """

    study: Study
    rate: float

    async def trials(self, run: Run) -> list[dict[str, Any]]:
        """Of each seed the shares of layers before and after, the accuracy of all layers and of each alone."""
        recipe = replace(self.study.recipe_for(run), lr=self.rate)

        def one(seed: int) -> dict[str, Any]:
            data = self.study.data_for(run, seed)
            torch.manual_seed(seed)
            build = partial(stack_network, "gaam", **data.options)
            before = shares_of(build(), data.val)
            whole = fit(build, TASK, data, recipe, seed=seed, hardware=Hardware(run.device), title="all layers")
            after = shares_of(whole.model, data.val)  # type: ignore[arg-type]  # what `build` made
            alone = []
            for layer in range(data.options["layers"]):
                part = one_layer(data, layer)
                make = partial(stack_network, "none", **part.options)
                title = f"layer {layer + 1} alone"
                done = fit(make, TASK, part, recipe, seed=seed, hardware=Hardware(run.device), title=title)
                alone.append(done.metrics["accuracy"])
            accuracy = whole.metrics["accuracy"]
            return {
                "before": before,
                "after": after,
                "accuracy": accuracy,
                "alone": alone,
                "dummy_baseline": TASK.dummy_baseline(data),
            }

        return await run.trials("layers alone", one, lr=self.rate, **self.study.trial_setting(run, "gaam"))

    async def measure(self, run: Run, which: str) -> Measurement:
        """The rank correlation of each seed, and a table of layers."""
        done = await self.trials(run)
        other = {"with accuracy alone": "alone", "with the untrained gate": "before"}[which]
        values = [rank_correlation(trial["after"], trial[other]) for trial in done]
        columns = ["layer", "share", "share before training", "accuracy alone"]
        mean = {key: np.mean([trial[key] for trial in done], axis=0) for key in ("after", "before", "alone")}
        rows: list[list[Any]] = [
            [layer + 1, *(float(mean[key][layer]) for key in ("after", "before", "alone"))]
            for layer in range(len(mean["after"]))
        ]
        skill = Skill(
            variant="GAAM",
            values=[trial["accuracy"] for trial in done],
            dummy_baseline=[trial["dummy_baseline"] for trial in done],
            higher_is_better=True,
        )
        facts = self.study.facts(run)
        mark = facts.pop("fingerprint")
        return Measurement.mean(
            values,
            seeds=run.seeds,
            unit="rank correlation",
            data=self.study.about,
            fingerprint=mark,
            setting={**facts, "lr": self.rate},
            skills=[skill],
            tables=[Table(caption="Layers, mean over seeds", columns=columns, rows=rows)],
        )

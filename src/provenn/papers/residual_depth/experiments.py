"""What the paper says, and what building it brought to light, measured."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from provenn.evidence import Measurement, Run, Series, Study, Table, measures
from provenn.papers.residual_depth.layers import ResidualTower, enumerate_level, residual_expansion
from provenn.papers.residual_depth.model import mlp_branch
from provenn.papers.residual_depth.studies import (
    branch_variances,
    digits,
    feature_complexity,
    first_level,
    learned_scale,
    norms_over_depth,
    resnet,
    second_to_first,
    smooth_towers,
    tower,
    wrong_digits,
    wrong_labels_fitted,
)
from provenn.training import Recipe

EXPLODES = "the paper says that an unscaled tower's signal explodes, so that it cannot train without norms"

TOWERS = Study(
    "towers on digits",
    "image-classification",
    data=digits,
    variants={
        "one": ("unscaled", ("one", 50, 32)),
        "inverse": ("1/n", ("inv_depth", 50, 32)),
        "sqrt": ("1/√n", ("inv_sqrt_depth", 50, 32)),
        "skipinit": ("SkipInit", ("skipinit", 50, 32)),
        "fixup": ("Fixup", ("fixup", 50, 32)),
        "batchnorm": ("BatchNorm", ("batchnorm", 50, 32)),
        "larger": ("n^−0.4", (f"const({50**-0.4:.4g})", 50, 32)),
        "shallow": ("SkipInit, 10 modules", ("skipinit", 10, 32)),
    },
    build=tower,
    recipe=Recipe(epochs=10, batch_size=100, optimizer="sgd", schedule="cosine"),
    lrs=(0.003, 0.01, 0.03, 0.1, 0.3),
    probes={
        "feature_complexity": feature_complexity,
        "first_level": first_level,
        "second_to_first_level": second_to_first,
        "learned_scale": learned_scale,
    },
    about="digits (scikit-learn), 8×8 pixels",
    kind="join",
    setting={"modules": 50, "width": 32, "branch": "linear, ReLU, linear"},
)

THOUSAND = Study(
    "a thousand modules on digits",
    "image-classification",
    data=digits,
    variants={
        "one": ("unscaled", ("one", 1000, 16)),
        "inverse": ("1/n", ("inv_depth", 1000, 16)),
    },
    build=tower,
    recipe=Recipe(epochs=2, batch_size=100, optimizer="sgd", schedule="cosine"),
    lrs=(0.01, 0.03, 0.1, 0.3, 1.0),
    about="digits (scikit-learn), 8×8 pixels",
    kind="join",
    setting={"modules": 1000, "width": 16},
)

CONVOLUTIONS = Study(
    "ResNet-110 on digits",
    "image-classification",
    data=digits,
    variants={"one": ("unscaled", "one"), "sqrt": ("1/√n", "inv_sqrt_depth")},
    build=resnet,
    recipe=Recipe(epochs=3, batch_size=100, optimizer="sgd", schedule="cosine"),
    lrs=(0.01, 0.03, 0.1, 0.3, 1.0),
    about="digits (scikit-learn), 8×8 pixels",
    kind="join",
    setting={"modules": 54, "channels": [8, 16, 32]},
)

WRONG_LABELS = Study(
    "wrong labels",
    "image-classification",
    data=wrong_digits,
    variants={"inverse": ("1/n", ("inv_depth", 50, 32)), "sqrt": ("1/√n", ("inv_sqrt_depth", 50, 32))},
    build=tower,
    recipe=Recipe(epochs=30, batch_size=100, optimizer="sgd", schedule="cosine"),
    lrs=(0.01, 0.03, 0.1, 0.3),
    probes={"wrong_labels_fitted": wrong_labels_fitted},
    about="digits (scikit-learn), 20 % of the training labels moved to another class; tested on right ones",
    kind="join",
    setting={"modules": 50, "width": 32},
    note="The rate of each join is the one that fits the training labels best.",
)

EXPERIMENTS = {
    "norm_needed": TOWERS.against("batchnorm", "one", may_guess=EXPLODES),
    "mlp_without_norm": TOWERS.against("sqrt", "one", may_guess=EXPLODES, shown=TOWERS.variants),
    "skipinit_trains": TOWERS.against("skipinit", "one", may_guess=EXPLODES),
    "fixup_trains": TOWERS.against("fixup", "one", may_guess=EXPLODES),
    "learned_scale": TOWERS.against("skipinit", "shallow", metric="learned_scale", ratio=True),
    "thousand_inverse": THOUSAND.against("inverse", "one", may_guess=EXPLODES),
    "cnn_without_norm": CONVOLUTIONS.against("sqrt", "one", may_guess=EXPLODES),
    "sqrt_beats_inverse": TOWERS.against("sqrt", "inverse"),
    "inverse_below_norm": TOWERS.against("inverse", "batchnorm"),
    "capacity": TOWERS.against(
        "inverse", "sqrt", metric="feature_complexity", ratio=True, shown=["larger", "batchnorm"]
    ),
    "complexity_falls": TOWERS.against("larger", "sqrt", metric="feature_complexity", ratio=True),
    "noise": WRONG_LABELS.against("inverse", "sqrt", metric="wrong_labels_fitted"),
    "noise_accuracy": WRONG_LABELS.against("inverse", "sqrt"),
    "first_level_inverse": TOWERS.figure("inverse", metric="first_level"),
    "higher_levels_sqrt": TOWERS.figure("sqrt", metric="second_to_first_level"),
}

LAMBDAS = (0.1, 0.05, 0.025, 0.0125)
DRAWS = 8  # initialisations that are averaged within a seed where one alone is noisy


def _slope(x: Sequence[float | int], y: Sequence[float]) -> float:
    """The exponent of y in x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@measures("theorem")
def theorem(run: Run) -> Measurement:
    rows: list[list[str | float | int | None]] = []
    series = []
    axes: dict[str, Any] = {"plot": "what the formula leaves", "x_label": "λ", "y_label": "‖T − second order‖"}
    for kind, (modules, dim, axis, x) in smooth_towers().items():
        towers = [ResidualTower(modules, f"const({value})", dim=dim, channel_dim=axis) for value in LAMBDAS]
        remainders = [residual_expansion(tower, x, 2).remainders()[2] for tower in towers]
        rows.append([kind, *remainders, _slope(LAMBDAS[-2:], remainders[-2:])])
        series.append(Series(name=kind, x=list(LAMBDAS), y=remainders, log="xy", **axes))
    table = Table(caption="‖R₂‖ and its exponent in λ", columns=["modules", *map(str, LAMBDAS), "exponent"], rows=rows)
    cubic = all(abs(float(row[-1] or 0) - 3) < 0.15 for row in rows)
    return Measurement.holds(cubic, "the remainder goes as λ³", series=series, tables=[table])


@measures("ensemble_grows")
def ensemble_grows(run: Run) -> Measurement:
    torch.manual_seed(0)
    modules = [mlp_branch(6, activation="tanh").double() for _ in range(7)]
    x = torch.randn(3, 6).double()
    sums, rows = True, []
    for n in range(1, 8):
        deep = ResidualTower(modules[:n], "const(0.3)", dim=6)
        levels = residual_expansion(deep, x, 2).levels
        sums &= all(torch.allclose(levels[k], enumerate_level(deep, x, k)) for k in range(3))
        rows.append([n, *(len(list(itertools.combinations(range(n), k))) for k in range(4)), 2**n])
    columns = ["modules", "level 0", "level 1", "level 2", "level 3", "all paths"]
    table = Table(caption="Chains of modules", columns=columns, rows=rows)
    return Measurement.holds(sums, "each level is the sum over its chains, listed one by one", tables=[table])


async def _norms(run: Run, policy: str) -> tuple[tuple[int, ...], list[list[float]]]:
    depths = (5, 10) if run.smoke else (5, 10, 20, 50, 100, 200)
    question = {"policy": policy, "modules": list(depths), "width": 32}
    return depths, await run.trials(f"norms, {policy}", lambda seed: norms_over_depth(policy, depths, seed), **question)


async def _growth_lines(run: Run) -> list[Series]:
    axes: dict[str, Any] = {
        "plot": "norm of the output at the start",
        "x_label": "modules",
        "y_label": "‖T(x)‖/‖x‖",
        "log": "xy",
    }
    lines = {"one": "unscaled", "inv_sqrt_depth": "1/√n", "inv_depth": "1/n"}
    return [Series.over_seeds(label, *await _norms(run, policy), **axes) for policy, label in lines.items()]


@measures("explosion")
async def explosion(run: Run) -> Measurement:
    depths, norms = await _norms(run, "one")
    factors = [math.exp(np.polyfit(depths, 2 * np.log(row), 1)[0]) for row in norms]
    setting = {"modules": list(depths), "width": 32, "branch": "linear, ReLU, linear, He-normal"}
    return Measurement.mean(
        factors, seeds=run.seeds, unit="× energy a module", setting=setting, series=await _growth_lines(run)
    )


async def _largest_norm(run: Run, policy: str) -> Measurement:
    depths, norms = await _norms(run, policy)
    setting = {"modules": list(depths), "width": 32}
    return Measurement.mean([max(row) for row in norms], seeds=run.seeds, unit="× norm at most", setting=setting)


@measures("bounded_inverse")
async def bounded_inverse(run: Run) -> Measurement:
    return await _largest_norm(run, "inv_depth")


@measures("bounded_sqrt")
async def bounded_sqrt(run: Run) -> Measurement:
    return await _largest_norm(run, "inv_sqrt_depth")


@measures("batchnorm_branch")
async def batchnorm_branch(run: Run) -> Measurement:
    depth, first = (20, 4) if run.smoke else (100, 4)

    def exponent(seed: int) -> float:
        ratios = torch.stack([branch_variances(depth, seed * DRAWS + draw) for draw in range(DRAWS)]).mean(0)
        return _slope(range(first + 1, depth + 1), ratios[first:].tolist())

    setting = {"modules": depth, "width": 32, "draws": DRAWS, "fitted from module": first + 1}
    exponents = await run.trials("variance of batch-norm branches", exponent, **setting)
    return Measurement.mean(exponents, seeds=run.seeds, unit="exponent of l", setting=setting)

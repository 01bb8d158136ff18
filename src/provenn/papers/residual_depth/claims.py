"""What the paper says, and what building it brought to light, measured."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from provenn import bench
from provenn.evidence import Measurement, Run, Series, Table, measures
from provenn.evidence.interval import student
from provenn.tasks import fingerprint

from .growth import growth_study, joined
from .layers import (
    ResidualTower,
    branches,
    chain,
    enumerate_chains,
    enumerate_level,
    fold,
    geometric_complexity,
    level_terms,
    path_lengths,
    residual_expansion,
)
from .model import CausalAttention, ResidualMLP, mlp_branch
from .studies import PRECISIONS, cnn_study, digits, in_precision, mlp_study, precision_study, text_study
from .sweep import cross_entropy
from .text import byte_frequency_loss, standard_library

Rows = list[list[str | float | int | None]]

LAMBDAS = (0.1, 0.05, 0.025, 0.0125)
DRAWS = 8  # initialisations that are averaged within a seed where one alone is noisy
DIGITS = "scikit-learn digits, 1000 to train, 200 to validate, 597 to test"
TEXT = "source text of Python's standard library, as bytes"
NAMES = {
    "one": "unscaled",
    "inv_depth": "1/n",
    "inv_sqrt_depth": "1/√n",
    "skipinit": "SkipInit",
    "fixup": "Fixup",
    "batchnorm": "BatchNorm",
    "layernorm": "LayerNorm",
}

# The theorem


def _mlp_blocks(activation: str = "tanh", n: int = 8, dim: int = 6) -> list[nn.Module]:
    return [mlp_branch(dim, activation=activation).double() for _ in range(n)]


def _smooth_towers() -> dict[str, tuple[list[nn.Module], int, int, Tensor]]:
    """Blocks, width, channel axis and input of one tower of each kind, in double precision."""
    torch.manual_seed(0)
    convolutions: list[nn.Module] = [
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GELU(), nn.Conv2d(3, 3, 3, padding=1)).double()
        for _ in range(8)
    ]
    attention: list[nn.Module] = [CausalAttention(8, 2).double() for _ in range(8)]
    return {
        "MLP": (_mlp_blocks(), 6, -1, torch.randn(3, 6).double()),
        "convolution": (convolutions, 3, 1, torch.randn(2, 3, 6, 6).double()),
        "attention": (attention, 8, -1, torch.randn(2, 6, 8).double()),
    }


def _remainders(blocks: Sequence[nn.Module], dim: int, axis: int, x: Tensor, order: int) -> list[float]:
    towers = [ResidualTower(blocks, f"const({value})", dim=dim, channel_dim=axis) for value in LAMBDAS]
    return [residual_expansion(tower, x, order).remainders()[order] for tower in towers]


def _slope(x: Sequence[float | int], y: Sequence[float]) -> float:
    """The exponent of y in x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@measures("theorem")
def theorem(run: Run) -> Measurement:
    rows: Rows = []
    series, exponents = [], []
    for name, (blocks, dim, axis, x) in _smooth_towers().items():
        remainders = _remainders(blocks, dim, axis, x, 2)
        exponents.append(_slope(LAMBDAS[-2:], remainders[-2:]))
        rows.append([name, *remainders, exponents[-1]])
        series.append(_line(name, LAMBDAS, remainders, "what the formula leaves", "λ", "‖T − second order‖", "xy"))
    holds = all(abs(exponent - 3) < 0.15 for exponent in exponents)
    table = Table(caption="‖R₂‖ and its exponent in λ", columns=["modules", *map(str, LAMBDAS), "exponent"], rows=rows)
    return Measurement.holds(holds, "the remainder goes as λ³", series=series, tables=[table])


@measures("third_order")
def third_order(run: Run) -> Measurement:
    torch.manual_seed(0)
    blocks, x = _mlp_blocks(), torch.randn(3, 6).double()
    whole, chains = [], []
    for value in LAMBDAS:
        tower = ResidualTower(blocks, f"const({value})", dim=6)
        expansion = residual_expansion(tower, x, 3)
        without = expansion.partial_sums()[2] + enumerate_chains(tower, x, 3)
        whole.append(expansion.remainders()[3])
        chains.append((expansion.output - without).norm().item())
    exponents = _slope(LAMBDAS, whole), _slope(LAMBDAS, chains)
    series = [
        _line("chains and curvature", LAMBDAS, whole, "third order", "λ", "remainder", "xy"),
        _line("chains alone", LAMBDAS, chains, "third order", "λ", "remainder", "xy"),
    ]
    detail = f"exponent {exponents[0]:.2f} with the curvature, {exponents[1]:.2f} without"
    return Measurement.holds(abs(exponents[0] - 4) < 0.2 and abs(exponents[1] - 3) < 0.2, detail, series=series)


@measures("relu_kinks")
def relu_kinks(run: Run) -> Measurement:
    def exponent(seed: int) -> float:
        torch.manual_seed(seed)
        blocks = _mlp_blocks("relu", dim=32)
        return _slope(LAMBDAS, _remainders(blocks, 32, -1, torch.randn(512, 32).double(), 2))

    return _figure(run, run.trials("exponent of R₂ with ReLU", exponent), unit="exponent of λ")


def _truncation(run: Run, policy: str) -> tuple[list[list[float]], Series]:
    """What each order leaves of a network's contribution ‖T(x) − x‖, for 64 tanh modules, and a line of it."""

    def errors(seed: int) -> list[float]:
        torch.manual_seed(seed)
        tower = ResidualTower(_mlp_blocks(n=64, dim=16), policy, dim=16)
        expansion = residual_expansion(tower, torch.randn(16, 16).double(), 14)
        added = (expansion.output - expansion.levels[0]).norm().item()
        return [remainder / added for remainder in expansion.remainders()]

    found = run.trials(f"error by order, {policy}", errors)
    plot, mean = "error of the truncated network, n = 64", np.mean(found, axis=0).tolist()
    return found, _line(NAMES[policy], range(15), mean, plot, "order", "relative error", "y")


@measures("network")
def network(run: Run) -> Measurement:
    found, line = _truncation(run, "inv_depth")
    return Measurement.exact(max(errors[-1] for errors in found), unit="relative error", series=[line])


@measures("sqrt_series")
def sqrt_series(run: Run) -> Measurement:
    found, line = _truncation(run, "inv_sqrt_depth")
    lines = [line, _truncation(run, "inv_depth")[1]]
    grown = [math.log10(errors[14] / errors[2]) for errors in found]
    return _figure(run, grown, unit="powers of ten from order 2 to 14", series=lines)


@measures("ensemble_grows")
def ensemble_grows(run: Run) -> Measurement:
    torch.manual_seed(0)
    blocks, x = _mlp_blocks(n=7), torch.randn(3, 6).double()
    counts: Rows = []
    right = True
    for n in range(1, 8):
        tower = ResidualTower(blocks[:n], "const(0.3)", dim=6)
        levels = residual_expansion(tower, x, 2).levels
        right &= all(torch.allclose(levels[k], enumerate_level(tower, x, k)) for k in range(3))
        counts.append([n, *(math.comb(n, k) for k in range(4)), 2**n])
    columns = ["modules", "level 0", "level 1", "level 2", "level 3", "all paths"]
    table = Table(caption="Chains of modules", columns=columns, rows=counts)
    return Measurement.holds(right, "the levels are sums over C(n, k) chains, at every depth", tables=[table])


@measures("zero_scale")
def zero_scale(run: Run) -> Measurement:
    torch.manual_seed(0)
    n, x = 6, torch.randn(3, 6).double()
    grown = [ResidualTower(_mlp_blocks(n=n), "const(0.3)", dim=6)]
    for _ in range(3):
        grown.append(joined(grown[-1], ResidualTower(_mlp_blocks(n=1), "skipinit(0)", dim=6)))
    with torch.no_grad():
        unchanged = all(torch.equal(tower(x), grown[0](x)) for tower in grown)
        grown[1].policies[-1].alpha.fill_(0.3)  # type: ignore[operator, union-attr]
    right, fs = True, branches(grown[1])
    rows: Rows = []
    for k in (1, 2):
        before, after = (residual_expansion(tower, x, k).levels[k] for tower in grown[:2])
        new = [path for path in itertools.combinations(range(n + 1), k) if n in path]
        rows.append([k, math.comb(n, k), math.comb(n + 1, k), len(new)])
        right &= torch.allclose(after - before, torch.stack([chain(fs, x, path) for path in new]).sum(0))
        right &= len(new) == math.comb(n, k - 1)
    columns = ["level", f"chains of {n} modules", f"of {n + 1}", "through the new one"]
    table = Table(caption="What one more module adds", columns=columns, rows=rows)
    return Measurement.holds(unchanged and right, "unchanged at 0, C(n, k − 1) chains more once raised", tables=[table])


@measures("level_three_terms")
def level_three_terms(run: Run) -> Measurement:
    return Measurement.exact(level_terms(50, 3) - math.comb(50, 3), unit="terms beyond C(50, 3)")


@measures("linear_tower")
def linear_tower(run: Run) -> Measurement:
    torch.manual_seed(0)
    n, x = 8, torch.randn(3, 6).double()
    blocks = [nn.Linear(6, 6, bias=False).double() for _ in range(n)]
    tower = ResidualTower(blocks, "const(0.7)", dim=6)
    expansion = residual_expansion(tower, x, n)
    chains = torch.stack([enumerate_chains(tower, x, k) for k in range(n + 1)]).sum(0)
    worst = max(expansion.remainders()[-1], (expansion.output - chains).norm().item())
    return Measurement.exact(worst / expansion.output.norm().item(), unit="relative error")


@measures("exponential_limit")
def exponential_limit(run: Run) -> Measurement:
    torch.manual_seed(0)
    depths, x = (32, 64, 128, 256, 512), torch.randn(1, 6).double()
    block = nn.Linear(6, 6, bias=False).double()
    limit = x @ torch.matrix_exp(block.weight).T
    with torch.no_grad():
        errors = [(ResidualTower([block] * n, "inv_depth", dim=6)(x) - limit).norm().item() for n in depths]
    line = _line("‖T − exp(A)x‖", depths, errors, "identical linear modules", "n", "error", "xy")
    exponent = _slope(depths, errors)
    return Measurement.holds(abs(exponent + 1) < 0.05, f"the error goes as n^{exponent:.3f}", series=[line])


@measures("order_matters")
def order_matters(run: Run) -> Measurement:
    torch.manual_seed(0)
    first, second = _mlp_blocks(n=2)
    x, value = torch.randn(3, 6).double(), 0.3
    tower = ResidualTower([first, second], f"const({value})", dim=6)
    here, swapped = (residual_expansion(t, x, 2).levels for t in (tower, tower.reordered([1, 0])))
    with torch.no_grad():
        bracket = (
            torch.func.jvp(second, (x,), (first(x),))[1] - torch.func.jvp(first, (x,), (second(x),))[1]
        ) * value**2
    same = torch.allclose(here[1], swapped[1]) and torch.allclose(here[2] - swapped[2], bracket)
    return Measurement.holds(same and bool(bracket.norm() > 0), "level 1 is the same, level 2 differs by the bracket")


@measures("path_lengths")
def lengths_of_paths(run: Run) -> Measurement:
    rows: Rows = []
    holds = True
    for n in (10, 50, 200, 1000):
        for name, value in (("1", 1.0), ("1/√n", n**-0.5), ("1/n", 1 / n)):
            paths = path_lengths([value] * n)
            rows.append([n, name, paths.mean, paths.std, paths.log_total])
            holds &= abs(paths.mean - n * value / (1 + value)) < 1e-6 * n
    columns = ["modules", "λ", "mean length", "standard deviation", "log of all weight"]
    table = Table(caption="Lengths of the paths, weighted by their scales", columns=columns, rows=rows)
    return Measurement.holds(holds, "Binomial(n, λ/(1 + λ))", tables=[table])


@measures("taylor_calls")
def taylor_calls(run: Run) -> Measurement:
    torch.manual_seed(0)
    n, calls = 50, [0]
    tower = ResidualTower(_mlp_blocks(n=n), "inv_sqrt_depth", dim=6)
    for block in tower.blocks:
        block.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    residual_expansion(tower, torch.randn(1, 6).double(), 3)
    rows: Rows = [[k, n if k else 0, k * math.comb(n, k)] for k in range(5)]
    columns = ["order", "calls in Taylor mode", "calls, chain by chain"]
    table = Table(caption=f"Calls of modules for one level, n = {n}", columns=columns, rows=rows)
    return Measurement.exact(calls[0] - n, unit="calls of modules", tables=[table], note="besides the n calls of T")


@measures("fold")
def folding(run: Run) -> Measurement:
    torch.manual_seed(0)
    worst, x = 0.0, torch.randn(16, 32)
    for policy in ("inv_depth", "inv_sqrt_depth", "const(0.1)", "skipinit(0.1)", "layerscale(0.1)"):
        tower = ResidualTower([mlp_branch(32) for _ in range(50)], policy, dim=32)
        with torch.no_grad():
            worst = max(worst, ((fold(tower)(x) - tower(x)).norm() / tower(x).norm()).item())
    return Measurement.exact(worst, unit="relative difference")


@measures("no_parameters")
def no_parameters(run: Run) -> Measurement:
    plain, *scaled = (
        bench.count_parameters(ResidualMLP(64, 10, policy=policy)) for policy in ("one", "inv_depth", "inv_sqrt_depth")
    )
    return Measurement.exact(max(abs(count - plain) for count in scaled), unit="parameters")


@measures("identity_start")
def identity_start(run: Run) -> Measurement:
    torch.manual_seed(0)
    tower, x = ResidualTower(_mlp_blocks(), "skipinit", dim=6), torch.randn(4, 6).double()
    y = tower(x)
    y.square().sum().backward()
    scalars = all(bool(join.alpha.grad != 0) for join in tower.policies)  # type: ignore[union-attr]
    weights = all(not bool(p.grad.any()) for p in tower.blocks.parameters() if p.grad is not None)
    return Measurement.holds(torch.equal(y, x) and scalars and weights, "T = 1; gradients reach the scalars alone")


@measures("lesion_order")
def lesion_order(run: Run) -> Measurement:
    torch.manual_seed(0)
    blocks, x, lost = _mlp_blocks(), torch.randn(4, 6).double(), []
    with torch.no_grad():
        for value in LAMBDAS:
            tower = ResidualTower(blocks, f"const({value})", dim=6)
            lost.append((tower.without(3)(x) - tower(x) + value * blocks[3](x)).norm().item())
    exponent = _slope(LAMBDAS[-2:], lost[-2:])
    return Measurement.holds(abs(exponent - 2) < 0.1, f"beyond −λF the change goes as λ^{exponent:.2f}")


@measures("linear_complexity")
def linear_complexity(run: Run) -> Measurement:
    torch.manual_seed(0)
    linear = nn.Linear(8, 5).double()
    exact = linear.weight.square().sum().item()
    return Measurement.exact(abs(geometric_complexity(linear, torch.randn(9, 8).double()) / exact - 1))


# Growth of the signal


def _energies(policy: str, depths: Sequence[int], seed: int) -> list[float]:
    """‖T_n(x)‖²/‖x‖² at the start, He two-layer ReLU branches of width 32, in double precision."""
    energies = []
    for n in depths:
        torch.manual_seed(seed)
        tower = ResidualTower([mlp_branch(32) for _ in range(n)], policy, dim=32).double()
        x = torch.randn(64, 32).double()
        with torch.no_grad():
            energies.append((tower(x).square().sum() / x.square().sum()).item())
    return energies


def _growth(run: Run, policy: str) -> tuple[list[int], list[list[float]]]:
    depths = [5, 10] if run.smoke else [5, 10, 20, 50, 100, 200]
    values = run.trials(f"growth, {policy}", lambda seed: _energies(policy, depths, seed), depths=depths)
    return depths, [[energy**0.5 for energy in row] for row in values]


def _growth_line(run: Run, policy: str, plot: str) -> Series:
    depths, norms = _growth(run, policy)
    low, high = np.min(norms, axis=0).tolist(), np.max(norms, axis=0).tolist()
    return Series(
        name=NAMES.get(policy, policy), x=[float(n) for n in depths], y=np.exp(np.mean(np.log(norms), 0)).tolist(),
        low=low, high=high, plot=plot, x_label="modules", y_label="‖T(x)‖/‖x‖", log="xy",
    )  # fmt: skip


@measures("explosion")
def explosion(run: Run) -> Measurement:
    depths, norms = _growth(run, "one")
    rates = [float(np.exp(np.polyfit(depths, 2 * np.log(row), 1)[0])) for row in norms]
    series = [_growth_line(run, policy, "norm of the output at the start") for policy in ("one", "inv_sqrt_depth")]
    series += [_growth_line(run, policy, "the same, of joins that bound it") for policy in NAMES if policy != "one"]
    return _figure(run, rates, unit="× energy a module", series=series)


@measures("bounded_sqrt")
def bounded_sqrt(run: Run) -> Measurement:
    return _figure(run, [max(row) for row in _growth(run, "inv_sqrt_depth")[1]], unit="× norm at most")


@measures("bounded_inverse")
def bounded_inverse(run: Run) -> Measurement:
    return _figure(run, [max(row) for row in _growth(run, "inv_depth")[1]], unit="× norm at most")


@measures("overflow")
def overflow(run: Run) -> Measurement:
    torch.manual_seed(0)
    blocks = [mlp_branch(32) for _ in range(200)]
    with torch.no_grad():
        stream = ResidualTower(blocks, "one", dim=32).stream(torch.randn(64, 32))
    first = next((i for i, state in enumerate(stream) if not state.isfinite().all()), len(stream))
    return Measurement.exact(first, unit="modules until float32 overflows")


@measures("overflow_precision")
def overflow_precision(run: Run) -> Measurement:
    rows: Rows = []
    first: dict[tuple[str, str], int | None] = {}
    for policy in ("one", "inv_sqrt_depth", "inv_depth"):
        for name in PRECISIONS:
            torch.manual_seed(0)
            tower = ResidualTower([mlp_branch(32) for _ in range(200)], policy, dim=32)
            with torch.no_grad(), in_precision(name, "cpu"):
                stream = tower.stream(torch.randn(64, 32))
            lost = [i for i, state in enumerate(stream) if not state.isfinite().all()]
            first[policy, name] = lost[0] if lost else None
            rows.append([NAMES[policy], name, first[policy, name]])
    single, brain, half = (first["one", name] for name in PRECISIONS)
    holds = single is not None and single == brain and half is not None and half < single / 4
    holds &= all(at is None for (policy, _), at in first.items() if policy != "one")
    table = Table(caption="200 modules on a CPU, autocast", columns=["join", "precision", "overflows at"], rows=rows)
    return Measurement.holds(holds, f"unscaled: {single}, {brain} and {half} modules", tables=[table])


@measures("overflow_gpu")
def overflow_gpu(run: Run) -> Measurement:
    if not run.device.startswith("cuda"):
        return Measurement.not_measured("a CUDA GPU")
    sizes, steps = ([1], 2) if run.smoke else ([18, 200], 20)
    names, rows, right = ("float32", "bfloat16"), [], {}
    for policy in ("one", "inv_depth", "inv_sqrt_depth", "skipinit", "fixup", "batchnorm"):
        for blocks, name in itertools.product(sizes, names):
            setting: dict[str, Any] = {"policy": policy, "blocks": blocks, "precision": name, "steps": steps}
            found = run.trials(
                f"digits, ResNet-{6 * blocks + 2}, {policy}, {name}",
                partial(precision_study, device=run.device, **setting),
                **setting,
            )
            right[policy, blocks, name] = _column(found, "accuracy")
            rows.append([NAMES[policy], 6 * blocks + 2, name, found[0]["overflows_at"], _mean(found, "accuracy")])
    worst, best = (
        [choice(pair) for pair in zip(*(right[policy, sizes[-1], name] for name in names), strict=True)]
        for policy, choice in (("inv_sqrt_depth", min), ("one", max))
    )
    columns = ["join", "layers", "precision", "overflows at module", "accuracy on its batch"]
    table = Table(caption=f"CIFAR ResNets on 28 × 28 digits, {steps} steps", columns=columns, rows=rows)
    return Measurement.paired(worst, best, seeds=run.seeds, unit="accuracy, training", data=DIGITS, tables=[table])


@measures("batchnorm_branch")
def batchnorm_branch(run: Run) -> Measurement:
    depths = range(1, 101)

    def exponent(seed: int) -> float:
        torch.manual_seed(seed)
        ratios = []
        for _ in range(DRAWS):
            tower = ResidualTower([mlp_branch(32) for _ in depths], "batchnorm", dim=32)
            with torch.no_grad():
                stream = torch.stack(tower.stream(torch.randn(256, 32)))
            ratios.append((stream[1:] - stream[:-1]).var((1, 2)) / stream[:-1].var((1, 2)))
        return _slope(depths[4:], torch.stack(ratios).mean(0)[4:].tolist())

    return _figure(run, run.trials("variance of batch-norm branches", exponent), unit="exponent of l")


def _update_exponent(run: Run, policy: str) -> Measurement:
    """How the change of T by one small step of gradient descent depends on depth."""
    depths = (16, 32, 64, 128) if not run.smoke else (4, 8)

    def change(n: int, seed: int) -> float:
        torch.manual_seed(seed)
        (x, y), _, _ = digits()
        model, rate = ResidualMLP(64, 10, depth=n, policy=policy), 1e-4
        model.encoder.requires_grad_(False), model.decoder.requires_grad_(False)
        before = model(x[:200])
        trained = [p for p in model.tower.parameters() if p.requires_grad]
        grads = torch.autograd.grad(cross_entropy(before, y[:200]), trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, grads):
                parameter.sub_(rate * gradient)
            return ((model(x[:200]) - before).norm() / rate).item()

    def exponent(seed: int) -> float:
        changes = [[change(n, seed * DRAWS + draw) for draw in range(DRAWS)] for n in depths]
        return _slope(depths, np.exp(np.mean(np.log(changes), axis=1)).tolist())

    values = run.trials(f"change a step, {policy}", exponent, depths=list(depths))
    return _figure(run, values, unit="exponent of n", data=DIGITS)


@measures("update_sqrt")
def update_sqrt(run: Run) -> Measurement:
    return _update_exponent(run, "inv_sqrt_depth")


@measures("update_inverse")
def update_inverse(run: Run) -> Measurement:
    return _update_exponent(run, "inv_depth")


# Training without normalisation


def _mlp(run: Run, policy: str, **changes: Any) -> list[dict[str, Any]]:
    """MLP towers on the digits, one outcome a seed; 50 modules unless told otherwise."""
    setting: dict[str, Any] = {"depth": 50, "width": 32, "epochs": 8, "lrs": [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001]}
    setting |= changes
    if run.smoke:
        setting |= {"depth": min(setting["depth"], 6), "width": 8, "epochs": 1, "lrs": [0.03]}
    return run.trial(
        f"digits, MLP, {policy}",
        lambda: mlp_study(policy, run.seeds, **setting),
        policy=policy,
        seeds=list(run.seeds),
        **setting,
    )


def _cnn(run: Run, policy: str) -> list[dict[str, Any]]:
    setting: dict[str, Any] = {"blocks": 18, "width": 4, "epochs": 2, "batch_size": 50}
    setting |= {"lrs": [3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003]}
    if run.smoke:
        setting |= {"blocks": 1, "epochs": 1, "lrs": [0.1]}
    return run.trial(
        f"digits, CNN, {policy}",
        lambda: cnn_study(policy, run.seeds, **setting),
        policy=policy,
        seeds=list(run.seeds),
        **setting,
    )


def _text(run: Run, policy: str, **changes: Any) -> list[dict[str, Any]]:
    setting: dict[str, Any] = {"layers": 12, "dim": 32, "tokens": 32, "batch_size": 12}
    setting |= {"steps": 40, "lrs": [0.03, 0.01, 0.003, 0.001]} | changes
    if run.smoke:
        setting |= {"layers": 1, "steps": 3}
    return run.trial(
        f"text, Transformer, {policy}",
        lambda: text_study(policy, run.seeds, **setting),
        policy=policy,
        seeds=list(run.seeds),
        **setting,
    )


Study = Callable[..., list[dict[str, Any]]]


def _against(
    run: Run, study: Study, system: str, baseline: str, key: str, *, unit: str, 
    others: Sequence[str] = (), **changes: Any,
) -> Measurement:  # fmt: skip
    """Two policies, each at its tuned learning rate, seed by seed."""
    shown = dict.fromkeys((system, baseline, *others))
    outcomes = {policy: study(run, policy, **changes) for policy in shown}
    text = study is _text
    return Measurement.paired(
        _column(outcomes[system], key),
        _column(outcomes[baseline], key),
        seeds=run.seeds,
        unit=unit,
        data=TEXT if text else DIGITS,
        fingerprint=fingerprint(*standard_library()) if text else fingerprint(*digits()[0]),
        setting={"system": system, "baseline": baseline, **changes},
        series=[line for line in (_curve(policy, outcomes[policy]) for policy in shown) if len(line.x) > 1],
        tables=[_summary(outcomes)],
    )


def _column(outcomes: list[dict[str, Any]], key: str) -> list[float]:
    return [float(outcome[key]) for outcome in outcomes]


def _curve(policy: str, outcomes: list[dict[str, Any]]) -> Series:
    """Loss at each step, cut where a seed's network is lost."""
    steps = min(next((i for i, v in enumerate(o["curve"]) if not math.isfinite(v)), len(o["curve"])) for o in outcomes)
    rows = [outcome["curve"][:steps] for outcome in outcomes]
    axes: dict[str, Any] = {"plot": "training loss", "x_label": "step", "y_label": "loss", "log": "y"}
    return Series.over_seeds(NAMES.get(policy, policy), range(steps), rows, **axes)


def _summary(outcomes: dict[str, list[dict[str, Any]]]) -> Table:
    rows: Rows = [
        [
            NAMES.get(policy, policy),
            _mean(found, "accuracy"),
            _mean(found, "loss"),
            ", ".join(f"{o['lr']:g}" for o in found),
            sum(o["diverged"] for o in found),
        ]
        for policy, found in outcomes.items()
    ]
    columns = ["join", "test accuracy", "loss", "learning rate of each seed", "trials that diverged"]
    return Table(caption="Means over seeds, learning rates tuned with as many trials each", columns=columns, rows=rows)


def _mean(outcomes: list[dict[str, Any]], key: str) -> float | None:
    value = sum(_column(outcomes, key)) / len(outcomes)
    return value if math.isfinite(value) else None


@measures("mlp_without_norm")
def mlp_without_norm(run: Run) -> Measurement:
    others = ("inv_depth", "skipinit", "fixup", "batchnorm", "layernorm")
    return _against(run, _mlp, "inv_sqrt_depth", "one", "accuracy", unit="accuracy", others=others)


@measures("clipping")
def clipping(run: Run) -> Measurement:
    clipped, scaled = _mlp(run, "one", clip=1.0, details=False), _mlp(run, "inv_sqrt_depth")
    return Measurement.paired(
        _column(clipped, "accuracy"), _column(scaled, "accuracy"), seeds=run.seeds, unit="accuracy", data=DIGITS,
        setting={"clip": 1.0}, tables=[_summary({"unscaled, clipped": clipped, "inv_sqrt_depth": scaled})],
    )  # fmt: skip


@measures("sqrt_beats_inverse")
def sqrt_beats_inverse(run: Run) -> Measurement:
    return _against(run, _mlp, "inv_sqrt_depth", "inv_depth", "accuracy", unit="accuracy")


@measures("sqrt_fits_better")
def sqrt_fits_better(run: Run) -> Measurement:
    return _against(run, _mlp, "inv_sqrt_depth", "inv_depth", "loss", unit="nats, training")


@measures("inverse_below_norm")
def inverse_below_norm(run: Run) -> Measurement:
    return _against(run, _mlp, "inv_depth", "batchnorm", "accuracy", unit="accuracy")


@measures("skipinit")
def against_skipinit(run: Run) -> Measurement:
    return _against(run, _mlp, "inv_sqrt_depth", "skipinit", "accuracy", unit="accuracy")


@measures("fixup")
def against_fixup(run: Run) -> Measurement:
    return _against(run, _mlp, "inv_sqrt_depth", "fixup", "accuracy", unit="accuracy")


THOUSAND: dict[str, Any] = {"depth": 1000, "width": 16, "epochs": 2, "lrs": [1.0, 0.3, 0.1, 0.03], "details": False}


@measures("thousand_inverse")
def thousand_inverse(run: Run) -> Measurement:
    return _against(run, _mlp, "inv_depth", "one", "accuracy", unit="accuracy", **THOUSAND)


@measures("thousand_sqrt")
def thousand_sqrt(run: Run) -> Measurement:
    return _against(run, _mlp, "inv_sqrt_depth", "one", "accuracy", unit="accuracy", **THOUSAND)


@measures("cnn_without_norm")
def cnn_without_norm(run: Run) -> Measurement:
    others = ("batchnorm", "skipinit")
    return _against(run, _cnn, "inv_sqrt_depth", "one", "accuracy", unit="accuracy", others=others)


@measures("transformer_without_norm")
def transformer_without_norm(run: Run) -> Measurement:
    others = ("inv_depth", "layernorm")
    return _against(run, _text, "inv_sqrt_depth", "one", "accuracy", unit="accuracy of the next byte", others=others)


@measures("transformer_against_norm")
def transformer_against_norm(run: Run) -> Measurement:
    return _against(run, _text, "inv_sqrt_depth", "layernorm", "loss", unit="nats a byte")


DEPTHS = (4, 12, 24, 48)  # layers, each of two modules
SHALLOW_AND_DEEP: dict[str, Any] = {"dim": 16, "batch_size": 8, "lrs": [0.3, 0.1, 0.03, 0.01, 0.003]}
TEXT_JOINS = ("one", "inv_sqrt_depth", "inv_depth", "layernorm")


ByDepth = dict[str, dict[int, list[dict[str, Any]]]]


def _over_depth(run: Run) -> ByDepth:
    """Byte Transformers of 4 to 48 layers: policy, layers, one outcome a seed."""
    return {
        policy: {layers: _text(run, policy, layers=layers, **SHALLOW_AND_DEEP) for layers in DEPTHS}
        for policy in TEXT_JOINS
    }


def _depth_lines(by_policy: ByDepth) -> list[Series]:
    lines = []
    for key, label in (("accuracy", "accuracy of the next byte"), ("loss", "nats a byte")):
        for policy, found in by_policy.items():
            if key == "loss" and policy == "one":
                continue  # its losses, where there are any, are larger by powers of ten
            rows = list(zip(*(_column(found[layers], key) for layers in DEPTHS), strict=True))
            axes: dict[str, Any] = {"plot": f"Transformers over depth: {label}", "x_label": "layers", "y_label": label}
            lines.append(Series.over_seeds(NAMES[policy], DEPTHS, rows, log="x", **axes))
    counts = [byte_frequency_loss()] * len(DEPTHS)
    axes = {"plot": "Transformers over depth: nats a byte", "x_label": "layers", "y_label": "nats a byte"}
    return [*lines, Series(name="frequencies of bytes", x=list(map(float, DEPTHS)), y=counts, log="x", **axes)]


def _deepest(run: Run, system: str, baseline: str, key: str, *, unit: str) -> Measurement:
    """Two joins at the largest depth; `baseline` may be the frequencies of bytes, which no join enters."""
    found, deepest = _over_depth(run), DEPTHS[-1]
    if baseline == "frequencies of bytes":
        other = [byte_frequency_loss()] * len(run.seeds)
    else:
        other = _column(found[baseline][deepest], key)
    tables = [
        _summary({policy: by_depth[layers] for policy, by_depth in found.items()}).model_copy(
            update={"caption": f"{layers} layers, {2 * layers} modules: means over seeds, as many trials each"}
        )
        for layers in DEPTHS
    ]
    return Measurement.paired(
        _column(found[system][deepest], key), other, seeds=run.seeds, unit=unit, data=TEXT,
        fingerprint=fingerprint(*standard_library()), series=_depth_lines(found), tables=tables,
        setting={"system": system, "baseline": baseline, "layers": deepest, **SHALLOW_AND_DEEP},
    )  # fmt: skip


@measures("transformer_deep")
def transformer_deep(run: Run) -> Measurement:
    return _deepest(run, "inv_sqrt_depth", "one", "accuracy", unit="accuracy of the next byte")


@measures("transformer_deep_learns")
def transformer_deep_learns(run: Run) -> Measurement:
    return _deepest(run, "inv_sqrt_depth", "frequencies of bytes", "loss", unit="nats a byte")


@measures("transformer_deep_against_norm")
def transformer_deep_against_norm(run: Run) -> Measurement:
    return _deepest(run, "inv_sqrt_depth", "layernorm", "loss", unit="nats a byte")


@measures("transformer_deep_inverse")
def transformer_deep_inverse(run: Run) -> Measurement:
    return _deepest(run, "inv_depth", "inv_sqrt_depth", "loss", unit="nats a byte")


# Modules added to a trained tower


def _grown(run: Run, policy: str) -> list[dict[str, Any]]:
    depth = 10
    setting: dict[str, Any] = {"depth": depth, "width": 16, "base_epochs": 4, "base_lrs": [1.0, 0.3, 0.1, 0.03]}
    setting |= {"scale": {"inv_depth": 1 / depth, "inv_sqrt_depth": depth**-0.5}[policy]}
    setting |= {"modules": 8, "epochs": 8, "lrs": [3.0, 1.0, 0.3, 0.1, 0.03]}
    if run.smoke:
        setting |= {"depth": 2, "base_epochs": 1, "base_lrs": [0.1], "modules": 2, "epochs": 1, "lrs": [0.3]}
    return run.trials(f"modules added, {policy}", lambda seed: growth_study(seed, **setting), **setting)


def _judged(run: Run, policy: str, ends: Callable[[dict[str, Any]], tuple[float, float]], unit: str) -> Measurement:
    """Two figures of each seed's growth against each other, with all that the claims on added modules draw and list."""
    lines, rows = [], []
    grown = {name: _grown(run, name) for name in ("inv_sqrt_depth", "inv_depth")}
    for name, found in grown.items():
        added = range(len(found[0]["loss"]))
        axes: dict[str, Any] = {"x_label": "modules added", "y_label": "test loss, nats"}
        axes["plot"] = "modules added to a frozen tower"
        losses, one = [o["loss"] for o in found], [[o["loss"][0], o["one"]] for o in found]
        lines.append(Series.over_seeds(NAMES[name], added, losses, **axes))
        lines.append(Series.over_seeds(f"{NAMES[name]}, one module trained as long", [0, 1], one, **axes))
        axes |= {"plot": f"a grown tower of {NAMES[name]}, cut off at each order", "log": "y"}
        for order in range(len(found[0]["truncated"])):
            truncated = [o["truncated"][order] for o in found]
            lines.append(Series.over_seeds(f"order {order}", added, truncated, **axes))
        lines.append(Series.over_seeds("network", added, losses, **axes))
        for count in added:
            means = (np.mean([o[key][count] for o in found]).item() for key in ("loss", "training", "accuracy"))
            rows.append([NAMES[name], count, *means])
    columns = ["join of the frozen tower", "modules added", "test loss", "training loss", "test accuracy"]
    table = Table(caption="Modules added one by one at scale 0, means over seeds", columns=columns, rows=rows)
    return Measurement.paired(
        *zip(*map(ends, grown[policy]), strict=True), seeds=run.seeds, unit=unit, data=DIGITS,
        fingerprint=fingerprint(*digits()[0]), series=lines, tables=[table],
    )  # fmt: skip


@measures("modules_added")
def modules_added(run: Run) -> Measurement:
    return _judged(run, "inv_sqrt_depth", lambda o: (o["loss"][-1], o["loss"][0]), "nats, test")


@measures("modules_against_one")
def modules_against_one(run: Run) -> Measurement:
    return _judged(run, "inv_sqrt_depth", lambda o: (o["loss"][-1], o["one"]), "nats, test")


@measures("modules_levels")
def modules_levels(run: Run) -> Measurement:
    def left(outcome: dict[str, Any], at: int) -> float:
        return outcome["truncated"][3][at] - outcome["loss"][at]

    return _judged(run, "inv_depth", lambda o: (left(o, -1), left(o, 0)), "nats that order 3 leaves, after and before")


@measures("learned_scale")
def learned_scale(run: Run) -> Measurement:
    depths = (10, 25, 50)
    found = {n: _column(_mlp(run, "skipinit", **({} if n == 50 else {"depth": n})), "scale") for n in depths}
    exponents = [_slope(depths, [found[n][i] for n in depths]) for i in range(len(run.seeds))]
    rows: Rows = [[n, sum(found[n]) / len(found[n]), n**-0.5, 1 / n] for n in depths]
    table = Table(caption="SkipInit after training", columns=["modules", "mean |α|", "1/√n", "1/n"], rows=rows)
    return _figure(run, exponents, unit="exponent of n", data=DIGITS, tables=[table])


# Capacity


def _by_scale(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Trained towers of 50 modules over scales n^−1.5 … n^−0.25."""
    n, exponents = 50, (-1.5, -1.0, -0.75, -0.5, -0.4, -0.25)
    names = {-1.0: "inv_depth", -0.5: "inv_sqrt_depth"}
    return {f"n^{e:g}": _mlp(run, names.get(e, f"const({n**e:.4g})")) for e in exponents}


@measures("capacity")
def capacity(run: Run) -> Measurement:
    inverse, root = (_column(_mlp(run, policy), "feature_complexity") for policy in ("inv_depth", "inv_sqrt_depth"))
    return Measurement.ratio(inverse, root, unit="× geometric complexity", seeds=list(run.seeds), data=DIGITS)


@measures("complexity_falls")
def complexity_falls(run: Run) -> Measurement:
    sweep = _by_scale(run)
    values = {name: _column(found, "feature_complexity") for name, found in sweep.items()}
    trained = [name for name, row in values.items() if all(map(math.isfinite, row))]
    scales = [50.0 ** float(name[2:]) for name in trained]
    line = Series.over_seeds(
        "trained features", scales, list(zip(*(values[name] for name in trained), strict=True)),
        plot="geometric complexity over scale", x_label="λ", y_label="geometric complexity", log="xy",
    )  # fmt: skip
    table = Table(
        caption="50 modules, each scale at its tuned learning rate",
        columns=["λ", "complexity of features", "of logits", "test accuracy", "training loss"],
        rows=[
            [name, *(_mean(found, key) for key in ("feature_complexity", "complexity", "accuracy", "loss"))]
            for name, found in sweep.items()
        ],
    )
    return Measurement.ratio(
        values[trained[-1]], values[trained[-2]], unit="× geometric complexity", seeds=list(run.seeds), data=DIGITS,
        setting={"scales": trained[-2:]}, series=[line], tables=[table],
        note="the largest scale that trains with every seed against the one before it",
    )  # fmt: skip


@measures("noise")
def noise(run: Run) -> Measurement:
    changes: dict[str, Any] = {"noise": 0.2, "epochs": 30, "lrs": [1.0, 0.3, 0.1, 0.03, 0.01], "details": False}
    return _against(run, _mlp, "inv_depth", "inv_sqrt_depth", "noise_fit", unit="of flipped labels fitted", **changes)


# Levels after training


def _levels_table(run: Run) -> Table:
    rows: Rows = []
    for policy in ("inv_depth", "inv_sqrt_depth", "skipinit", "fixup"):
        for when, key in (("at the start", "start_shares"), ("trained", "shares")):
            shares = np.array([o[key] for o in _mlp(run, policy)], dtype=float).mean(0)
            rows.append([NAMES[policy], when, *(float(s) if math.isfinite(s) else None for s in shares)])
    columns = ["join", "when", "level 1", "level 2", "level 3"]
    return Table(caption="‖level k‖/‖T(x) − x‖, n = 50 (SkipInit and Fixup start at 0)", columns=columns, rows=rows)


@measures("first_level_inverse")
def first_level_inverse(run: Run) -> Measurement:
    shares = [o["shares"][0] for o in _mlp(run, "inv_depth")]
    return _figure(run, shares, unit="of what the tower adds", data=DIGITS, tables=[_levels_table(run)])


@measures("higher_levels_sqrt")
def higher_levels_sqrt(run: Run) -> Measurement:
    ratios = [o["shares"][1] / o["shares"][0] for o in _mlp(run, "inv_sqrt_depth")]
    return _figure(run, ratios, unit="of level 1's norm", data=DIGITS)


def _lost_by_truncation(run: Run, policy: str) -> Measurement:
    found = _mlp(run, policy)
    rows: Rows = [
        [NAMES[name], *np.mean([o["truncated"] for o in _mlp(run, name)], 0).tolist(), _mean(_mlp(run, name), "whole")]
        for name in ("inv_depth", "inv_sqrt_depth")
    ]
    columns = ["join", "order 0", "order 1", "order 2", "order 3", "network"]
    table = Table(caption="Accuracy of the network cut off at each order", columns=columns, rows=rows)
    lost = [o["whole"] - o["truncated"][2] for o in found]
    return _figure(run, lost, unit="accuracy lost at order 2", data=DIGITS, tables=[table])


@measures("second_order_inverse")
def second_order_inverse(run: Run) -> Measurement:
    return _lost_by_truncation(run, "inv_depth")


@measures("second_order_sqrt")
def second_order_sqrt(run: Run) -> Measurement:
    return _lost_by_truncation(run, "inv_sqrt_depth")


@measures("lesions")
def lesions(run: Run) -> Measurement:
    policies = ("inv_depth", "inv_sqrt_depth", "batchnorm")
    rows: Rows = [
        [NAMES[p], _mean(_mlp(run, p), "lesion_drop"), _mean(_mlp(run, p), "lesion_interaction")] for p in policies
    ]
    columns = ["join", "accuracy lost with one block", "interaction of five"]
    table = Table(caption="Blocks deleted from trained towers, n = 50", columns=columns, rows=rows)
    interaction = [_column(_mlp(run, p), "lesion_interaction") for p in policies[:2]]
    return Measurement.paired(*interaction, seeds=run.seeds, unit="of the joint change", data=DIGITS, tables=[table])


# Cost


def _step(policy: str, depth: int) -> Callable[[], object]:
    torch.manual_seed(0)
    model, (x, y) = ResidualMLP(64, 10, depth=depth, policy=policy), digits()[0]
    x, y = x[:100], y[:100]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        cross_entropy(model(x), y).backward()

    return step


def _time_against(run: Run, norm: str) -> Measurement:
    depths = (4,) if run.smoke else (50, 200, 1000)
    found = {
        n: bench.compare(_step("inv_sqrt_depth", n), _step(norm, n), rounds=15 if n < 1000 else 6, warmup=1)
        for n in depths
    }
    rows: Rows = [[n, c.ratio, *c.interval, float(np.median(c.a)), float(np.median(c.b))] for n, c in found.items()]
    columns = ["modules", "ratio", "low", "high", "scaled, seconds", f"{NAMES[norm]}, seconds"]
    table = Table(caption="Forward and backward, batch 100, width 32", columns=columns, rows=rows)
    first = found[depths[0]]
    return Measurement.figure(first.ratio, first.interval, method=first.method, unit="× time a step", tables=[table])


@measures("time_batchnorm")
def time_batchnorm(run: Run) -> Measurement:
    return _time_against(run, "batchnorm")


@measures("time_layernorm")
def time_layernorm(run: Run) -> Measurement:
    return _time_against(run, "layernorm")


@measures("memory")
def memory(run: Run) -> Measurement:
    depth = 4 if run.smoke else 50
    policies = ("one", "inv_sqrt_depth", "skipinit", "batchnorm", "layernorm")
    held = {policy: bench.peak_activation_bytes(_step(policy, depth)) for policy in policies}
    rows: Rows = [[NAMES[policy], count] for policy, count in held.items()]
    table = Table(caption=f"Bytes held in one step, n = {depth}", columns=["join", "bytes"], rows=rows)
    ratio = held["inv_sqrt_depth"] / held["batchnorm"]
    return Measurement.figure(ratio, (ratio, ratio), method="counted", unit="× bytes", tables=[table])


# Shared


def _line(
    name: str, x: Sequence[float | int], y: Sequence[float], plot: str, x_label: str, y_label: str, log: Any
) -> Series:
    return Series(
        name=name,
        x=[float(v) for v in x],
        y=[float(v) for v in y],
        plot=plot,
        x_label=x_label,
        y_label=y_label,
        log=log,
    )


def _figure(run: Run, values: Sequence[float], *, unit: str, **more: Any) -> Measurement:
    """The mean over seeds with Student's interval."""
    interval, method = student(values)
    return Measurement.figure(
        sum(values) / len(values),
        interval,
        method=method,
        unit=unit,
        seeds=list(run.seeds),
        values=list(values),
        **more,
    )

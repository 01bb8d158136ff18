"""What the paper says of kernelized attention with relative positions, and what building it brought to light."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.bench import Comparison, count_parameters, growth, interleaved, peak_activation_bytes
from provenn.evidence import Measurement, Run, Series, Table, measures
from provenn.nn.random_features import orthogonal_gaussian, positive_features
from provenn.nn.streaming import state_bytes
from provenn.ops.toeplitz import dense_matmul, dense_matrix, dense_sums, fft_length, fft_sums, quadratic_sums
from provenn.ops.toeplitz import fast as slicing
from provenn.papers.nprf.diagnosis import attention_rows
from provenn.papers.nprf.layers import KernelAttentionRPE, SoftmaxAttentionRPE
from provenn.papers.nprf.model import (
    attention_called,
    nprf_encoder_base,
    nprf_lm_base,
    nprf_lm_tiny,
    nprf_vit_base,
    nprf_vit_tiny,
)
from provenn.papers.nprf.studies import BACK, LENGTH, SYMBOLS, crossing, learn_to_copy, row_error
from provenn.tasks import Recipe, TaskData, fit, get_task

# Offsets of a line of 1, 2, an odd, a prime and an even number of tokens, of causal lines, and of grids.
KERNELS: tuple[tuple[tuple[int, ...], bool], ...] = (
    *(((2 * n - 1,), False) for n in (1, 2, 9, 61, 100)),
    *(((n,), True) for n in (1, 2, 9, 61)),
    *(((2 * h - 1, 2 * w - 1), False) for h, w in ((1, 3), (4, 7), (8, 8))),
)


def draw(*shape: int, std: float | int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(shape, generator=generator, dtype=dtype)


def error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def biases(*shape: int, reach: float | int = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform within ±reach, so that e^b spans e^{2·reach}."""
    generator = torch.Generator().manual_seed(7)
    return ((2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * reach).to(dtype)


def tokens_of(offsets: tuple[int, ...], causal: bool) -> int:
    return offsets[0] if causal else math.prod((size + 1) // 2 for size in offsets)


def layer_of(seed: int = 0, **options: Any) -> KernelAttentionRPE:
    """A layer of width 16 and 2 heads in float64, whose biases are not at their start of 0."""
    torch.manual_seed(seed)
    layer = KernelAttentionRPE(16, 2, **{"features": 24, "max_length": 64, **options}).double()
    if layer.rpe is not None:
        nn.init.uniform_(layer.rpe.table, -2, 2)
    return layer


# The Toeplitz product, and attention by it.


def products_error(dtype: torch.dtype) -> float:
    worst = 0.0
    for offsets, causal in KERNELS:
        c, x = biases(3, *offsets).exp(), draw(2, 3, tokens_of(offsets, causal), 5)
        ours = slicing.fft_matmul(c.to(dtype), x.to(dtype), causal=causal)
        worst = max(worst, error(ours.double(), dense_matmul(c, x, causal=causal)))
    return worst


SIZES_NOTE = "1, 2, 9, 61 and 100 tokens both ways, 1 to 61 causal, and grids of 1×3, 4×7 and 8×8; |b| ≤ 2."


@measures("fft_is_the_product")
def fft_is_the_product(run: Run) -> Measurement:
    return Measurement.exact(products_error(torch.float64), "largest relative difference, float64", note=SIZES_NOTE)


@measures("fft_in_single_precision")
def fft_in_single_precision(run: Run) -> Measurement:
    return Measurement.exact(products_error(torch.float32), "largest relative difference, float32", note=SIZES_NOTE)


def with_gradients(form: Callable[..., Tensor], inputs: Sequence[Tensor], causal: bool) -> list[Tensor]:
    """Attention's output, its ratio included, and its gradients with respect to b, φ(q), φ(k) and v."""
    b, q, k, v = (part.clone().requires_grad_() for part in inputs)
    sums = form(b.exp(), q.exp(), k.exp(), torch.cat([v, torch.ones_like(v[..., :1])], dim=-1), causal=causal)
    y = sums[..., :-1] / sums[..., -1:]
    return [y.detach(), *torch.autograd.grad((y * draw(*y.shape, seed=9)).sum(), (b, q, k, v))]


@measures("attention_is_the_quadratic_one")
def attention_is_the_quadratic_one(run: Run) -> Measurement:
    worst = 0.0
    for offsets, causal in KERNELS:
        n = tokens_of(offsets, causal)
        inputs = biases(2, *offsets), draw(2, 2, n, 4), draw(2, 2, n, 4, seed=1), draw(2, 2, n, 3, seed=2)
        for ours, defined in zip(*(with_gradients(form, inputs, causal) for form in (fft_sums, dense_sums))):
            if defined.abs().max() > 1e-9:  # with one token the weights do not matter, and their gradients are 0
                worst = max(worst, error(ours, defined))
    return Measurement.exact(
        worst,
        "largest relative difference, float64",
        note=f"Outputs and gradients of b, φ(q), φ(k) and v. {SIZES_NOTE}",
    )


@measures("special_cases")
def special_cases(run: Run) -> Measurement:
    """Against attention without RPE, a window built by hand, and a value two tokens back; both forms."""
    n, x, worst = 40, draw(2, 40, 16), 0.0
    for form in ("fft", "quadratic"):
        plain, layer = layer_of(rpe="none", causal=False), layer_of(causal=False, form=form)
        assert layer.rpe is not None
        layer.load_state_dict({**plain.state_dict(), "rpe.table": torch.zeros_like(layer.rpe.table)})
        with torch.no_grad():
            worst = max(worst, error(layer(x), plain(x)))
            q, k, v = layer._project(x)
            fq, fk = layer.features_of(q, k)
            near = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 3
            offsets = torch.arange(-63, 64)
            layer.rpe.table.copy_(torch.where(offsets.abs() <= 3, 0.0, -torch.inf).expand(2, -1))
            weights = (fq @ fk.mT).masked_fill(~near, 0)
            windowed = layer._join(weights / weights.sum(-1, keepdim=True) @ v, x)
            worst = max(worst, error(layer(x), windowed))
            layer.rpe.table.copy_(torch.where(offsets == -2, 0.0, -1e4).expand(2, -1))
            back = layer._join(v[:, :, :-2], x[:, :-2])
            worst = max(worst, error(layer(x)[:, 2:], back))
    return Measurement.exact(worst, "largest relative difference, float64", setting={"tokens": n})


@measures("shifts_cancel")
def shifts_cancel(run: Run) -> Measurement:
    """A constant on all biases of a head, in both forms; another factor of each φ(q) and of all φ(k)."""
    x, worst = draw(2, 30, 16), 0.0
    for form in ("fft", "quadratic"):
        layer = layer_of(form=form)
        assert layer.rpe is not None
        with torch.no_grad():
            before = layer(x)
            q, k, v = layer._project(x)
            fq, fk = layer.features_of(q, k)
            scaled = layer._with_rpe(fq * draw(2, 2, 30, 1).exp(), 3.7 * fk, v, (30,))
            worst = max(worst, error(layer._join(scaled, x), before))
            layer.rpe.table.add_(torch.tensor([[100.0], [-300.0]]))
            worst = max(worst, error(layer(x), before))
    return Measurement.exact(worst, "largest relative difference, float64")


@measures("weights_are_shares")
def weights_are_shares(run: Run) -> Measurement:
    """Positive features give positive weights that sum to 1; trigonometric ones give negative weights too."""
    x = draw(2, 30, 16, std=3)
    rows = {name: attention_rows(layer_of(feature_map=name, causal=False), x)[0] for name in ("prf", "trf")}
    sums = max((own.sum(-1) - 1).abs().max().item() for own in rows.values())
    lowest = {name: own.min().item() for name, own in rows.items()}
    return Measurement.holds(
        sums < 1e-9 and lowest["prf"] > 0 > lowest["trf"],
        f"the smallest weight is {lowest['prf']:.2g} with positive, {lowest['trf']:.2g} with trigonometric features",
    )


@measures("causal_and_equivariant")
def causal_and_equivariant(run: Run) -> Measurement:
    """What stands later changes nothing; what is moved inside padding moves with its output. Both forms."""
    worst = 0.0
    with torch.no_grad():
        for form in ("fft", "quadratic"):
            layer, x = layer_of(form=form), draw(2, 40, 16)
            changed = torch.cat([x[:, :25], 10 * draw(2, 15, 16, seed=3)], dim=1)
            worst = max(worst, error(layer(changed)[:, :25], layer(x)[:, :25]))
            layer, content = layer_of(form=form, causal=False), draw(2, 12, 16)
            outputs = []
            for start in (3, 20):
                mask = torch.zeros(2, 40, dtype=torch.bool)
                mask[:, start : start + 12] = True
                padded = draw(2, 40, 16, seed=4)
                padded[:, start : start + 12] = content
                outputs.append(layer(padded, mask=mask)[:, start : start + 12])
            worst = max(worst, error(*outputs))
    return Measurement.exact(worst, "largest relative difference, float64")


@measures("normalised_weights_are_flat")
def normalised_weights_are_flat(run: Run) -> Measurement:
    """Queries and keys of norm 1 that point the same way and against each other: the largest ratio that there is."""
    key = F.normalize(draw(1, 16), dim=-1)
    flat = F.normalize(torch.cat([key, -key, draw(200, 16, seed=1)]), dim=-1)
    weights = (flat @ flat.mT).softmax(dim=-1)
    largest = (weights.amax(dim=-1) / weights.amin(dim=-1)).max().item()
    return Measurement.exact(largest, "ratio of two weights of a row", note="e² is 7.389; biases lift the bound.")


@measures("beyond_dot_then_exponentiate")
def beyond_dot_then_exponentiate(run: Run) -> Measurement:
    """Identical tokens, which any map of each token leaves identical; and scores as the product of two maps.

    The rank is of q·k + b_{j−i}, which for a head of width 8 would be the width of maps that know the places as well.
    """
    x, n = draw(1, 1, 16).expand(1, 30, 16), 30
    spread: dict[str, list[float]] = {"none": [], "1d": []}
    for rpe, own in spread.items():
        for feature_map in ("prf", "trf", "elu"):
            rows = attention_rows(layer_of(causal=False, feature_map=feature_map, rpe=rpe), x)[0]
            own.append((rows.amax(-1) / rows.amin(-1)).log().abs().max().item())
    q, k = draw(2, n, 8)
    ranks = [int(torch.linalg.matrix_rank(q @ k.mT + b)) for b in (torch.zeros(n, n), dense_matrix(biases(1, 59))[0])]
    return Measurement.holds(
        max(spread["none"]) < 1e-9 and min(spread["1d"]) > 1 and ranks == [8, n],
        f"weights of {n} identical tokens differ by a factor of {math.exp(max(spread['none'])):.3g} without biases, "
        f"{math.exp(min(spread['1d'])):.3g} with; scores of width 8 have rank {ranks[0]} without, {ranks[1]} with",
    )


@measures("parameters")
def parameters(run: Run) -> Measurement:
    with torch.device("meta"):
        added = [
            count_parameters(build(attention="nprf+rpe")) - count_parameters(build(attention="softmax"))
            for build in (nprf_encoder_base, nprf_lm_base)
        ]
    positions = 512 * 768  # of the hosts without RPE, which need them
    encoder, decoder = ((count + positions) // 12 for count in added)
    return Measurement.holds(
        encoder == 12 * 1023 and decoder == 12 * 512,
        f"12 heads and 512 tokens: {encoder:,} numbers a layer both ways, {decoder:,} causal",
    )


class _Transforms(TorchDispatchMode):
    """The work of every FFT: how many numbers go in or come out, times the logarithm of the transform's length."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_fft_r2c", "_fft_c2r"):
            real = args[0] if name == "_fft_r2c" else result
            self.work += real.numel() * math.log2(real.shape[-1])
        return result


def transforms(n: int, features: int = 8, channels: int = 9) -> float:
    with _Transforms() as counter:
        fft_sums(torch.ones(1, 2 * n - 1), *(torch.ones(1, 1, n, size) for size in (features, features, channels)))
    return counter.work


@measures("operations")
def operations(run: Run) -> Measurement:
    """Of all FFTs that a call makes, at 128 to 2,048 tokens; the circle has 2n places."""
    sizes = [2**power for power in range(7, 12)]
    counted = [transforms(n) for n in sizes]
    off = max(abs(b / a / (2 * (1 + 1 / math.log2(2 * n))) - 1) for n, a, b in zip(sizes, counted, counted[1:]))
    expected = (2 * 8 * 9 + 1) * 2 * sizes[-1] * math.log2(2 * sizes[-1])
    return Measurement.exact(
        max(off, abs(counted[-1] / expected - 1)),
        "largest relative deviation",
        note="One FFT for the biases, and two for each feature and channel, the denominator's included.",
    )


@measures("no_constant_state")
def no_constant_state(run: Run) -> Measurement:
    sizes, held = (1, 100, 1000), {}
    for name in ("nprf+rpe", "nprf"):
        layer: Any = attention_called(name, 4)(32, causal=True)
        with torch.no_grad():
            held[name] = [state_bytes(layer.prefill(draw(1, n, 32, dtype=torch.float32))[1]) for n in sizes]
    a_token = 4 * 4 * (32 + 8)
    return Measurement.holds(
        held["nprf+rpe"] == [a_token * n for n in sizes] and len(set(held["nprf"])) == 1,
        f"width 32, 4 heads, 32 features: {a_token} bytes a token with RPE, {held['nprf'][0]:,} bytes in all without",
    )


# Random features.

NORMS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
FEATURES = (16, 64, 256)


def row_errors(run: Run) -> dict[str, list[list[float]]]:
    """For each m, the errors at every norm, seed by seed."""
    draws = 2 if run.smoke else 20

    def one(m: int, seed: int) -> list[float]:
        return [row_error(norm, m, seed=seed, draws=draws) for norm in NORMS]

    return {
        str(m): run.trials(f"rows of {m} features", partial(one, m), features=m, norms=NORMS, draws=draws)
        for m in FEATURES
    }


ROWS = {"dim": 64, "tokens": 64, "draws": 20, "features": list(FEATURES)}


@measures("error_grows_with_norm")
def error_grows_with_norm(run: Run) -> Measurement:
    found = row_errors(run)
    lines = [
        Series.over_seeds(f"{m} features", NORMS, own, plot="Attention rows by random features",
                          x_label="norm of q and k", y_label="L1 distance from softmax")
        for m, own in found.items()
    ]  # fmt: skip
    rows: list[list[str | float | int | None]] = [
        [f"{m} features", *(float(np.mean([seed[i] for seed in own])) for i in range(len(NORMS)))]
        for m, own in found.items()
    ]
    return Measurement.paired(
        [own[NORMS.index(1.0)] for own in found["16"]],
        [own[NORMS.index(2.0)] for own in found["256"]],
        seeds=run.seeds,
        unit="L1 distance of a row, at most 2",
        setting={**ROWS, "system": "norm 1, 16 features", "baseline": "norm 2, 256 features"},
        series=lines,
        tables=[Table(caption="L1 distance at each norm", columns=["", *(f"{norm:g}" for norm in NORMS)], rows=rows)],
    )


@measures("error_falls_with_features")
def error_falls_with_features(run: Run) -> Measurement:
    """At norm 1; one exponent a seed."""
    counts = (16, 64, 256, 1024)
    draws = 2 if run.smoke else 20

    def one(seed: int) -> float:
        errors = [row_error(1.0, m, seed=seed, draws=draws) for m in counts]
        return growth(counts, errors).exponent

    exponents = run.trials("exponent of the error", one, features=counts, draws=draws)
    found = Measurement.paired(exponents, [0.0] * len(exponents), seeds=run.seeds, unit="exponent of error over m")
    return found.model_copy(update={"baseline": None, "baselines": [], "setting": {**ROWS, "features": list(counts)}})


# A task of positions, and its stress.

NAMES = {
    "softmax": "softmax",
    "softmax+rpe": "softmax with RPE",
    "prf": "PRF",
    "nprf": "NPRF",
    "prf+rpe": "PRF with RPE",
    "nprf+rpe": "NPRF with RPE",
}
RATES = (1e-3, 1e-2)
COPYING = {"symbols": SYMBOLS, "length": LENGTH, "back": BACK, "dim": 64, "heads": 4, "layers": 1, "features": 32}


def copied(run: Run, name: str, lr: float, stress: float) -> list[dict[str, Any]]:
    steps = 2 if run.smoke else 200
    train = partial(learn_to_copy, name, lr=lr, steps=steps, stress=stress, device=run.device)
    setting = {**COPYING, "lr": lr, "steps": steps, "batch_size": 16, "stress": stress}
    return run.trials(
        f"{NAMES[name]}, rate {lr:g}, ×{stress:g}", lambda seed: train(seed=seed), attention=name, **setting
    )


def best_copies(run: Run, name: str) -> list[float]:
    """Of the rates, the one that is best over the seeds; the same choice for all."""
    each = [[one["accuracy"] for one in copied(run, name, lr, 1.0)] for lr in RATES]
    return max(each, key=np.mean)


def over_steps(plot: str, fits: dict[str, list[dict[str, Any]]], what: str, label: str, log: Any) -> list[Series]:
    """Means of ten steps each, over seeds."""
    lines = []
    for name, own in fits.items():
        curves = [[float(np.mean(one[what][i : i + 10])) for i in range(0, len(one[what]), 10)] for one in own]
        steps = [10 * i + 5 for i in range(len(curves[0]))]
        lines.append(Series.over_seeds(NAMES[name], steps, curves, plot=plot, x_label="step", y_label=label, log=log))
    return lines


def on_positions(run: Run, system: str, baseline: str, shown: Sequence[str]) -> Measurement:
    accuracy = {name: best_copies(run, name) for name in dict.fromkeys((system, baseline, *shown))}
    rows: list[list[str | float | int | None]] = [
        [NAMES[name], *(float(np.mean([one["accuracy"] for one in copied(run, name, lr, 1.0)])) for lr in RATES)]
        for name in accuracy
    ]
    return Measurement.paired(
        accuracy[system],
        accuracy[baseline],
        seeds=run.seeds,
        unit="accuracy, chance is 0.03",
        data="random symbols; the answer stood 7 before",
        setting={**COPYING, "steps": 200, "batch_size": 16, "rates": list(RATES)},
        note="Each at the better of two learning rates.",
        tables=[Table(caption="Accuracy, mean over seeds", columns=["", *(f"rate {lr:g}" for lr in RATES)], rows=rows)],
    )


@measures("rpe_restores")
def rpe_restores(run: Run) -> Measurement:
    return on_positions(run, "nprf+rpe", "nprf", ("softmax", "prf"))


@measures("normalisation_alone")
def normalisation_alone(run: Run) -> Measurement:
    return on_positions(run, "nprf", "softmax", ())


STRESS = 8.0
STRESSED = ("nprf+rpe", "prf", "prf+rpe", "softmax+rpe")


def under_stress(run: Run, baseline: str, system: str = "nprf+rpe") -> Measurement:
    fits = {name: copied(run, name, 3e-3, STRESS) for name in (system, baseline)}
    all_shown = (system, baseline) == ("nprf+rpe", "prf")
    shown = {name: copied(run, name, 3e-3, STRESS) for name in STRESSED} if all_shown else {}
    accuracy = {name: [one["accuracy"] for one in own] for name, own in fits.items()}
    rows: list[list[str | float | int | None]] = [
        [
            NAMES[name],
            float(np.mean([one["accuracy"] for one in own])),
            float(np.mean([one["loss"][-1] for one in own])),
            float(np.mean([one["gradient"][0] for one in own])),
            float(np.max([np.nanmax(one["gradient"]) for one in own])),
        ]
        for name, own in shown.items()
    ]
    columns = ["", "accuracy", "last loss", "first gradient norm", "largest gradient norm"]
    return Measurement.paired(
        accuracy[system],
        accuracy[baseline],
        seeds=run.seeds,
        unit="accuracy, chance is 0.03",
        data="random symbols; the answer stood 7 before",
        setting={**COPYING, "steps": 200, "batch_size": 16, "lr": 3e-3, "factor on query and key maps": STRESS},
        series=[
            *over_steps("Loss under stress", shown, "loss", "training loss", ""),
            *over_steps("Gradients under stress", shown, "gradient", "gradient norm", "y"),
        ],
        tables=[Table(caption="Maps of q and k eight times as large", columns=columns, rows=rows)] if rows else [],
    )


@measures("stable_where_prf_is_not")
def stable_where_prf_is_not(run: Run) -> Measurement:
    return under_stress(run, "prf")


@measures("normalisation_is_what_stabilises")
def normalisation_is_what_stabilises(run: Run) -> Measurement:
    return under_stress(run, "prf+rpe")


@measures("rpe_under_stress")
def rpe_under_stress(run: Run) -> Measurement:
    return under_stress(run, "prf", system="prf+rpe")


@measures("stable_beside_softmax")
def stable_beside_softmax(run: Run) -> Measurement:
    return under_stress(run, "softmax+rpe")


# Text and images.

TEXT = {"dim": 64, "heads": 4, "layers": 2, "features": 32, "length": 128}
TEXT_RECIPE = Recipe(optimizer="adamw", lr=3e-3, batch_size=8, max_steps=300, warmup_steps=30, schedule="cosine")
IMAGES = {"dim": 64, "heads": 4, "layers": 2, "features": 32, "patch": 2}
IMAGE_RECIPE = Recipe(optimizer="adamw", lr=2e-3, batch_size=32, epochs=10, warmup_steps=30, schedule="cosine")


@cache
def text() -> TaskData:
    return get_task("language-modelling").load("stdlib", length=TEXT["length"], eval_tokens=32_768)


def language_trials(run: Run, name: str) -> list[dict[str, Any]]:
    recipe = Recipe(max_steps=1, batch_size=2) if run.smoke else TEXT_RECIPE
    task = get_task("language-modelling")

    def one(seed: int) -> dict[str, Any]:
        build = partial(nprf_lm_tiny, attention=name, max_length=TEXT["length"], **text().options)
        done = fit(build, task, text(), recipe, seed=seed, device=run.device, title=f"{NAMES[name]} on text")
        return {"bits": done.metrics["bits_per_byte"]}

    return run.trials(f"bytes, {NAMES[name]}", one, attention=name, **TEXT, **vars(recipe))


def on_text(run: Run, baseline: str, shown: Sequence[str] = ()) -> Measurement:
    bits = {
        name: [one["bits"] for one in language_trials(run, name)]
        for name in dict.fromkeys(("nprf+rpe", baseline, *shown))
    }
    rows: list[list[str | float | int | None]] = [
        [NAMES[name], float(np.mean(own)), min(own), max(own)] for name, own in bits.items()
    ]
    return Measurement.paired(
        bits["nprf+rpe"],
        bits[baseline],
        seeds=run.seeds,
        unit="bits a byte",
        data=text().name,
        fingerprint=text().fingerprint,
        setting={**TEXT, **vars(TEXT_RECIPE)},
        tables=[Table(caption="Bits a byte of the test text", columns=["", "mean", "lowest", "highest"], rows=rows)],
        note="Attention without RPE has learned absolute positions." if "+" not in baseline else "",
    )


@measures("language_rpe")
def language_rpe(run: Run) -> Measurement:
    return on_text(run, "nprf", ("prf", "softmax+rpe"))


@measures("language_prf")
def language_prf(run: Run) -> Measurement:
    return on_text(run, "prf")


@measures("language_softmax")
def language_softmax(run: Run) -> Measurement:
    return on_text(run, "softmax+rpe")


def image_trials(run: Run, name: str) -> list[float]:
    recipe = Recipe(max_steps=1, epochs=1) if run.smoke else IMAGE_RECIPE
    task = get_task("image-classification")

    def one(seed: int) -> float:
        data = task.load("digits", seed=seed)
        build = partial(nprf_vit_tiny, attention=name, patch=IMAGES["patch"], **data.options)
        done = fit(build, task, data, recipe, seed=seed, device=run.device, title=f"{NAMES[name]} on digits")
        return done.metrics["accuracy"]

    return run.trials(f"digits, {NAMES[name]}", one, attention=name, **IMAGES, **vars(recipe))


def on_images(run: Run, baseline: str) -> Measurement:
    return Measurement.paired(
        image_trials(run, "nprf+rpe"),
        image_trials(run, baseline),
        seeds=run.seeds,
        unit="accuracy",
        data="digits (scikit-learn), 8×8 pixels",
        setting={**IMAGES, **vars(IMAGE_RECIPE)},
        note="All have learned absolute positions; biases are of both offsets of a 4×4 grid.",
    )


@measures("images_rpe")
def images_rpe(run: Run) -> Measurement:
    return on_images(run, "nprf")


@measures("images_softmax")
def images_softmax(run: Run) -> Measurement:
    return on_images(run, "softmax+rpe")


# Time and memory, of one head of width 64, forward.

LONG = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144)
COUNTS = (8, 16, 32)


def by_fft(n: int, m: int, device: str, precision: str = "single") -> Callable[[], object]:
    c, k = torch.rand(1, 2 * n - 1, device=device), torch.rand(1, 1, n, m, device=device)
    v = torch.rand(1, 1, n, 65, device=device)

    def form() -> Tensor:
        with torch.no_grad():
            sums = fft_sums(c, k, k, v, precision=precision)
            return sums[..., :-1] / sums[..., -1:]

    return form


def by_softmax(n: int, device: str, fused: bool) -> Callable[[], object]:
    b, x = torch.rand(1, 2 * n - 1, device=device), torch.rand(1, 1, n, 64, device=device)

    def form() -> Tensor:
        with torch.no_grad():
            matrix = dense_matrix(b)[None]
            if fused:
                return F.scaled_dot_product_attention(x, x, x, attn_mask=matrix)
            return (x @ x.mT / 8 + matrix).softmax(dim=-1) @ x

    return form


def clocked(run: Run) -> dict[str, list[list[float]]]:
    """Seconds of every form at every length, round by round: measured once, in turns, for all claims that read it."""
    lengths = LONG[:3] if run.smoke else LONG

    def measure() -> dict[str, list[list[float]]]:
        forms = {f"{m} features": partial(by_fft, m=m) for m in COUNTS}
        forms["32 features, double"] = partial(by_fft, m=32, precision="double")
        forms |= {
            "fused softmax": partial(by_softmax, fused=True),
            "explicit softmax": partial(by_softmax, fused=False),
        }
        times: dict[str, list[list[float]]] = {name: [] for name in forms}
        for n in lengths:
            made = {name: form(n, device=run.device) for name, form in forms.items()}
            for form in made.values():
                form()
            for name, own in interleaved(made, rounds=1 if run.smoke else 6, device=run.device, warmup=0).items():
                times[name].append(own)
        return times

    return run.trial("time of an attention", measure, lengths=lengths, features=COUNTS, dim=64)


CLOCK = {"batch": 1, "heads": 1, "dim": 64, "threads": 1, "pass": "forward", "biases": "2n − 1, both ways"}


def clock_series(times: dict[str, list[list[float]]]) -> list[Series]:
    return [
        Series(
            name=name, x=list(LONG[: len(own)]), y=[1e3 * float(np.median(t)) for t in own],
            low=[1e3 * min(t) for t in own], high=[1e3 * max(t) for t in own], plot="Time of an attention",
            x_label="tokens", y_label="milliseconds", log="xy",
        )
        for name, own in times.items()
    ]  # fmt: skip


def clock_ratio(run: Run, system: str, baseline: str, **more: Any) -> Measurement:
    times = clocked(run)
    ours, theirs = times[system][-1], times[baseline][-1]
    found = Comparison.of(ours, theirs)
    return Measurement(
        effect=found.ratio,
        kind_of_effect="ratio",
        interval=found.interval,
        method=found.method,
        value=1e3 * float(np.median(ours)),
        baseline=1e3 * float(np.median(theirs)),
        unit="milliseconds",
        values=list(ours),
        baselines=list(theirs),
        setting={**CLOCK, "tokens": LONG[len(times[system]) - 1], "system": system, "baseline": baseline},
        **more,
    )


@measures("faster_than_softmax")
def faster_than_softmax(run: Run) -> Measurement:
    times = clocked(run)
    lengths = LONG[: len(times["fused softmax"])]
    quick = {name: [min(t) for t in own] for name, own in times.items()}
    rows: list[list[str | float | int | None]] = [
        [
            name,
            *(round(crossing(lengths, quick[name], quick[other])) for other in ("fused softmax", "explicit softmax")),
        ]
        for name in quick
        if "features" in name
    ]
    caption = f"Tokens from which on the FFT is faster; beyond {lengths[-1]:,} by the last slopes"
    return clock_ratio(
        run,
        "32 features",
        "fused softmax",
        series=clock_series(times),
        tables=[Table(caption=caption, columns=["", "fused softmax", "explicit softmax"], rows=rows)],
    )


@measures("faster_than_softmax_few_features")
def faster_than_softmax_few_features(run: Run) -> Measurement:
    return clock_ratio(run, "8 features", "fused softmax")


@measures("faster_than_explicit_softmax")
def faster_than_explicit_softmax(run: Run) -> Measurement:
    return clock_ratio(run, "32 features", "explicit softmax")


@measures("price_of_double")
def price_of_double(run: Run) -> Measurement:
    return clock_ratio(run, "32 features, double", "32 features")


def clock_growth(run: Run, name: str) -> Measurement:
    """Fitted to each length's quickest round."""
    own = clocked(run)[name]
    lengths = LONG[: len(own)]
    kept = slice(2, None) if len(own) == len(LONG) else slice(None)  # below, a call's fixed work hides the growth
    fitted = growth(lengths[kept], [min(t) for t in own][kept])
    return Measurement.figure(
        fitted.exponent,
        fitted.interval,
        method=fitted.method,
        unit="exponent of time over tokens",
        setting={**CLOCK, "tokens": list(lengths[kept]), "form": name},
        note="Fitted to each length's quickest round: whatever else the machine does only adds.",
    )


@measures("time_growth")
def time_growth(run: Run) -> Measurement:
    return clock_growth(run, "32 features")


@measures("time_growth_softmax")
def time_growth_softmax(run: Run) -> Measurement:
    return clock_growth(run, "fused softmax")


@measures("memory")
def memory(run: Run) -> Measurement:
    """Forward and backward, counted: what each form holds at its peak, the dense biases of softmax included."""
    sizes, m = (512, 1024, 2048, 4096), 32

    def there_and_back(ours: bool, n: int) -> Callable[[], object]:
        b = torch.zeros(1, 2 * n - 1, requires_grad=True)
        k = torch.rand(1, 1, n, m if ours else 64, requires_grad=True)
        v = torch.rand(1, 1, n, 64, requires_grad=True)

        def form() -> None:
            if ours:
                y = fft_sums(b.exp(), k, k, v)
            else:
                y = F.scaled_dot_product_attention(k, k, v, attn_mask=dense_matrix(b)[None])
            torch.autograd.grad(y.sum(), (b, k, v))

        return form

    held = {ours: [peak_activation_bytes(there_and_back(ours, n)) for n in sizes] for ours in (True, False)}
    ratio = held[True][-1] / held[False][-1]
    return Measurement(
        effect=ratio,
        kind_of_effect="ratio",
        interval=(ratio, ratio),
        method="counted",
        value=held[True][-1],
        baseline=held[False][-1],
        unit="bytes",
        setting={**CLOCK, "pass": "forward and backward", "tokens": sizes[-1], "features": m},
        series=[
            Series(name="by FFT" if ours else "fused softmax", x=list(sizes), y=[float(size) for size in own],
                   plot="Memory of an attention", x_label="tokens", y_label="bytes", log="xy")
            for ours, own in held.items()
        ],
    )  # fmt: skip


@measures("slices_are_faster")
def slices_are_faster(run: Run) -> Measurement:
    """One head's products at 4,096 tokens, forward; in one piece they are larger than any cache."""
    form = by_fft(512 if run.smoke else 4096, 32, run.device)

    def whole() -> None:
        kind = torch.device(run.device).type
        before = slicing.SLICE[kind]
        slicing.SLICE[kind] = 2**40
        try:
            form()
        finally:
            slicing.SLICE[kind] = before

    form()
    whole()
    times = interleaved({"slices": form, "whole": whole}, rounds=1 if run.smoke else 9, device=run.device, warmup=0)
    found = Comparison.of(times["slices"], times["whole"])
    return ratio_of(found, {**CLOCK, "tokens": 4096, "features": 32, "numbers a slice": slicing.SLICE["cpu"]})


@measures("quadratic_when_short")
def quadratic_when_short(run: Run) -> Measurement:
    n = 1024
    c, k, v = torch.rand(1, 2 * n - 1), torch.rand(1, 1, n, 32), torch.rand(1, 1, n, 65)
    c, k, v = (part.to(run.device) for part in (c, k, v))
    forms: dict[Any, Callable[[], object]] = {
        "quadratic": partial(quadratic_sums, c, k, k, v),
        "fft": partial(fft_sums, c, k, k, v),
    }
    for form in forms.values():
        form()
    times = interleaved(forms, rounds=1 if run.smoke else 15, device=run.device, warmup=0)
    return ratio_of(Comparison.of(times["quadratic"], times["fft"]), {**CLOCK, "tokens": n, "features": 32})


def ratio_of(found: Comparison, setting: dict[str, Any]) -> Measurement:
    return Measurement(
        effect=found.ratio,
        kind_of_effect="ratio",
        interval=found.interval,
        method=found.method,
        value=1e3 * float(np.median(found.a)),
        baseline=1e3 * float(np.median(found.b)),
        unit="milliseconds",
        values=list(found.a),
        baselines=list(found.b),
        setting=setting,
    )


PEER = {"batch": 1, "dim": 128, "heads": 4, "tokens": 2048, "causal": True, "features": 32, "threads": 1}


def beside_x_transformers(run: Run) -> dict[str, Any]:
    """Seconds of a causal layer forward and backward: ours, and the package's with T5's biases, fused and explicit.

    With its weights, and its biases of each offset in our table, our softmax gives what the package gives.
    """
    from importlib.metadata import version

    from x_transformers.x_transformers import Attention, RelativePositionBias

    dim, heads, n = PEER["dim"], PEER["heads"], 128 if run.smoke else PEER["tokens"]
    torch.manual_seed(0)
    x = draw(1, n, dim, dtype=torch.float32).to(run.device).requires_grad_()
    softmax = SoftmaxAttentionRPE(dim, heads, max_length=n, bias=False)
    layers: dict[str, nn.Module] = {
        "NPRF with RPE": KernelAttentionRPE(dim, heads, features=PEER["features"], max_length=n, bias=False),
        "softmax with RPE": softmax,
    }
    biases_of_peer = RelativePositionBias(scale=(dim / heads) ** 0.5, causal=True, heads=heads)
    for flash in (True, False):
        layer = Attention(dim=dim, dim_head=dim // heads, heads=heads, causal=True, flash=flash)
        layer.register_module("biases", biases_of_peer)
        layers[f"x-transformers, {'fused' if flash else 'explicit'}"] = layer
    with torch.no_grad():
        peer: Any = layer
        for name in ("query", "key", "value", "out"):
            getattr(softmax, name).weight.copy_(getattr(peer, f"to_{name if name == 'out' else name[0]}").weight)
        softmax.rpe.table.copy_(biases_of_peer(n, n)[:, -1])  # the last token's row: all offsets
    calls = {name: partial(_of_layer, layer.to(run.device)) for name, layer in layers.items()}
    with torch.no_grad():
        off = error(calls["softmax with RPE"](x), calls["x-transformers, explicit"](x))

    def there_and_back(name: str) -> None:
        torch.autograd.grad(calls[name](x).square().sum(), [x, *layers[name].parameters()])

    def measure() -> dict[str, list[float]]:
        forms = {name: partial(there_and_back, name) for name in layers}
        return interleaved(forms, rounds=2 if run.smoke else 7, device=run.device)

    setting = {**PEER, "tokens": n, "pass": "forward and backward", "x-transformers": version("x-transformers")}
    return {"times": run.trial("a layer beside x-transformers", measure, **setting), "setting": setting, "error": off}


def _of_layer(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x, rel_pos=layer.biases) if hasattr(layer, "biases") else layer(x)
    return y[0] if isinstance(y, tuple) else y


def against_x_transformers(run: Run, system: str) -> Measurement:
    """Against the quicker of the package's two forms."""
    found = beside_x_transformers(run)
    times = found["times"]
    peer = min((name for name in times if name.startswith("x-")), key=lambda name: np.median(times[name]))
    rows: list[list[str | float | int | None]] = [[name, 1e3 * float(np.median(own))] for name, own in times.items()]
    measured = ratio_of(
        Comparison.of(times[system], times[peer]), {**found["setting"], "system": system, "baseline": peer}
    )
    return measured.model_copy(
        update={
            "tables": [Table(caption="A layer, forward and backward", columns=["", "milliseconds"], rows=rows)],
            "note": f"With the same weights our softmax and the package's differ by {found['error']:.1g}, relative.",
        }
    )


@measures("against_x_transformers")
def nprf_against_x_transformers(run: Run) -> Measurement:
    return against_x_transformers(run, "NPRF with RPE")


@measures("softmax_against_x_transformers")
def softmax_against_x_transformers(run: Run) -> Measurement:
    return against_x_transformers(run, "softmax with RPE")


@measures("faster_on_a_gpu")
def faster_on_a_gpu(run: Run) -> Measurement:
    if not run.device.startswith("cuda"):
        return Measurement.not_measured("a CUDA GPU")
    n = 16_384
    forms = {"ours": by_fft(n, 32, run.device), "theirs": by_softmax(n, run.device, fused=True)}
    for form in forms.values():
        form()
    times = interleaved(forms, rounds=15, device=run.device, warmup=0)
    return ratio_of(Comparison.of(times["ours"], times["theirs"]), {**CLOCK, "tokens": n, "features": 32})


# What building it brought to light.

REACHES = (1, 2, 4, 6, 8, 10, 12)


def reach_error(reach: float | int, precision: str) -> tuple[float, bool]:
    """The largest relative error of any output with b from −reach to reach, and whether all denominators are positive.

    The biases fall with the offset, so that the first tokens, causal, see the smallest only.
    """
    n = 256
    c = torch.linspace(reach, -reach, n).exp()[None]
    generator = torch.Generator().manual_seed(0)
    v = torch.cat([torch.rand(1, 1, n, 8, generator=generator) + 0.5, torch.ones(1, 1, n, 1)], dim=-1)
    k = torch.rand(1, 1, n, 16, generator=generator) + 0.1
    ours = fft_sums(c, k, k, v, causal=True, precision=precision).double()
    defined = quadratic_sums(c.double(), k.double(), k.double(), v.double(), causal=True)
    return ((ours - defined) / defined).abs().max().item(), bool((ours[..., -1] > 0).all())


def reach_series() -> list[Series]:
    return [
        Series(name=f"{precision} precision", x=[float(r) for r in REACHES],
               y=[reach_error(r, precision)[0] for r in REACHES], plot="FFT and the range of biases",
               x_label="biases from −r to r", y_label="largest relative error", log="y")
        for precision in ("single", "double")
    ]  # fmt: skip


@measures("single_precision_trap")
def single_precision_trap(run: Run) -> Measurement:
    found, positive = reach_error(12, "single")
    return Measurement.exact(
        found,
        "largest relative error at ±12",
        series=reach_series(),
        note=f"All denominators positive: {'yes' if positive else 'no, some came out at or below 0'}.",
    )


@measures("double_precision_holds")
def double_precision_holds(run: Run) -> Measurement:
    return Measurement.exact(reach_error(12, "double")[0], "largest relative error at ±12")


@measures("half_precision")
def half_precision(run: Run) -> Measurement:
    """Inputs of an FFT in bfloat16, the biases within ±2, all else in float32; relative to the largest output."""
    n = 256
    c, x = biases(1, 2 * n - 1).exp(), draw(1, 1, n, 4)
    around = F.pad(c, (0, fft_length(2 * n - 1) - 2 * n + 1)).roll(-(n - 1), -1)
    spectrum = torch.view_as_real(torch.fft.rfft(around)).bfloat16().double()
    other = torch.view_as_real(torch.fft.rfft(x.mT, n=around.shape[-1])).bfloat16().double()
    product = torch.view_as_complex(spectrum.contiguous()).conj() * torch.view_as_complex(other.contiguous())
    ours = torch.fft.irfft(product, n=around.shape[-1])[..., :n].mT
    return Measurement.exact(error(ours, dense_matmul(c, x)), "largest relative error, spectra rounded to bfloat16")


@measures("transposed_kernel")
def transposed_kernel(run: Run) -> Measurement:
    """A kernel of the offset i − j for j − i: nothing tells where b is symmetric, all is wrong where it is not."""
    n, x = 50, draw(1, 1, 50, 4)
    b = biases(1, 2 * n - 1)
    symmetric = (b + b.flip(1)) / 2
    same, other = (error(dense_matmul(c.flip(1).exp(), x), dense_matmul(c.exp(), x)) for c in (symmetric, b))
    return Measurement.holds(same < 1e-12 and other > 0.1, f"{same:.1g} with a symmetric b, {other:.2g} without")


@measures("global_norm")
def global_norm(run: Run) -> Measurement:
    """256 tokens, 4 heads of width 16, divided by the norm of the whole tensor: the largest ratio of two weights."""
    q, k = draw(2, 1, 4, 256, 16)
    weights = ((q / q.norm()) @ (k / k.norm()).mT).softmax(dim=-1)
    return Measurement.exact((weights.amax(-1) / weights.amin(-1)).max().item(), "ratio of two weights of a row")


@measures("row_lengths")
def row_lengths(run: Run) -> Measurement:
    """E[φ(q)·φ(k)] / e^{q·k} at q = k of norm 1 in width 16, over 4,096 orthogonal blocks."""
    generator = torch.Generator().manual_seed(0)
    w = orthogonal_gaussian(16 * 4096, 16, generator=generator).double()
    q = F.normalize(draw(1, 16), dim=-1)
    estimates = {}
    for name, rows in (("Gaussian", w), ("1", F.normalize(w, dim=-1)), ("√d", 4 * F.normalize(w, dim=-1))):
        phi = positive_features(q, rows)
        estimates[name] = (phi @ phi.mT).item() / math.e
    return Measurement.holds(
        abs(estimates["Gaussian"] - 1) < 0.05 and estimates["1"] < 0.3 and abs(estimates["√d"] - 1) > 0.03,
        ", ".join(f"rows of length {name}: {value:.3f} of the kernel" for name, value in estimates.items()),
    )


@measures("class_token_biases")
def class_token_biases(run: Run) -> Measurement:
    torch.manual_seed(0)
    model = nprf_vit_base(image_size=32, dim=24, heads=4, layers=2, features=8, num_classes=10)
    model(draw(2, 3, 32, 32, dtype=torch.float32)).square().sum().backward()
    blocks: Any = model.blocks
    first, last = (block.mixer.rpe for block in blocks)
    dead = last.table.grad is None or not last.table.grad.any()
    with torch.device("meta"):
        blocks = nprf_vit_base().blocks
        count = blocks[-1].mixer.rpe.table.numel()
    return Measurement.holds(dead and bool(first.table.grad.any()), f"{count:,} dead numbers at DeiT-base's size")

"""What the paper says of kernelized attention with relative positions, and what building it brought to light."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from provenn.evidence import Benchmark, Drawing, Measurement, Run, Series, Study, Table, Timing, measures
from provenn.ops.toeplitz import dense_sums, fft_sums
from provenn.papers.nprf.baselines import SoftmaxAttentionRPE
from provenn.papers.nprf.studies import (
    BACK,
    LENGTH,
    TEXT_LENGTH,
    WIDTH,
    Layer,
    biased_layer,
    bits_lost,
    copier,
    copy_data,
    crossing,
    digit_data,
    digit_model,
    draw_biases,
    explicit_layer,
    forward_of,
    fused_layer,
    layer_in_form,
    nprf_layer,
    operations_of,
    row_error,
    stressed_copier,
    text_data,
    text_model,
    there_and_back,
)
from provenn.training import Recipe

# Names as `attention_called` takes them, and as the paper's figures do.
SHORT = {"dim": 64, "heads": 4, "features": 32}
COPY: dict[str, Any] = {
    "data": copy_data,
    "recipe": Recipe(optimizer="adam", batch_size=16, max_steps=300),
    "lrs": (1e-3, 3e-3, 1e-2),
    "about": f"random symbols of 32 kinds, {LENGTH} a row; the one that stood {BACK} before is told",
    "kind": "attention",
}
COPYING = Study(
    "copying",
    "recall",
    variants={
        "softmax": ("softmax", "softmax"),
        "nprf": ("NPRF", "nprf"),
        "nprf+rpe": ("NPRF + RPE", "nprf+rpe"),
    },
    build=copier,
    setting={**SHORT, "layers": 1, "positions": "sinusoidal, for all"},
    drawing=Drawing(
        "nprf+rpe", "biases", "What each of the four heads has learned to weigh an offset with, e^b.", draw_biases
    ),
    **COPY,
)

STRESS = Study(
    "copying from large maps",
    "recall",
    variants={
        "prf": ("PRF", "prf"),
        "prf+rpe": ("PRF + RPE", "prf+rpe"),
        "nprf+rpe": ("NPRF + RPE", "nprf+rpe"),
    },
    build=stressed_copier,
    setting={**SHORT, "layers": 1, "factor on the maps of q and k at the start": 8},
    **COPY,
)
FAILS = "the paper could not pre-train it, because of the norms of its queries and keys (section 4.1)"

TEXT = Study(
    "text",
    "language-modelling",
    data=text_data,
    variants={
        "softmax+rpe": ("softmax + RPE", "softmax+rpe"),
        "softmax-norm+rpe": ("normalised softmax + RPE", "softmax-norm+rpe"),
        "elu": ("linear (elu)", "elu"),
        "prf": ("PRF", "prf"),
        "nprf+rpe": ("NPRF + RPE", "nprf+rpe"),
    },
    build=text_model,
    recipe=Recipe(
        betas=(0.9, 0.95), weight_decay=0.1, schedule="cosine", warmup_steps=50, clip=1.0, batch_size=8, epochs=1,
        max_steps=2000,
    ),
    lrs=(1.7e-3, 5e-3, 1.5e-2),
    probes={"bits_lost": bits_lost},
    about="the source of Python's standard library, in bytes",
    kind="attention",
    setting={**SHORT, "layers": 2, "length": TEXT_LENGTH},
    note="Attention without RPE has learned absolute positions.",
)  # fmt: skip

DIGITS = Study(
    "digits",
    "image-classification",
    data=digit_data,
    variants={
        "softmax+rpe": ("softmax + RPE", "softmax+rpe"),
        "linformer": ("Linformer", "linformer"),
        "nprf+rpe": ("NPRF + RPE", "nprf+rpe"),
    },
    build=digit_model,
    recipe=Recipe(epochs=8, batch_size=32, warmup_steps=30, schedule="cosine"),
    lrs=(7e-4, 2e-3, 6e-3),
    about="digits (scikit-learn), 8×8 pixels",
    kind="attention",
    setting={**SHORT, "layers": 2, "patch": 2, "positions": "learned, for all; RPE on the 4×4 grid"},
)

HEAD = {"batch": 1, "heads": 1, "dim": WIDTH, "causal": False}
LAYERS: dict[str, Layer] = {
    "softmax": explicit_layer,
    "fused softmax": fused_layer,
    **{f"NPRF + RPE, m={m}": partial(nprf_layer, features=m, form="fft") for m in (8, 16, 32)},
    "NPRF + RPE, m=32, single": partial(nprf_layer, form="fft", precision="single"),
}
FORWARD = Timing(
    "forward pass of a layer",
    {label: forward_of(layer) for label, layer in LAYERS.items()},
    sizes=(1024, 2048, 4096, 8192, 16384),
    rounds=7,
    setting={**HEAD, "form": "fft", "FFT": "double precision but where said"},
    note="The whole layer, projections and features included, as it is shipped but for the form.",
)
GPU_FORWARD = Timing(
    "forward pass of a layer on a GPU",
    {
        "softmax": forward_of(explicit_layer),
        "fused softmax": forward_of(fused_layer),
        **{f"NPRF + RPE, m={m}": forward_of(partial(nprf_layer, features=m, form="fft")) for m in (2, 16, 32)},
        "NPRF + RPE, m=32, single": forward_of(partial(nprf_layer, form="fft", precision="single")),
    },
    sizes=(8192, 16384, 24576, 32768, 40960),
    rounds=9,
    setting={**HEAD, "form": "fft", "FFT": "double precision but where said", "type": "float32"},
    note="The lengths of Figure 1a, which is of a V100. The whole layer, projections and features included.",
    gpu="a CUDA GPU with 16 GB",
)
OPERATIONS = Timing(
    "operations of a layer",
    {
        "softmax": operations_of(explicit_layer),
        "NPRF + RPE": operations_of(partial(nprf_layer, features=8, form="fft")),
    },
    sizes=(4096, 8192, 16384, 32768, 65536),
    quantity="count",
    of="operations",
    setting={**HEAD, "features": 8},
    note="Forward; an FFT of n real numbers counts 2.5 n log₂ n.",
)
MEMORY = Timing(
    "memory of a layer",
    {"softmax + RPE": there_and_back(biased_layer), "NPRF + RPE": there_and_back(partial(nprf_layer, form="fft"))},
    sizes=(1024, 2048, 4096),
    quantity="memory",
    setting={**HEAD, "features": 32, "pass": "forward and backward"},
)

IN_FORM = {"auto": "auto", "FFT": "fft", "quadratic": "quadratic", "fused softmax": "softmax"}
FORMS = [
    Timing(
        f"forms of a layer, {'forward and backward' if call is there_and_back else 'forward'}, {features} features, "
        f"{'causal' if causal else 'both ways'}",
        {
            label: call(partial(layer_in_form, features=features, causal=causal, heads=heads, form=form))
            for label, form in IN_FORM.items()
        },
        sizes=(256, 1024, 4096),
        rounds=6,
        setting={"dim": WIDTH, "heads": heads, "batch": 1},
    )
    for features, heads, causal in ((8, 4, False), (8, 1, True), (32, 4, True))
    for call in (forward_of, there_and_back)
]
BENCHMARKS = [
    Benchmark(timing, "auto", baseline, within)
    for timing in FORMS
    for baseline, within in ((("FFT", "quadratic"), 1.1), ("fused softmax", None))
]

EXPERIMENTS = {
    "softmax_operations": OPERATIONS.grows("softmax"),
    "operations": OPERATIONS.grows("NPRF + RPE"),
    "memory": MEMORY.against("NPRF + RPE", "softmax + RPE"),
    "faster_than_softmax": FORWARD.against("NPRF + RPE, m=16", "softmax"),
    "faster_with_many_features": FORWARD.against("NPRF + RPE, m=32", "softmax"),
    "gpu_time": GPU_FORWARD.against("NPRF + RPE, m=32", "softmax"),
    "gpu_time_fused": GPU_FORWARD.against("NPRF + RPE, m=32", "fused softmax"),
    "normalisation_alone": COPYING.against("nprf", "softmax"),
    "rpe_restores": COPYING.against("nprf+rpe", "nprf", shown=["softmax"], picture=True),
    "rpe_under_stress": STRESS.against("prf+rpe", "prf", may_guess=FAILS),
    "stable_where_prf_is_not": STRESS.against("nprf+rpe", "prf", shown=["prf+rpe"], may_guess=FAILS),
    "text_prf": TEXT.against("nprf+rpe", "prf", shown=["elu"]),
    "text_elu": TEXT.against("nprf+rpe", "elu"),
    "text_softmax": TEXT.against("nprf+rpe", "softmax+rpe"),
    "conversion": TEXT.against("softmax-norm+rpe", "softmax+rpe", metric="bits_lost"),
    "images_softmax": DIGITS.against("nprf+rpe", "softmax+rpe"),
    "images_linformer": DIGITS.against("nprf+rpe", "linformer", shown=["softmax+rpe"]),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@measures("beyond_dot_then_exponentiate")
def beyond_dot_then_exponentiate(run: Run) -> Measurement:
    """The rank of log α, of which a row's constant is what the softmax leaves open; drawn maps and biases."""
    torch.manual_seed(0)
    n, d = 40, 8
    rows: list[list[str | float | int | None]] = []
    for rpe in ("none", "1d"):
        layer = SoftmaxAttentionRPE(16, 16 // d, rpe=rpe, max_length=n, causal=False).double()
        if layer.rpe is not None:
            nn.init.normal_(layer.rpe.table)
        with torch.no_grad():
            q, k, _ = layer._project(draw(1, n, 16))
            scores = q @ k.mT / math.sqrt(d) + (0 if layer.rpe is None else layer.rpe.matrix((n,)))
            ranks = torch.linalg.matrix_rank(scores.log_softmax(dim=-1), rtol=1e-10)
        rows.append(["with RPE" if rpe == "1d" else "without", int(ranks.min()), int(ranks.max())])
    return Measurement.holds(
        rows[0][2] == d + 1 and rows[1][1] == n,
        f"Maps of width {d} give log α a rank of at most {d + 1}; with drawn biases it is {rows[1][1]} of {n} tokens.",
        tables=[Table(caption="Rank of log α", columns=["", "lowest of the heads", "highest"], rows=rows)],
    )


@measures("fft_is_attention")
def fft_is_attention(run: Run) -> Measurement:
    """Attention and all its gradients, by FFT and through the explicit n × n matrix, whose entries are looked up."""
    worst = 0.0
    lines = (*(((2 * n - 1,), False, n) for n in (1, 2, 9, 61, 100)), *(((n,), True, n) for n in (2, 9, 61)))
    for offsets, causal, n in (*lines, *(((2 * h - 1, 2 * w - 1), False, h * w) for h, w in ((1, 3), (4, 7), (8, 8)))):
        results = []
        for form in (fft_sums, dense_sums):
            b, q, k, v = (
                x.requires_grad_()
                for x in (draw(2, *offsets), draw(2, 2, n, 4), draw(2, 2, n, 4, seed=1), draw(2, 2, n, 3, seed=2))
            )
            sums = form(b.exp(), q.exp(), k.exp(), torch.cat([v, torch.ones_like(v[..., :1])], dim=-1), causal=causal)
            y = sums[..., :-1] / sums[..., -1:]
            results.append([y.detach(), *torch.autograd.grad((y * draw(*y.shape, seed=9)).sum(), (b, q, k, v))])
        for ours, defined in zip(*results, strict=True):
            scale = max(defined.abs().max().item(), 0.1)  # with one token gradients are 0
            worst = max(worst, (ours - defined).abs().max().item() / scale)
    return Measurement.exact(
        worst,
        "largest relative difference, float64",
        note="Outputs and gradients of b, φ(q), φ(k) and v; lines of 1 to 100 tokens, causal, grids up to 8×8.",
    )


NORMS, FEATURES = (1.0, 2.0, 4.0), (16, 64, 256)


async def row_errors(run: Run) -> dict[int, list[list[float]]]:
    """For each m the errors at every norm, seed by seed."""
    draws = 2 if run.smoke else 10

    def one(m: int, seed: int) -> list[float]:
        return [row_error(norm, m, seed=seed, draws=draws) for norm in NORMS]

    return {m: await run.trials(f"rows of {m} features", partial(one, m), features=m, draws=draws) for m in FEATURES}


@measures("error_at_norm_one")
async def error_at_norm_one(run: Run) -> Measurement:
    errors = await row_errors(run)
    rows: list[list[str | float | int | None]] = [
        [m, *(sum(seed[i] for seed in own) / len(own) for i in range(len(NORMS)))] for m, own in errors.items()
    ]
    return Measurement.mean(
        [own[0] for own in errors[64]],
        seeds=run.seeds,
        unit="L1 distance of a row, at most 2",
        at_paper_setting=True,
        setting={"dim": 64, "keys": 1024, "features": 64, "draws a seed": 10},
        tables=[Table(caption="L1 distance", columns=["features", *(f"norm {r:g}" for r in NORMS)], rows=rows)],
        series=[
            Series.over_seeds(f"{m} features", NORMS, own, plot="Attention rows by random features",
                              x_label="norm of q and k", y_label="L1 distance from softmax")
            for m, own in errors.items()
        ],
    )  # fmt: skip


@measures("error_grows_with_norm")
async def error_grows_with_norm(run: Run) -> Measurement:
    errors = await row_errors(run)
    return Measurement.paired(
        [own[0] for own in errors[16]],
        [own[1] for own in errors[256]],
        seeds=run.seeds,
        sides=("norm 1, 16 features", "norm 2, 256 features"),
        unit="L1 distance of a row, at most 2",
        setting={"dim": 64, "keys": 1024, "draws a seed": 10},
    )


@measures("no_failures")
async def no_failures(run: Run) -> Measurement:
    """Of each study's variants, over all rates of the tuning and all seeds: diverged, or no better than the
    dummy_baseline.
    """
    rows: list[list[str | float | int | None]] = []
    failed, count = 0, 0
    for study in (COPYING, STRESS, TEXT, DIGITS):
        for variant in (variant for variant in ("nprf+rpe", "prf") if variant in study.variants):
            metric, sign = study.of_task.metric, 1 if study.of_task.higher_is_better else -1
            bar = sign * sum(await study.dummy_baseline(run)) / len(run.seeds)
            reached = [trial[metric] for trial in await study.trials(run, variant)]
            reached += list((await study.rate(run, variant))[1].values())
            bad = sum(value is None or not sign * value > bar for value in reached)
            rows.append([study.name, study.label(variant), bad, len(reached)])
            if variant == "nprf+rpe":
                failed, count = failed + bad, count + len(reached)
    return Measurement.exact(
        failed,
        f"failed of {count} trainings",
        at_paper_setting=False,
        seeds=run.seeds,
        note="Failed: the loss is no number, or the result no better than the dummy baseline's.",
        tables=[Table(caption="Trainings that failed", columns=["study", "attention", "failed", "of"], rows=rows)],
    )


@measures("faster_than_fused_softmax")
async def faster_than_fused_softmax(run: Run) -> Measurement:
    """With the lengths from which on each layer by FFT is faster than softmax, read off the same timing."""
    measured, sizes = await FORWARD.measure(run), FORWARD.facts(run)[FORWARD.unit]
    quickest = {label: [min(rounds) for rounds in own] for label, own in measured.items()}
    rows: list[list[str | float | int | None]] = []
    for label in quickest:
        if label.startswith("NPRF"):
            meets = [crossing(sizes, quickest[label], quickest[other]) for other in ("softmax", "fused softmax")]
            rows.append([label, *(None if at is None else round(at, -2) for at in meets)])
    experiment = await FORWARD.against("NPRF + RPE, m=16", "fused softmax")(run)
    caption = f"Tokens from which on it is faster, between {sizes[0]:,} and {sizes[-1]:,}"
    meeting = Table(caption=caption, columns=["", "softmax", "fused softmax"], rows=rows)
    return experiment.model_copy(update={"tables": [*experiment.tables, meeting]})

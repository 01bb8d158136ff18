"""What GAAM's authors say, and what building it brought to light, as measurements."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.evidence.experiment import Measure
from provenn.nn.attention import SoftmaxAttention
from provenn.papers.gaam.layers import GaussianAdaptiveAttention, GroupedQueryAttention
from provenn.papers.gaam.mixture import GaussianMixtureAttention, equal_gaussian
from provenn.papers.gaam.model import MODULES, StackClassifier
from provenn.papers.gaam.studies import (
    DENSITIES,
    DRIFT,
    HEADS,
    LAYER_VARIANTS,
    LayersAlone,
    closest,
    drift_network,
    drifting_speakers,
    experiment_heads,
    library_heads,
    lora,
    patch_stacks,
    series_network,
    side_by_side,
    speakers,
    stack_network,
    text_stacks,
    total_variation,
    vowel_stacks,
)
from provenn.papers.gaam.task import TASK
from provenn.training import Recipe

TRAINING = Recipe(
    epochs=1000, max_steps=500, batch_size=32, optimizer="adamw", weight_decay=0.01, schedule="onecycle", clip=1.0
)
RATES = (1e-3, 3e-3, 1e-2)

# Frozen stacks: each seed has an encoder of its own, which every variant shares.


def stack_study(name: str, data: Any, variants: tuple[str, ...], about: str) -> Study:
    return Study(
        name,
        TASK,
        data=data,
        variants={variant: LAYER_VARIANTS[variant] for variant in variants},
        build=stack_network,
        recipe=TRAINING,
        lrs=RATES,
        about=about,
        kind="between stack and decoder",
        columns={"its parameters": lambda variant: count_parameters(stack_network(variant, num_classes=2).attention)},
        setting={"layers": 6, "dim": 64, "decoder's hidden channels": 32},
        note="The encoder was pre-trained on frames alone, without classes, and is frozen; another for each seed.",
    )


PATCHES = stack_study(
    "layers, patches",
    patch_stacks,
    ("none", "mha", "mha_released", "mha_bn", "gaam", "mixture", "gqa", "gqdaam"),
    "six frozen layers of a small Transformer of photographs' patches: which photograph?",
)
VOWELS = stack_study(
    "layers, vowels",
    vowel_stacks,
    ("none", "mha", "gaam", "gaam_v2"),
    "six frozen layers of a small Transformer of synthesised vowels: which vowel?",
)
TEXTS = stack_study(
    "layers, texts",
    text_stacks,
    ("none", "mha", "gaam"),
    "six frozen layers of a small Transformer of 12 bytes: head of a function, or docstring?",
)

# A series of 24 steps instead of 24 layers, with drift and without.

SPEAKERS = Study(
    "JapaneseVowels",
    TASK,
    data=speakers,
    variants={variant: LAYER_VARIANTS[variant] for variant in ("none", "mha", "gaam", "mixture")},
    build=series_network,
    recipe=replace(TRAINING, max_steps=360),
    lrs=RATES,
    about="JapaneseVowels: 9 speakers by 12 cepstral channels, brought to 24 steps",
    kind="over steps",
    setting={"steps": 24, "dim": 64, "decoder's hidden channels": 64},
)
DRIFTING = replace(
    SPEAKERS,
    name="JapaneseVowels, drifting",
    data=drifting_speakers,
    variants={variant: LAYER_VARIANTS[variant] for variant in ("none", "mha", "gaam")},
    about="the same with a slow random drift of gain and offset in every series and channel",
)

# The gate beside the best that a reader would name, at drifts of several strengths.

RIVALS = {
    "mha": LAYER_VARIANTS["mha"],
    "none": LAYER_VARIANTS["none"],
    "normalised": ("none, each series normalised", "normalised"),
}
DRIFTS = (0.0, 2.0)
BY_DRIFT = {
    strength: replace(
        SPEAKERS,
        name=f"JapaneseVowels, drift {strength:g}",
        data=partial(drifting_speakers, drift=strength),
        build=drift_network,
        variants={"gaam": LAYER_VARIANTS["gaam"], **RIVALS},
        lrs=(3e-4, 1e-3, 3e-3),
        about="the same with a slow random drift of gain and offset in every series and channel",
    )
    for strength in DRIFTS
}

# Parameters of what is trained, at some widths.


def parameters_of(build: Callable[[int], nn.Module]) -> Callable[[int, str], Callable[[], int]]:
    def make(dim: int, device: str) -> Callable[[], int]:
        with torch.device("meta"):
            module = build(dim)
        return lambda: count_parameters(module)

    return make


PARAMETERS = Timing(
    "parameters",
    {
        "GAAM, 8 heads": parameters_of(partial(GaussianAdaptiveAttention, heads=8)),
        "GAAM, 1 head": parameters_of(GaussianAdaptiveAttention),
        "MHA": parameters_of(partial(SoftmaxAttention, heads=8)),
        "GQA, 8 heads of 2": parameters_of(GroupedQueryAttention),
        "LoRA r=4": parameters_of(partial(lora, rank=4, layers=24)),
    },
    sizes=(64, 256, 1024, 4096),
    quantity="count",
    of="parameters",
    unit="features",
    note="LoRA is on queries and keys of 24 layers, as the paper's; the others stand once, behind the encoder.",
)

EXPERIMENTS: dict[str, Measure] = {
    "layers_mha": PATCHES.against("gaam", "mha", shown=("none", "mha_bn", "mixture")),
    "layers_none": PATCHES.against("gaam", "none", shown=("mha",)),
    "layers_released": PATCHES.against("mha", "mha_released", shown=("none", "gaam")),
    "gate_before_gqa": PATCHES.against("gqdaam", "gqa", shown=("none", "gaam")),
    "speech_mha": VOWELS.against("gaam", "mha", shown=("none", "gaam_v2")),
    "text_mha": TEXTS.against("gaam", "mha", shown=("none",)),
    "speakers_mha": SPEAKERS.against("gaam", "mha", shown=("none", "mixture")),
    "speakers_none": SPEAKERS.against("gaam", "none", shown=("mha",)),
    "parameters_mha": PARAMETERS.against("GAAM, 8 heads", "MHA", at=1024),
    "parameters_lora": PARAMETERS.against("GAAM, 8 heads", "LoRA r=4", at=1024),
}


@measures("drift_mha")
async def drift_mha(run: Run) -> Measurement:
    """What each loses to drift, seed by seed: accuracy without it less accuracy with it."""
    variants = ("gaam", "mha")
    steady, facts = await SPEAKERS.measure(run, variants, shown=("none",))
    drifting, moved = await DRIFTING.measure(run, variants, shown=("none",))
    lost = {variant: [a - b for a, b in zip(steady[variant], drifting[variant], strict=True)] for variant in variants}
    moved["skills"] = [*facts["skills"], *moved["skills"]]
    moved["setting"] = {**moved["setting"], "drift": DRIFT}
    moved["tables"] = [*facts["tables"], *moved["tables"]]
    return Measurement.of("difference", lost["gaam"], lost["mha"], sides=("GAAM, lost", "MHA, lost"), **moved)


@measures("drift_best")
async def drift_best(run: Run) -> Measurement:
    """The gate's accuracy less that of its best rival, seed by seed: at the strongest drift, and without drift."""
    gains: dict[float, list[float]] = {}
    skills: list[Any] = []
    notes: dict[str, None] = {}
    facts: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {}
    means: dict[str, list[Any]] = {label: [label] for label, _ in (LAYER_VARIANTS["gaam"], *RIVALS.values())}
    for strength, study in BY_DRIFT.items():
        reached, facts = await study.measure(run, ("gaam", *RIVALS))
        best = study.against("gaam", tuple(RIVALS)).best(reached)
        gains[strength] = [a - b for a, b in zip(reached["gaam"], best, strict=True)]
        skills += facts["skills"]
        notes |= dict.fromkeys([facts["note"]] if facts["note"] else [])
        for key in ("lr", "tuned"):
            if key in facts["setting"]:
                settings.setdefault(key, {})[f"drift {strength:g}"] = facts["setting"].pop(key)
        for variant, values in reached.items():
            means[study.label(variant)].append(sum(values) / len(values))
    columns = ["over steps", *(f"drift {strength:g}" for strength in DRIFTS)]
    gain: list[Any] = ["GAAM less the best of the others", *(sum(values) / len(values) for values in gains.values())]
    table = Table(caption="Accuracy by the strength of drift", columns=columns, rows=[*means.values(), gain])
    facts |= {"skills": skills, "tables": [table], "series": [], "note": " ".join(notes)}
    facts["setting"] |= settings
    sides = ("gain at drift 2", "gain without drift")
    return Measurement.of("difference", gains[DRIFTS[-1]], gains[DRIFTS[0]], sides=sides, **facts)


# The Importance Factor, before and after training, and layers alone.

ALONE = LayersAlone(PATCHES, rate=3e-3)


@measures("importance_rank")
async def importance_rank(run: Run) -> Measurement:
    """Of each seed the rank correlation over layers of their share in the factor and their accuracy alone."""
    return await ALONE.measure(run, "with accuracy alone")


@measures("importance_learned")
async def importance_learned(run: Run) -> Measurement:
    """Of each seed the rank correlation over layers of their shares before and after training."""
    return await ALONE.measure(run, "with the untrained gate")


# What is exactly so.


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fits(make: Callable[[int], nn.Module], of: str, counts: tuple[int, ...] = (1, 4, 16)) -> tuple[list[float], Table]:
    """The total variation that the largest gate leaves of each density, and a row a size."""
    rows: list[list[Any]] = []
    for count in counts:
        gates = (closest(make(count), target) for target in DENSITIES.values())
        rows.append([count, *(total_variation(w, target) for w, target in zip(gates, DENSITIES.values(), strict=True))])
    return rows[-1][1:], Table(caption=f"Total variation that is left, by {of}", columns=[of, *DENSITIES], rows=rows)


@measures("any_density")
def any_density(run: Run) -> Measurement:
    left, table = fits(partial(side_by_side, "product"), "Gaussians")
    return Measurement.exact(max(left), "total variation, the worst of three densities", tables=[table])


@measures("sum_reaches")
def sum_reaches(run: Run) -> Measurement:
    left, table = fits(partial(side_by_side, "sum"), "Gaussians")
    return Measurement.exact(max(left), "total variation, the worst of three densities", tables=[table])


@measures("heads_density")
def heads_density(run: Run) -> Measurement:
    left, table = fits(library_heads, "heads")
    return Measurement.exact(min(left), "total variation, the best of three densities", tables=[table])


@measures("gate_density")
def gate_density(run: Run) -> Measurement:
    _, table = fits(experiment_heads, "heads")
    # More heads are harder to fit: of each density the best count.
    left = [min(column) for column in list(zip(*table.rows))[1:]]
    return Measurement.exact(max(left), "total variation, the worst of three densities", tables=[table])


@measures("one_gaussian")
def one_gaussian(run: Run) -> Measurement:
    """The library's arithmetic with five Gaussians, and with the one that they are."""
    five = GaussianMixtureAttention(3, 5, official=True).double()
    one = GaussianMixtureAttention(3, 1, official=True).double()
    with torch.no_grad():
        five.offset.copy_(0.3 * normal(3, 5))
        five.width.copy_(2 + 0.5 * normal(3, 5, seed=1))
        offset, precision = equal_gaussian(five.offset, five.width)
        one.offset.copy_(offset[:, None])
        one.width.copy_(precision.rsqrt()[:, None])
        x = normal(4, 21, seed=2)
        return Measurement.exact((five.weights(x) - one.weights(x)).abs().max().item(), "largest difference, float64")


@measures("batch_leak")
def batch_leak(run: Run) -> Measurement:
    """The largest change of the first example's answer, when another of its batch is exchanged."""
    variants: dict[str, dict[str, Any]] = {name: {"module": name} for name in MODULES}
    variants |= {f"{name}, as released": {"module": name, "across_batch": True} for name in ("mha", "mha_bn")}
    rows: list[list[Any]] = []
    for label, options in variants.items():
        torch.manual_seed(0)
        # Batch norm in eval mode: what it learned of others is not of this batch.
        system = StackClassifier(4, 24, 64, hidden=8, width=64, **options).double().eval()
        x, other = normal(3, 24, 64), normal(3, 24, 64)
        other[1] = normal(24, 64, seed=1)
        with torch.no_grad():
            rows.append([label, (system(x)[0] - system(other)[0]).abs().max().item()])
    moved = dict(rows)
    released = [value for label, value in moved.items() if "released" in label]
    others = [value for label, value in moved.items() if "released" not in label]
    table = Table(
        caption="Change of an answer by another example", columns=["between stack and decoder", "logit"], rows=rows
    )
    return Measurement.holds(
        min(released) > 1e-3 and max(others) < 1e-12,
        f"it changes by {min(released):.2g} or more as released, by {max(others):.2g} at most in the others",
        tables=[table],
    )


@measures("keeps_cache")
def keeps_cache(run: Run) -> Measurement:
    """A whole pass, and single steps with the gate's state and attention's cache."""
    torch.manual_seed(0)
    gate, attention = GaussianAdaptiveAttention(32, causal=True).double(), SoftmaxAttention(32, 4).double()
    x = normal(2, 19, 32)
    with torch.no_grad():
        gate.offset.copy_(0.2 * normal(1, 32, seed=1))
        whole = attention(gate(x))
        state, cache, steps = gate.init_state(2), attention.init_state(2), []
        for token in x.unbind(dim=1):
            gated, state = gate.step(token, state)
            y, cache = attention.step(gated, cache)
            steps.append(y)
    return Measurement.exact((torch.stack(steps, dim=1) - whole).abs().max().item(), "largest difference, float64")


@measures("heads_alike")
def heads_alike(run: Run) -> Measurement:
    """−log G of features of very different layers, averaged over each head's three layers, against 1 / 2ξ."""
    gate = GaussianAdaptiveAttention(64, heads=8).double()
    x = normal(5, 24, 64) * torch.logspace(2, 5, 24, dtype=torch.float64)[:, None]
    with torch.no_grad():
        mean = -gate.weights(x).log().unflatten(1, (HEADS, 3)).mean(dim=2)
    return Measurement.exact((mean - 1 / 4).abs().max().item(), "largest difference from 1 / 2ξ", setting={"ξ": 2})

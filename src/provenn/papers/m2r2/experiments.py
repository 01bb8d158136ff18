"""What the abstract says of M2R2, and what building it brought to light, as measurements."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import Tensor

from provenn.core.cost import interleaved
from provenn.core.narrowing import of_kind
from provenn.evidence import Benchmark, Measurement, Run, Study, Table, Timing, measures
from provenn.evidence.experiment import Measure
from provenn.papers.m2r2.decoding import Draw, decode
from provenn.papers.m2r2.model import ExitModel, M2R2Model, plain_decoder
from provenn.papers.m2r2.rivals import (
    MedusaHeads,
    around_shipped,
    deed,
    medusa,
    write_by_lookahead,
    write_by_medusa,
)
from provenn.papers.m2r2.studies import (
    AROUND,
    BASE,
    DIM,
    EXPERT_PROBES,
    GATES,
    LAYERS,
    LENGTH,
    PROBES,
    RANK,
    ROOM,
    SCARCE,
    TOKENS,
    MixtureOfDepths,
    aligned,
    around_a_decoder,
    around_experts,
    every,
    fast,
    head,
    learn_around,
    raw,
    scheduled,
    second,
    text_data,
    tower,
    unaligned,
)
from provenn.papers.m2r2.task import shipped
from provenn.training import Hardware, Recipe, fit

ABOUT = "the source of Python's standard library, byte by byte"

# Exits: what stands around one decoder of a seed, which has learned before and which all but one leave as it is.

EXITS = Study(
    "exits",
    "accelerated-language-modelling",
    data=text_data,
    variants={
        "raw": ("raw exit", raw),
        "deeper": ("raw exit, gates half as deep again", partial(raw, gates=[3, 6, 7])),
        "every": ("one depth for all tokens", every),
        "skip": ("skip decoding", scheduled),
        "head": ("exit heads", head),
        "fast": ("accelerated stream", fast),
        "second": ("second model of two layers", second),
        "depths": ("mixture of depths", MixtureOfDepths),
    },
    build=around_a_decoder,
    recipe=AROUND,
    lrs=(1e-3, 3e-3, 1e-2),
    probes=PROBES,
    trained=learn_around,
    about=ABOUT,
    kind="what exits",
    setting={
        "tokens": LENGTH, "dim": DIM, "layers": LAYERS, "gates": GATES, "rank": RANK, "decoder steps": BASE.max_steps,
        "decoder rate": BASE.lr,
    },
    note="Depth counts layers of the slow stream: the fast one beside them is not counted.",
)  # fmt: skip

# Experts.

EXPERTS = Study(
    "experts",
    "accelerated-language-modelling",
    data=text_data,
    variants={"fast": ("accelerated stream", aligned), "slow": ("slow stream", unaligned)},
    build=around_experts,
    recipe=AROUND,
    lrs=EXITS.lrs,
    probes=EXPERT_PROBES,
    trained=partial(learn_around, experts=True),
    about=ABOUT,
    kind="what foretells",
    setting={
        "tokens": LENGTH, "dim": DIM, "layers": LAYERS, "experts": 8, "of them a token": 2, "foretold": 3, "rate": 2,
        "room": asdict(ROOM), "scarce room": SCARCE.slots, "tokens simulated": TOKENS, "decoder steps": BASE.max_steps,
    },
    note="Times are simulated: a layer takes 1, a fast stream beside it 0.1 more, an expert 1 to load; of a layer 2.",
)  # fmt: skip

# Depth.

DEPTH = Study(
    "depth",
    "language-modelling",
    data=text_data,
    variants={
        "2": ("2 layers", (2, True)),
        "8": ("8 layers", (8, True)),
        "8 without": ("8 layers without residuals", (8, False)),
    },
    build=lambda part, **options: tower(*part, **options),
    recipe=Recipe(
        betas=(0.9, 0.95), weight_decay=0.1, schedule="cosine", warmup_steps=30, clip=1.0, batch_size=16, epochs=1,
        max_steps=1000,
    ),
    lrs=(1e-3, 3e-3, 1e-2),
    about=ABOUT,
    kind="decoder",
    setting={"tokens": LENGTH, "dim": 48},
)  # fmt: skip
WITHOUT = "Without residuals, deep decoders may not learn at all: that is what the claim says."

# Speed, with the weights that ship.

PROMPT = b"def read_lines(path):\n    "
DRAFT: dict[str, Any] = {"gamma": 3, "stop": 0.3}
EXIT: dict[str, Any] = {"threshold": 0.9}
TEMPERATURE, TEXTS = 0.8, 2


def generates(mode: str, **options: Any) -> Callable[[int, str], Callable[[], object]]:
    """A runner that writes two texts of n tokens in one way. Greedy text of so small a model repeats itself, which is
    easily drafted: tokens are drawn, by the same seeds in each way.
    """

    def make(n: int, device: str) -> Callable[[], object]:
        model = shipped("m2r2_tiny").to(device)
        prompt = torch.tensor([list(PROMPT)], device=device)
        more: dict[str, Any] = {"draft": shipped("draft_tiny").to(device)} if mode == "two-model" else {}

        def write() -> None:
            for seed in range(TEXTS):
                draw: dict[str, Any] = {
                    "temperature": TEMPERATURE,
                    "generator": torch.Generator(device).manual_seed(seed),
                }
                list(decode(model, prompt, n, mode=mode, **draw, **options, **more))

        return write

    return make


SPEED = Timing(
    "generation by the weights that ship",
    {
        "all layers": generates("full"),
        "early exit": generates("exit", **EXIT),
        "two-model speculation": generates("two-model", **DRAFT),
        "self-speculation": generates("speculative", **DRAFT),
    },
    sizes=(16, 64),
    rounds=11,
    setting={
        "layers": 8,
        "gate": 2,
        "dim": 64,
        "tokens of a draft": DRAFT["gamma"],
        "a draft ends below": DRAFT["stop"],
        "exit above": EXIT["threshold"],
        "temperature": TEMPERATURE,
        "texts": TEXTS,
    },
    note="Two texts each; all but early exit draw from the distribution of all layers.",
)
BENCHMARKS = [
    Benchmark(SPEED, "self-speculation", "all layers"),
    Benchmark(SPEED, "self-speculation", "two-model speculation"),
    Benchmark(SPEED, "early exit", "all layers"),
]

# Other drafts for the decoder that ships, which learn what M2R2's adapters have learned beside it.

DRAFTS = Study(
    "drafts for the decoder that ships",
    "accelerated-language-modelling",
    data=text_data,
    variants={"medusa": ("Medusa heads", medusa), "deed": ("DEED's exit head", deed)},
    build=around_shipped,
    recipe=replace(AROUND, max_steps=2400),  # as many bytes as the adapters that ship have seen
    lrs=EXITS.lrs,
    about=ABOUT,
    kind="what drafts",
)
WINDOWS = {"LookAhead of 3 × 3-grams": (3, 3), "LookAhead of 7 × 4-grams": (7, 4)}


@measures("beside_other_drafts")
async def beside_other_drafts(run: Run, rounds: int = 21, tokens: int = 64) -> Measurement:
    """CPU time of two texts in turns: the best of the rivals of each round over self-speculation.

    Each call draws its next two texts, so that rounds differ by their texts too.
    """
    rates = {name: (await DRAFTS.rate(run, name))[0] for name in DRAFTS.variants}
    rounds, tokens = (2, 8) if run.smoke else (rounds, tokens)
    ours = "self-speculation"

    def measure() -> dict[str, list[float]]:
        data, hardware = DRAFTS.data_for(run, run.seeds[0]), Hardware(run.device)
        trained = {}
        for name, (label, part) in DRAFTS.variants.items():
            recipe = replace(DRAFTS.recipe_for(run), lr=rates[name])
            build = partial(around_shipped, part, **data.options)
            trained[name] = fit(
                build, DRAFTS.of_task, data, recipe, seed=run.seeds[0], hardware=hardware, title=label
            ).model.eval()
        model = shipped("m2r2_tiny")
        heads = of_kind(trained["medusa"], MedusaHeads, "Medusa")
        writers: dict[str, Callable[[Tensor, Draw], object]] = {
            ours: partial(_draws, model, tokens),
            DRAFTS.label("deed"): partial(_draws, trained["deed"], tokens),
            DRAFTS.label("medusa"): lambda prompt, draw: write_by_medusa(heads, prompt, tokens, draw),
            **{label: partial(_looks_ahead, model, tokens, *sizes) for label, sizes in WINDOWS.items()},
        }
        seconds = interleaved({label: _texts(write) for label, write in writers.items()}, rounds=rounds)
        return {label: [1e3 * s for s in times] for label, times in seconds.items()}

    facts: dict[str, Any] = {
        "rounds": rounds,
        "tokens": tokens,
        "temperature": TEMPERATURE,
        "texts a call": TEXTS,
        "lr": rates,
    }
    code = DRAFTS.trial_setting(run, "medusa")["code"]
    times = await run.trial("other drafts, timed", measure, alone=True, code=code, **facts)
    rivals = [label for label in times if label != ours]
    best = [min(each) for each in zip(*(times[label] for label in rivals), strict=True)]
    rows: list[list[str | float | int | None]] = [[label, median(each)] for label, each in times.items()]
    return Measurement.of(
        "clock ratio",
        best,
        times[ours],
        sides=("best of " + ", ".join(rivals), ours),
        unit="milliseconds",
        setting={**facts, **DRAFT},
        tables=[Table(caption="Two texts by the decoder that ships", columns=["drafts", "milliseconds"], rows=rows)],
        note="All draw from the distribution of all layers. The best rival of each round counts.",
    )


def _texts(write: Callable[[Tensor, Draw], object]) -> Callable[[], None]:
    """A call that writes two texts, at each call with the next seeds."""
    prompt, seeds = torch.tensor([list(PROMPT)]), count()

    def call() -> None:
        for _ in range(TEXTS):
            write(prompt, Draw(TEMPERATURE, None, None, torch.Generator().manual_seed(next(seeds))))

    return call


def _draws(model: Any, tokens: int, prompt: Tensor, draw: Draw) -> list[Tensor]:
    return list(
        decode(
            model, prompt, tokens, mode="speculative", temperature=draw.temperature, generator=draw.generator, **DRAFT
        )
    )


def _looks_ahead(model: Any, tokens: int, window: int, n: int, prompt: Tensor, draw: Draw) -> list[int]:
    return write_by_lookahead(model, prompt, tokens, draw, window=window, n=n)


# Probes that fail where the network is on a GPU, and why.
CPU_ONLY = dict.fromkeys(
    (
        "velocity",
        "accepted",
        "layers_read",
        "hits",
        "likeness",
        "speedup",
        "scarce_stall",
        "scarce_loads",
    ),
    "the text stays on the CPU; the mend asks for records to be repeated, up to 7 minutes of one core each",
)

EXPERIMENTS: dict[str, Measure] = {
    "depth_helps": DEPTH.against("8", "2"),
    "residuals_carry_depth": DEPTH.against("8", "8 without", may_guess=WITHOUT),
    "settled_early": EXITS.figure("every", metric="settled"),
    "tokenwise_beats_uniform": EXITS.against("raw", "every", metric="area"),
    "fast_is_faster": EXITS.figure("fast", metric="velocity"),
    "agrees_more_than_raw": EXITS.against("fast", "raw", metric="agreement"),
    "agrees_more_than_head": EXITS.against("fast", "head", metric="agreement", shown=["raw", "deeper"]),
    "like_later_layers": EXPERTS.against("fast", "slow", metric="likeness"),
    "area_confidence": EXITS.against("fast", "raw", metric="area", shown=["every", "skip", "head"]),
    "area_skip": EXITS.against("fast", "skip", metric="area"),
    "six_layers_of_depths": EXITS.against("fast", "depths", metric="at_six", shown=["raw", "every", "skip", "head"]),
    "accepted_raw": EXITS.against("fast", "raw", metric="accepted", ratio=True),
    "accepted_head": EXITS.against("fast", "head", metric="accepted", ratio=True),
    "read_less_than_two_models": EXITS.against(
        "fast", "second", metric="layers_read", ratio=True, shown=["raw", "head"]
    ),
    "faster_than_all_layers": SPEED.against("all layers", "self-speculation"),
    "faster_than_two_models": SPEED.against("two-model speculation", "self-speculation"),
    "experts_foretold": EXPERTS.against("fast", "slow", metric="hits"),
    "loads_ahead": EXPERTS.figure("fast", metric="speedup", shown=["slow"]),
    "ahead_of_slow": EXPERTS.against("fast", "slow", metric="speedup", ratio=True),
    "scarce_stall": EXPERTS.figure("fast", metric="scarce_stall", shown=["slow"]),
}


@measures("lossless")
async def lossless(run: Run, decoders: int = 12) -> Measurement:
    """Greedy text of random decoders with random adapters, in float64, against what the decoders write alone."""

    def count() -> list[int]:
        different = []
        for seed in range(3 if run.smoke else decoders):
            model = _stirred(M2R2Model(plain_decoder(19, dim=16, layers=6, heads=2), [2, 4], rank=4), seed)
            prompt = torch.randint(19, (3, 7), generator=torch.Generator().manual_seed(seed))
            alone = torch.stack(list(model.base.generate(prompt, 30, temperature=0)), dim=1)
            drafts, _ = model.decode(prompt, 30, mode="speculative", gamma=1 + seed % 5)
            different.append(int((drafts != alone).sum()))
        return different

    return Measurement.exact(
        sum(await run.trial("lossless", count, decoders=decoders)), "tokens that differ", setting={"decoders": decoders}
    )


def _stirred(model: Any, seed: int) -> Any:
    """In float64, with weights so large that what is written depends on the text."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.4 if p.dim() > 1 else 0.1) + (
            p.dim() == 1
        )
    return model.eval()


@measures("distance_methods")
def distance_methods(run: Run) -> Measurement:
    """Updates of early exit, skip decoding and mixture of depths against the layer's own times 0, 1 or a factor."""
    base = _stirred(plain_decoder(19, dim=16, layers=LAYERS, heads=2), 0)
    tokens = torch.randint(19, (2, 24), generator=torch.Generator().manual_seed(1))
    worst = 0.0
    with torch.no_grad():
        exits = ExitModel(base, GATES, router="none").streams(tokens)
        for i, block in enumerate(base.blocks):
            worst = max(worst, _gap(exits.slow[i + 1] - exits.slow[i], block(exits.slow[i]) - exits.slow[i]))
        model = _stirred(MixtureOfDepths(base), 2)
        states = model.states(tokens)
        for i, block in enumerate(model.base.blocks):
            x = states[i]
            taken, factor = model.picked(i, x)
            update = block(x, mask=taken if i % 2 else None) - x
            worst = max(worst, _gap(states[i + 1] - x, (taken * factor)[..., None] * update))
        driven = _stirred(M2R2Model(base, GATES, router="none"), 3)
        paths = driven.streams(tokens).fast[0]
        turned = _gap(paths[2] - paths[1], base.blocks[1](paths[1]) - paths[1])
    return Measurement.exact(
        worst, "largest difference, float64", note=f"Of the accelerated stream with random adapters: {turned:.2g}."
    )


def _gap(update: Tensor, reference: Tensor) -> float:
    return (update - reference).abs().max().item()

"""What Wings' abstract says, as measurements on a small decoder that is taught text tasks and tuned on pictures."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from provenn.core.cost import count_parameters, macs
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.evidence.measurement import Skill
from provenn.nn.decoder import Decoder, RotaryPositions
from provenn.papers.wings.adapter import attach, learner_parameters
from provenn.papers.wings.layers import LowRankResidualAttention
from provenn.papers.wings.model import wings_qwen1_5_7b
from provenn.papers.wings.rivals import add_low_rank
from provenn.papers.wings.studies import (
    COUNTS,
    MIXES,
    TASK,
    TUNING,
    Variant,
    accuracy,
    network,
    outcome,
    partial_correlation,
    shift,
    tuned,
    tuning_data,
)

RATES = (2e-4, 1e-3, 5e-3)
ENOUGH = 0.8  # accuracy on pictures from which a rate counts
ABOUT = "sums, copies and pairs in text, and scikit-learn's digits as 16 patches"
NOTE = (
    "One decoder of 8 layers is taught the text tasks for each seed, and is then tuned on pictures alone in each way: "
    "a third of the steps for the projector, and Wings' visual learners, then the rest. LoRA and prefixes have as many "
    "parameters as the learners."
)
WAYS: dict[str, tuple[str, Any]] = {
    "plain": ("plain tuning", Variant("plain")),
    "replay": ("10 % text replay", Variant("plain", replay=0.1)),
    "frozen": ("frozen, projector", Variant("frozen")),
    "lora": ("LoRA", Variant("lora")),
    "prefix": ("prefix tuning", Variant("prefix")),
    "wings": ("Wings", Variant("wings")),
    "visual": ("visual learners alone", Variant("wings", learners="visual")),
    "textual": ("textual learners alone", Variant("wings", learners="textual")),
    "fixed": ("half each", Variant("wings", routing="fixed")),
    "joint": ("one stage", Variant("wings", joint=True)),
}
STUDY = Study(
    "tuning on pictures",
    TASK,
    data=tuning_data,
    variants=WAYS,
    build=network,
    recipe=TUNING,
    lrs=RATES,
    probes={
        "text accuracy": partial(accuracy, "T"),
        "image accuracy": partial(accuracy, "V"),
        **{f"accuracy on {mix}": partial(accuracy, mix) for mix in ("TT", "TTT", "TTV", "TV")},
        "attention shift": shift,
    },
    trained=tuned,
    about=ABOUT,
    kind="tuning",
    note=NOTE,
)
OTHERS = ("frozen", "lora", "replay")
ABLATED = ("visual", "textual", "fixed", "joint")
MIX_METRICS = {"T": "text accuracy", "V": "image accuracy"}

EXPERIMENTS: dict[str, Any] = {
    "routed_text": STUDY.against("wings", ABLATED, metric="text accuracy", shown=("plain",)),
    "routed_image": STUDY.against("wings", ABLATED, metric="image accuracy", shown=("plain",)),
    "text_keeps_up": STUDY.against("wings", OTHERS, metric="text accuracy", shown=("plain", "prefix")),
    "image_keeps_up": STUDY.against("wings", OTHERS, metric="image accuracy", shown=("plain", "prefix")),
    "both_above": STUDY.against("wings", OTHERS, shown=("plain", "prefix")),
    "shift_against_plain": STUDY.against("wings", "plain", metric="attention shift"),
    "over_prefix": STUDY.against("wings", "prefix"),
    **{
        f"turns_{mix.lower()}": STUDY.against(
            "wings", OTHERS, metric=MIX_METRICS.get(mix, f"accuracy on {mix}"), shown=("plain",)
        )
        for mix in MIXES
    },
}


async def outcomes(run: Run, way: str, rate: float, **changes: Any) -> list[dict[str, float]]:
    """Of each seed, one tuning at a rate that is not chosen."""
    variant = WAYS[way][1]._replace(**changes)
    return await run.trials(
        f"{WAYS[way][0]} at a rate",
        partial(outcome, variant, rate, run.smoke, run.device),
        variant=list(variant),
        rate=rate,
    )


def above_chance(run: Run, name: str, values: list[float]) -> list[Skill]:
    """Whether the taught decoder, or a tuned one, answers better than guessing."""
    baseline = TASK.dummy_baseline(tuning_data(run.seeds[0], run.smoke))
    return [Skill(variant=name, values=values, dummy_baseline=[baseline] * len(values), higher_is_better=True)]


READS = f"a rate at which {{}} reads {ENOUGH:.0%} of the pictures"


async def forgotten(run: Run, way: str) -> Measurement:
    """Per seed the smallest loss of text accuracy among the rates that read pictures."""
    found = [await outcomes(run, way, rate) for rate in RATES]
    reads = [float(np.mean([each["image"] for each in at])) >= ENOUGH for at in found]
    counted = [at for at, enough in zip(found, reads) if enough] or found  # then nothing is measured
    losses = [min(at[i]["text before"] - at[i]["text"] for at in counted) for i in range(len(run.seeds))]
    rows: list[list[Any]] = [
        [
            rate,
            *(
                round(float(np.mean([each[key] for each in at])), 3)
                for key in ("text before", "text", "image", "shift")
            ),
        ]
        for rate, at in zip(RATES, found)
    ]
    columns = ["rate", "text before", "text after", "image", "attention shift"]
    measured = Measurement.mean(
        losses,
        seeds=run.seeds,
        unit="accuracy",
        data=ABOUT,
        setting=said(RATES, enough=ENOUGH),
        tables=[Table(caption=f"{WAYS[way][0]}, mean over seeds", columns=columns, rows=rows)],
        skills=above_chance(run, "before tuning", [each["text before"] for each in found[0]]),
        note=NOTE,
    )
    return measured if any(reads) else measured.model_copy(update={"needs": READS.format(WAYS[way][0])})


@measures("plain_forgets")
async def plain_forgets(run: Run) -> Measurement:
    """Text accuracy that plain tuning loses, at the rate that loses least."""
    return await forgotten(run, "plain")


@measures("replay_forgets")
async def replay_forgets(run: Run) -> Measurement:
    """The same with texts among the pictures."""
    return await forgotten(run, "replay")


async def frontier(run: Run, way: str) -> tuple[list[float], bool]:
    """Per seed the best text accuracy among rates that read pictures, 0 where none does; whether each seed has one."""
    found = [await outcomes(run, way, rate) for rate in RATES]
    reading = [[at[i]["text"] for at in found if at[i]["image"] >= ENOUGH] for i in range(len(run.seeds))]
    return [max(texts, default=0.0) for texts in reading], all(reading)


def said(rates: Sequence[float], **more: Any) -> dict[str, Any]:
    """What a record says of tunings at several rates."""
    counts = {"train": COUNTS["tuned"], "test": COUNTS["test"]}
    return {"recipe": str(TUNING), "lr": list(rates), **counts, **more}


async def at_equal_images(run: Run, rival: str) -> Measurement:
    """A side that does not read pictures at some seed has no text accuracy to compare, not one of 0."""
    sides = ("Wings", WAYS[rival][0])
    (ours, we_read), (theirs, they_read) = await frontier(run, "wings"), await frontier(run, rival)
    blind = "each seed of " + " and ".join(side for side, reads in zip(sides, (we_read, they_read)) if not reads)
    measured = Measurement.paired(
        ours,
        theirs,
        seeds=run.seeds,
        unit="accuracy",
        data=ABOUT,
        sides=sides,
        setting=said(RATES, enough=ENOUGH),
        skills=above_chance(run, "Wings", ours) + above_chance(run, sides[1], theirs),
        note=NOTE,
    )
    return measured.model_copy(update={"needs": READS.format(blind)}) if not (we_read and they_read) else measured


@measures("frontier_lora")
async def frontier_lora(run: Run) -> Measurement:
    """Text accuracy at rates that read pictures, against LoRA."""
    return await at_equal_images(run, "lora")


@measures("frontier_replay")
async def frontier_replay(run: Run) -> Measurement:
    """Text accuracy at rates that read pictures, against text replay."""
    return await at_equal_images(run, "replay")


SHARES = (0.0, 0.05, 0.2, 0.5)  # of texts in the data of claim 2


@measures("shift_and_forgetting")
async def shift_and_forgetting(run: Run) -> Measurement:
    """Per seed the correlation of shift and text accuracy within a rate, given how far the weights went."""
    found = {(rate, share): await outcomes(run, "plain", rate, replay=share) for rate in RATES[1:] for share in SHARES}
    values = [
        partial_correlation([at[i] for at in found.values()], [rate for rate, _ in found])
        for i in range(len(run.seeds))
    ]
    rows: list[list[Any]] = [
        [rate, share, *(round(float(np.mean([each[key] for each in at])), 3) for key in ("shift", "text", "drift"))]
        for (rate, share), at in found.items()
    ]
    columns = ["rate", "share of texts", "shift", "text accuracy", "drift"]
    return Measurement.mean(
        values,
        seeds=run.seeds,
        unit="correlation",
        data=ABOUT,
        setting=said(RATES[1:], shares=list(SHARES)),
        tables=[Table(caption="Tunings, mean over seeds", columns=columns, rows=rows)],
        skills=above_chance(run, "before tuning", [each["text before"] for each in next(iter(found.values()))]),
        note=NOTE,
    )


# Cost

DIM, HEADS, RANK, TEXT, SEEN = 4096, 32, 64, 1024, 729
WORDS = TEXT - SEEN - 14  # those that the textual learner looks at


@measures("added_parameters")
def added_parameters(run: Run) -> Measurement:
    """Parameters of all learners and routers at the size of Qwen1.5-7B."""
    with torch.device("meta"):
        model = wings_qwen1_5_7b()
    added = sum(parameter.numel() for parameter in learner_parameters(model).values())
    return Measurement.exact(
        added, unit="parameters", note=f"{100 * added / count_parameters(model):.2f} % of the model."
    )


def layer_macs() -> dict[str, int]:
    """Multiply-adds of a layer of Qwen1.5-7B on a text with an image, forward, and of what joins it."""
    with torch.device("meta"):
        plain = Decoder(16, DIM, 1, HEADS, hidden=11_008, bias=True)
        tuned_ = Decoder(16, DIM, 1, HEADS, hidden=11_008, bias=True)
        add_low_rank(tuned_, 2 * RANK)
        learner = LowRankResidualAttention(DIM, HEADS, RANK)
        x, image, words = (torch.zeros(1, count, DIM) for count in (TEXT, SEEN, WORDS))
        layer = macs(lambda: plain.read(x))
        lora = macs(lambda: tuned_.read(x)) - layer
        learners = macs(lambda: learner(x, image)) + macs(lambda: learner(x, words))
    router = TEXT * TEXT * HEADS * 2  # two more columns of values
    # With full maps: queries and outputs of both learners, keys and values of what each looks at.
    wide, seen = 4 * TEXT, 2 * (SEEN + WORDS)
    full = learners + (wide + seen) * (DIM * DIM - 2 * DIM * RANK) + router
    return {"layer": layer, "Wings": learners + router, "LoRA": lora, "full attention learners": full}


@measures("added_operations")
def added_operations(run: Run) -> Measurement:
    """Multiply-adds that learners and router add to a layer, in per cent."""
    counted = layer_macs()
    rows: list[list[Any]] = [
        [name, f"{value / 1e9:.1f}", f"{100 * value / counted['layer']:.2f}"]
        for name, value in counted.items()
        if name != "layer"
    ]
    return Measurement.exact(
        round(100 * counted["Wings"] / counted["layer"], 2),
        unit="% multiply-adds",
        tables=[Table(caption="Added to a layer's multiply-adds", columns=["what", "10⁹", "%"], rows=rows)],
        note=f"{TEXT} tokens, {SEEN} of an image, width {DIM}, rank {RANK}.",
    )


def layer_step(way: str, tokens: int, device: str) -> Callable[[], None]:
    """One layer of width 1,024, forward and backward; half of the tokens are of an image."""
    torch.manual_seed(0)
    decoder = Decoder(16, 1024, 1, 16, hidden=2752, bias=True, rotary=RotaryPositions(1e6))
    if way == "wings":
        attach(decoder, rank=64, max_len=4096)
    elif way == "lora":
        add_low_rank(decoder, 128)
    decoder = decoder.to(device)
    x = torch.randn(1, tokens, 1024, device=device)
    images = (torch.arange(tokens, device=device) % (tokens // 2 + 16) >= 16)[None] & (
        torch.arange(tokens, device=device) < tokens // 2 + 16
    )

    def call() -> None:
        decoder.zero_grad()
        decoder.read(x, images=images).hidden.square().mean().backward()

    return call


STEP = Timing(
    "a layer forward and backward",
    {"Wings": partial(layer_step, "wings"), "plain": partial(layer_step, "plain"), "LoRA": partial(layer_step, "lora")},
    sizes=(128, 256, 512, 1024, 2048),  # a smoke run takes the first three
    unit="tokens",
    rounds=7,
    setting={"threads": 1},
)
EXPERIMENTS["step_time"] = STEP.against("Wings", "plain")

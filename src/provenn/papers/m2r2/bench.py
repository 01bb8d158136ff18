"""`provenn bench m2r2 --slots …`: experts loaded ahead in a simulated memory, over its room and its channel's speed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from provenn.core.errors import UserError
from provenn.evidence.measurement import Table
from provenn.evidence.sweep import Point, Row, Sweep, parse_numbers
from provenn.papers.m2r2.experts import ExpertTrace, Memory, simulate
from provenn.papers.m2r2.studies import AROUND, LAYERS, aligned, around_experts, foretell, learn_around, text_data
from provenn.tasks import get_task
from provenn.training import Hardware

SOURCES = {"before": "the layer before", "slow": "slow stream", "fast": "accelerated stream", "oracle": "oracle"}
EXPERTS = 8  # a layer
RATE = 1e-2  # of what is put around the decoder, as the study on seed 0 chose it


def sweep(
    *,
    slots: str = "8,16,32,64",
    load: str = "0.5,1,2,4",
    fast: float = 0.1,
    most: int = 2,
    seed: int = 0,
    device: str = "cpu",
    budget: str = "small",
) -> Sweep:
    """Decoding of a small mixture of experts: time on demand over that with experts loaded ahead.

    Args:
        slots: experts that fit into fast memory, with commas; there are 64, and a layer needs two.
        load: time to bring one, in times of a layer, with commas.
        fast: what the accelerated stream adds to the time of a layer that it passes.
        most: of the three experts foretold for a layer so many are loaded.
        seed: of the decoder, which learns first.
        device: where it learns.
        budget: smoke or small; how long it learns.
    """
    if most < 1:
        raise UserError(f"--most must be at least 1, got {most}")
    sizes = parse_numbers("--slots", slots, int)
    loads = parse_numbers("--load", load, float)
    try:
        memories = [Memory(slots=size, load=each, fast=fast) for size in sizes for each in loads]
    except ValueError as error:
        raise UserError(str(error)) from None
    if min(sizes) < 2:
        raise UserError(f"--slots: a layer needs two experts at once, got {min(sizes)}")
    trace = cache(partial(_trace, seed, budget == "smoke", device))
    facts = {"most": most, "fast": fast, "seed": seed, "budget": budget}
    points = [
        Point(
            {"slots": memory.slots, "load": memory.load, **facts},
            partial(_measure, trace, memory, most),
            f"{memory.slots} slots, load {memory.load:g}",
        )
        for memory in memories
    ]
    return Sweep(f"experts loaded ahead, {LAYERS} layers of {EXPERTS}", points, _tables)


def _trace(seed: int, smoke: bool, device: str) -> ExpertTrace:
    data = text_data(seed, smoke)
    recipe = replace(AROUND, lr=RATE, max_steps=2 if smoke else AROUND.max_steps)
    task = get_task("accelerated-language-modelling")
    build = partial(around_experts, aligned, **data.options)
    hardware = Hardware(device)
    fit = learn_around(build, task, data, recipe, seed=seed, hardware=hardware, title="stream", experts=True)
    return foretell(fit.model, data, ("before", "slow", "fast"))


def _measure(trace: Callable[[], ExpertTrace], memory: Memory, most: int) -> dict[str, Any]:
    demand = simulate(trace(), memory)
    row: dict[str, Any] = {"status": "ok", "waits": demand.stalled / demand.total}
    for source in SOURCES:
        line = simulate(trace(), memory, source, most=most)
        row[source] = demand.total / line.total
    row["told"] = f"{row['fast']:.2f} times as fast as on demand"
    return row


def _tables(rows: Sequence[Row]) -> list[Table]:
    columns = ["experts that fit", "time to load one", "waits on demand", *SOURCES.values()]
    cells = [[row["slots"], row["load"], f"{row['waits']:.0%}", *(round(row[s], 2) for s in SOURCES)] for row in rows]
    caption = "Times as fast as loading on demand, experts foretold by"
    return [Table(caption=caption, columns=columns, rows=cells)]

"""`provenn bench rcmha --length 64,256,1024`: the four attentions' table, of a layer at any size."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from provenn.core.cost import count_parameters, flops, interleaved, peak_activation_bytes
from provenn.core.errors import UserError
from provenn.evidence.measurement import Table, lacks_memory
from provenn.evidence.sweep import Point, Row, Sweep, parse_numbers
from provenn.nn.streaming import state_bytes
from provenn.papers.rcmha.layers import RelativeConvAttention
from provenn.papers.rcmha.studies import saved_bytes, training_pass

PARTS: dict[str, dict[str, Any]] = {
    "MHA": {"conv": "", "relative": False},
    "MDHA": {"relative": False},
    "RMHA": {"conv": ""},
    "RCMHA": {},
}
ROUNDS = {"smoke": 1, "small": 7, "paper": 15}  # of --time


def sweep(
    *,
    length: str = "64,256,1024",
    memory: int = 0,
    dim: int = 128,
    heads: int = 8,
    kernel: int = 3,
    streams: int = 1,
    time: bool = False,
    device: str = "cpu",
    budget: str = "small",
) -> Sweep:
    """Parameters, operations, memory and, on request, time of the four attentions over lengths.

    Args:
        length: tokens, such as 64,256,1024.
        memory: tokens before them that are remembered, cut as the authors cut; 0 is a text's beginning.
        dim: width of a token.
        heads: of attention.
        kernel: tokens that a convolution takes in.
        streams: sequences at once.
        time: also time forward and backward passes, in turns.
        device: where it runs.
        budget: smoke, small or paper (1, 7 or 15 rounds of time).
    """
    lengths = parse_numbers("length", length, int)
    for name, value, least in (("length", min(lengths), 1), ("memory", memory, 0), ("streams", streams, 1)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    sizes = {"memory": memory, "dim": dim, "heads": heads, "kernel": kernel, "streams": streams}
    try:
        with torch.device("meta"):
            layers_of(1, **sizes)
    except ValueError as error:
        raise UserError(str(error)) from None
    rounds = ROUNDS[budget] if time else 0
    points = [
        Point(
            {"length": n, **sizes, "rounds": rounds, "device": device},
            partial(measure, n, rounds=rounds, device=device, **sizes),
            f"{n} tokens",
        )
        for n in lengths
    ]
    return Sweep("the four attentions", points, tables)


def layers_of(n: int, *, memory: int, dim: int, heads: int, kernel: int, streams: int) -> dict[str, Any]:
    """The four, with tables as long as their keys are."""
    sizes: dict[str, Any] = {"kernel": kernel, "max_distance": n + memory, "future_rows": False}
    return {name: RelativeConvAttention(dim, heads, **sizes, **parts) for name, parts in PARTS.items()}


def measure(n: int, *, rounds: int, device: str, **sizes: int) -> dict[str, Any]:
    """What each of the four costs at one length."""
    try:
        return _measure(n, rounds, device, sizes)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        return {"status": "out of memory", "again": True}


def _measure(n: int, rounds: int, device: str, sizes: dict[str, int]) -> dict[str, Any]:
    streams, memory, dim = sizes["streams"], sizes["memory"], sizes["dim"]
    costs: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, layer in layers_of(n, **sizes).items():
        layer = layer.to(device)
        x = torch.ones(streams, n, dim, device=device, requires_grad=True)
        past = torch.ones(streams, memory, dim, device=device)
        forward: Callable[[], Tensor] = partial(layer, x)
        if memory:
            forward = partial(layer.attend_segment, x, past, official=True)
        steps[name] = training_pass(forward, [x, *layer.parameters()])
        with torch.no_grad():
            state = layer.prefill(torch.cat([past, x], dim=1))[1]
            operations = flops(forward)
        costs[name] = {
            "parameters": count_parameters(layer),
            "flops": operations,
            "kept": saved_bytes(forward, layer.parameters()),
            "peak": peak_activation_bytes(steps[name], device=device),
            "state": state_bytes(state),
        }
    if rounds:
        for name, seconds in interleaved(steps, rounds=rounds, device=device, min_time=0.02).items():
            costs[name]["seconds"] = median(seconds)
    return {"status": "ok", "costs": costs}


def tables(rows: Sequence[Row]) -> list[Table]:
    """One a length: a line for each of the four, and how its memory is to RMHA's."""
    made = []
    for row in rows:
        after = f" after a memory of {row['memory']}" if row["memory"] else ""
        caption = f"{row['length']} tokens{after}, width {row['dim']}, {row['heads']} heads, {row['streams']} at once"
        if row["status"] != "ok":
            made.append(Table(caption=f"{caption}: {row['status']}", columns=["attention"], rows=[[n] for n in PARTS]))
            continue
        costs = row["costs"]
        columns = [
            "attention",
            "parameters",
            "MFLOPs forward",
            "kept for backward, MB",
            "of RMHA's",
            "most held, MB",
            "of RMHA's",
            "a stream's state, kB",
            *(["forward and backward, ms"] if row["rounds"] else []),
        ]
        body: list[list[str | float | int | None]] = [
            [
                name,
                cost["parameters"],
                f"{cost['flops'] / 1e6:.2f}",
                f"{cost['kept'] / 1e6:.2f}",
                f"{cost['kept'] / costs['RMHA']['kept']:.3f}",
                f"{cost['peak'] / 1e6:.2f}",
                f"{cost['peak'] / costs['RMHA']['peak']:.3f}",
                f"{cost['state'] / 1e3:.1f}",
                *([f"{cost['seconds'] * 1e3:.2f}"] if row["rounds"] else []),
            ]
            for name, cost in costs.items()
        ]
        made.append(Table(caption=caption, columns=columns, rows=body))
    return made

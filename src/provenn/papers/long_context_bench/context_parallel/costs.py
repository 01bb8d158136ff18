"""What the methods cost by counting: messages, padding, work of each process; and a model of time made of these."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from provenn.core.errors import UserError
from provenn.distributed import METHODS, Method, Pattern, Placement, method_called
from provenn.distributed.methods import AllGather, LoongTrain, windows_of

BACKWARD = Fraction(5, 2)  # of the forward pass's FLOPs: four products, and the scores computed again


class Heads(NamedTuple):
    """Heads of queries and of keys, and their width."""

    queries: int
    keys: int
    dim: int


class Volume(NamedTuple):
    """Elements that one process sends to others."""

    forward: Fraction
    backward: Fraction
    by_operator: dict[str, Fraction]  # "forward send", "backward all-to-all", ...


def volume(method: Method | str, ranks: int, tokens: int, heads: Heads, **options: Any) -> Volume:
    """The formulas: what one of N = R · U processes sends, of t tokens with padding, in elements.

    Ulysses sends (U − 1)/U of its tokens' queries, keys, values and outputs, t/N · d · 2 (H_q + H_kv), in four calls,
    and as much backward. Ring and all-gather send R − 1 times their keys and values, t/R · d · 2 H_kv / U of the
    heads that they are left with, and backward twice that: keys and values, and their gradients. Where U > H_kv, keys
    and values are copied to U heads.

    >>> volume("ulysses", 8, 65536, Heads(64, 8, 128)).forward
    Fraction(132120576, 1)
    >>> volume("ring", 8, 65536, Heads(64, 8, 128)).forward
    Fraction(117440512, 1)
    """
    method = method_called(method, **options) if isinstance(method, str) else method
    ring, ulysses = method.mesh(ranks)
    keys = max(heads.keys, ulysses)
    exchange = Fraction(ulysses - 1, ulysses) * Fraction(tokens, ranks) * heads.dim * 2 * (heads.queries + keys)
    hand_on = Fraction(ring - 1, ring) * tokens * heads.dim * 2 * Fraction(keys, ulysses)
    parts = {"forward all-to-all": exchange, "backward all-to-all": exchange}
    if isinstance(method, AllGather):
        parts |= {"forward all-gather": hand_on, "backward all-gather": hand_on, "backward reduce-scatter": hand_on}
    else:
        parts |= {"forward send": hand_on, "backward send": 2 * hand_on}
    parts = {name: value for name, value in parts.items() if value}
    forward, backward = (
        sum((value for name, value in parts.items() if name.startswith(phase)), Fraction(0))
        for phase in ("forward", "backward")
    )
    return Volume(forward, backward, parts)


def held(placement: Placement) -> np.ndarray:
    """(documents, ring, 2): real tokens of the first and of the second chunk that a process has of a document.

    Of a layout with one chunk a process the second is empty.
    """
    lengths, padded = np.array(placement.documents)[:, None], np.array(placement.padded)[:, None]
    ring, rank = placement.ring, np.arange(placement.ring)[None]
    if placement.layout.name == "zigzag" and ring > 1:
        chunk = padded // (2 * ring)
        return np.stack([(lengths - index * chunk).clip(0, chunk) for index in (rank, 2 * ring - 1 - rank)], -1)
    if placement.layout.name == "striped":
        first = (lengths - rank + ring - 1) // ring
    else:
        chunk = padded // ring
        first = (lengths - rank * chunk).clip(0, chunk)
    return np.stack([first, np.zeros_like(first)], -1)


def work(placement: Placement, causal: Sequence[bool], *, padded: bool = False) -> np.ndarray:
    """(ring, ring): the scores that each process of the ring computes with the keys of each.

    Args:
        placement: of documents that keep to themselves.
        causal: of each document whether its mask is.
        padded: count padding as tokens, as implementations do that compute with it.
    """
    if padded:
        placement = Placement(placement.padded, placement.ring, placement.ulysses, placement.layout, placement.rows)
    ring, name = placement.ring, placement.layout.name
    chunks = held(placement).astype(np.int64)
    whole = chunks.sum(-1)
    kinds = np.array(causal, dtype=bool)
    full = whole[~kinds].T @ whole[~kinds]
    whole, chunks = whole[kinds], chunks[kinds]
    own, other = np.arange(ring)[:, None], np.arange(ring)[None]
    triangle = (whole * (whole + 1) // 2).sum(0)
    if name == "striped":
        below = triangle[:, None].repeat(ring, 1)
        above = (whole * (whole - 1) // 2).sum(0)[:, None].repeat(ring, 1)
    elif name == "zigzag" and ring > 1:
        below, above = whole.T @ chunks[..., 0], chunks[..., 1].T @ whole
    else:
        below, above = whole.T @ whole, np.zeros((ring, ring), dtype=np.int64)
    table = np.where(other < own, below, above)
    np.fill_diagonal(table, triangle)
    return table + full


def imbalance(table: np.ndarray) -> float:
    """The largest work of a process over the mean.

    >>> table = work(method_called("ring").place(Pattern.of_documents([64]), 4), [True])
    >>> imbalance(table)
    1.0
    """
    of_each = table.sum(1)
    return float(of_each.max() / of_each.mean())


@dataclass(frozen=True)
class Machine:
    """Rates that the model of time takes, all of them given by who asks.

    Args:
        flops: a second, of one process's attention.
        bandwidth: bytes a second between processes of a server, each way.
        network: bytes a second between servers, of one process.
        server: processes of a server.
        latency: seconds of a message.
        width: bytes of an element.
    """

    flops: float | int = 6e14
    bandwidth: float | int = 4e11
    network: float | int = 5e10
    server: int = 8
    latency: float | int = 1e-5
    width: int = 2


@dataclass(frozen=True)
class Cost:
    """What a method costs for a mask on so many processes, by counting, and the time that a model makes of it.

    Args:
        method, ranks, ring, ulysses: which, and the mesh that it makes.
        padding: the share of positions without a token.
        area: scores of the mask; `most` and `mean` those of the busiest process and of the mean, over all heads' share.
        imbalance: most / mean.
        volume: elements that a process sends.
        forward, backward: seconds, modelled.
        rate: TFLOP/s a process that the forward pass would reach in the model, of the mask's own work.
    """

    method: str
    ranks: int
    ring: int
    ulysses: int
    padding: float
    area: int
    most: float
    mean: float
    imbalance: float
    volume: Volume
    forward: float
    backward: float
    rate: float


def cost(
    method: Method | str,
    ranks: int,
    pattern: Pattern,
    heads: Heads,
    machine: Machine | None = None,
    *,
    padded: bool = True,
    **options: Any,
) -> Cost:
    """Count what a method does, and model the time that it takes.

    The model: a ring's step takes the longer of its computation, of the busiest process, and its message; steps follow
    each other. A gather and an exchange of heads come before and after the computation. A ring of processes within a
    server has its bandwidth, one that leaves it the network's. A double ring sends W − 1 of its messages between
    windows behind the computation of a whole window. Nothing else costs time.

    Args:
        method: a method or its name, with its options.
        ranks: processes.
        pattern: documents that keep to themselves, full or causal.
        heads: of queries and keys.
        machine: the rates; by default of a server GPU of 2023.
        padded: whether padding is computed with, as in the official code; ours leaves it out.

    Raises:
        UserError: the method cannot run this.
    """
    method = method_called(method, **options) if isinstance(method, str) else method
    machine = Machine() if machine is None else machine
    method.check(pattern, ranks, heads.queries, heads.keys)
    if pattern.causal is None:
        raise UserError("work is counted for masks of documents that keep to themselves, full or causal")
    placement = method.place(pattern, ranks)
    ring, ulysses = placement.ring, placement.ulysses
    area = sum(part.area for part in pattern.slices)
    table = np.array([[area]]) if ring == 1 else work(placement, pattern.causal, padded=padded)
    tokens = placement.ring_tokens * ring
    sends = volume(method, ranks, tokens, heads)
    per_score = 4 * heads.dim * heads.queries // ulysses
    # Exchange of heads stays within the server where U does; the ring leaves it where U · R does.
    inside = machine.bandwidth if ulysses <= machine.server else machine.network
    outside = machine.bandwidth if ranks <= machine.server else machine.network
    times = []
    for phase, factor in (("forward", 1.0), ("backward", float(BACKWARD))):
        seconds = sum(
            float(value) * machine.width / (inside if name.endswith("all-to-all") else outside) + machine.latency
            for name, value in sends.by_operator.items()
            if name.startswith(phase) and not name.endswith("send")
        )
        steps = np.stack([np.diagonal(np.roll(table, shift, 1)) for shift in range(ring)])  # (step, process)
        compute = steps.max(1) * per_score * factor / machine.flops
        moved = float(sends.by_operator.get(f"{phase} send", 0)) * machine.width / outside
        if isinstance(method, AllGather):
            seconds += table.sum(1).max() * per_score * factor / machine.flops
        elif isinstance(method, LoongTrain) and ring > 1:
            seconds += _double(compute, moved, ring, method.windows or windows_of(ring), machine)
        else:
            message = moved / max(1, ring - 1) + (machine.latency if ring > 1 else 0)
            seconds += float(np.maximum(compute[:-1], message).sum() + compute[-1])  # the last step sends nothing
        times.append(float(seconds))
    rate = area * 4 * heads.dim * heads.queries / ranks / times[0] / 1e12
    share = table.sum(1) * heads.queries / ulysses
    return Cost(
        method.name,
        ranks,
        ring,
        ulysses,
        placement.padding,
        area,
        float(share.max()),
        float(share.mean()),
        imbalance(table),
        sends,
        times[0],
        times[1],
        rate,
    )


def _double(compute: np.ndarray, moved: float, ring: int, windows: int, machine: Machine) -> float:
    """Each window's steps, and the message to the next window, which has a whole window's time."""
    message = moved / (ring - 1) + machine.latency
    size = ring // windows
    seconds = 0.0
    for first in range(0, ring, size):
        steps = compute[first : first + size]
        # Within a window the last step sends nothing.
        inner = float(np.maximum(steps[:-1], message).sum() + steps[-1])
        seconds += max(inner, message if first + size < ring else 0.0)
    return seconds


CAVEAT = (
    "A model of counted work and messages, not a clock. The authors timed these methods on H100s: over 32 cells the "
    "mean rank correlation with this order is -0.27. Time the methods on your machines before you choose one."
)


class Choice(NamedTuple):
    """What a method would cost, or why it cannot run."""

    method: str
    cost: Cost | None
    why_not: str = ""


def plan(
    ranks: int,
    pattern: Pattern,
    heads: Heads,
    machine: Machine | None = None,
    methods: Sequence[str] | None = None,
    *,
    padded: bool = True,
) -> list[Choice]:
    """What each method would cost on so many processes, the quickest of the model first, those that cannot run last.

    The authors' clocks contradict this order: see `CAVEAT`, and `describe`, which prints it.

    Args:
        ranks, pattern, heads, machine, padded: as in `cost`.
        methods: names; by default all. Of those that divide heads, the best number of processes that do is taken.
    """
    choices = []
    for name in METHODS if methods is None else methods:
        best: Choice | None = None
        for options in _options(name, ranks, heads):
            try:
                candidate = Choice(name, cost(name, ranks, pattern, heads, machine, padded=padded, **options))
            except UserError as error:
                candidate = Choice(name, None, str(error))
            if best is None or best.cost is None or (candidate.cost is not None and _time(candidate) < _time(best)):
                best = candidate
        if best is not None:
            choices.append(best)
    return sorted(choices, key=_time)


def describe(choices: Sequence[Choice]) -> str:
    """A plan in lines, and what it is worth.

    >>> print(describe([Choice("ulysses", None, "it cannot")]).splitlines()[0])
    ulysses     cannot run: it cannot
    """
    lines = [
        f"{choice.method:<11} cannot run: {choice.why_not}"
        if choice.cost is None
        else f"{choice.method:<11} R × U = {choice.cost.ring} × {choice.cost.ulysses}, {choice.cost.rate:.0f} TFLOP/s "
        f"forward in the model, padding {choice.cost.padding:.1%}"
        for choice in choices
    ]
    return "\n".join([*lines, CAVEAT])


def _time(choice: Choice) -> float:
    return float("inf") if choice.cost is None else choice.cost.forward + choice.cost.backward


def _options(name: str, ranks: int, heads: Heads) -> list[dict[str, Any]]:
    if name not in ("usp", "loongtrain"):
        return [{}]
    fits = [u for u in range(2, ranks + 1) if ranks % u == 0 and heads.queries % u == 0]
    return [{"ulysses": u} for u in fits if heads.keys % u == 0 or u % heads.keys == 0] or [{}]

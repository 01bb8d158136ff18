"""Real processes: every method on a mask, held against exact attention; what was sent, who worked, how long it took."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from provenn.core.errors import UserError
from provenn.distributed import METHODS, Communicator, Pattern, Sent, Spread, method_called, simulate
from provenn.distributed.methods import LoongTrain, windows_of
from provenn.distributed.slices import area as area_of
from provenn.papers.long_context_bench.context_parallel.costs import Heads, volume
from provenn.papers.long_context_bench.context_parallel.patterns import pattern_of
from provenn.papers.long_context_bench.context_parallel.processes import launch
from provenn.papers.long_context_bench.kernels.blockwise import attend_backward, attend_forward, plan
from provenn.papers.long_context_bench.masks import Mask

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
NAMES = ("output", "grad_q", "grad_k", "grad_v")


class Case(NamedTuple):
    """One method on one mask.

    Args:
        method, options: which.
        pattern, heads: on what.
        dtype, seed: of the numbers drawn.
    """

    method: str
    options: dict[str, Any]
    pattern: Pattern
    heads: Heads
    dtype: torch.dtype = torch.float32
    seed: int = 0


class Part(NamedTuple):
    """What one process has of a case: its tokens, its part of the results, its counts and its times."""

    tokens: Tensor
    results: tuple[Tensor, ...]
    lse: Tensor
    sent: dict[tuple[str, str], Sent]
    area: int
    padding: float
    forward: float
    backward: float


@dataclass(frozen=True)
class Row:
    """What came of a method.

    Args:
        method, ring, ulysses: which, and its mesh.
        windows: of the ring; 1 but for a double ring.
        status: "ok", "unsupported", or "wrong" where results are not the exact ones to the type's precision.
        why: of what is not ok.
        error: the largest difference from the exact output and gradients, over the largest value of each, or over
            1 where that is less: the gradient of queries that see one key is nothing but rounding.
        sent: elements that a process sends, by phase and operator.
        bytes: that it sends in all.
        as_formula: whether the elements are those of the formulas.
        padding: the share of positions without a token.
        imbalance: the largest number of scores that a process computes, over the mean.
        forward, backward: seconds of the slowest process, the median of the rounds.
    """

    method: str
    ring: int = 0
    ulysses: int = 0
    windows: int = 1
    status: str = "ok"
    why: str = ""
    error: float = math.nan
    sent: dict[str, int] | None = None
    bytes: int = 0
    as_formula: bool | None = None
    padding: float = math.nan
    imbalance: float = math.nan
    forward: float = math.nan
    backward: float = math.nan

    def elements(self, phase: str) -> int:
        """Elements that a process sends in a phase, "forward" or "backward", by all operators."""
        return sum(count for name, count in (self.sent or {}).items() if name.startswith(phase))


@dataclass(frozen=True)
class Report:
    """All methods on one mask, beside one process.

    Args:
        mask, length, ranks, heads, dtype: what ran.
        forward, backward: seconds of one process.
        rows: one a method.
    """

    mask: str
    length: int
    ranks: int
    heads: Heads
    dtype: str
    forward: float
    backward: float
    rows: tuple[Row, ...]

    @property
    def good(self) -> bool:
        """Whether every method that can run gave what exact attention gives, and sent what the formulas say."""
        return all(row.status != "wrong" and row.as_formula is not False for row in self.rows)

    def facts(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "heads": self.heads._asdict()}

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Heads of columns, and a row of text for each method."""
        columns = (
            "method",
            "R × U",
            "W",
            "equals exact",
            "sent forward",
            "backward",
            "formula",
            "padding",
            "work max/mean",
            "s",
        )
        rows = []
        for row in self.rows:
            if row.status == "unsupported":
                rows.append((row.method, "", "", f"unsupported: {row.why}", *[""] * 6))
                continue
            rows.append(
                (
                    row.method,
                    f"{row.ring} × {row.ulysses}",
                    f"{row.windows}",
                    f"{'to' if row.status == 'ok' else 'NO,'} {row.error:.0e}",
                    f"{row.elements('forward'):,}",
                    f"{row.elements('backward'):,}",
                    {True: "equal", False: "NOT EQUAL", None: ""}[row.as_formula],
                    f"{row.padding:.1%}",
                    f"{row.imbalance:.3f}",
                    f"{row.forward:.3g} + {row.backward:.3g}",
                )
            )
        return columns, rows


def draw(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and the output's gradient of a whole row, the same in every process."""
    generator = torch.Generator().manual_seed(case.seed)
    heads = (case.heads.queries, case.heads.keys, case.heads.keys, case.heads.queries)
    q, k, v, grad = (
        torch.randn(case.pattern.length, count, case.heads.dim, generator=generator, dtype=torch.float64).to(case.dtype)
        for count in heads
    )
    return q, k, v, grad


def perform(comm: Communicator, case: Case, rounds: int = 1) -> Part:
    """One process's part of a case, forward and backward."""
    spread = Spread(method_called(case.method, **case.options), comm, case.pattern)
    comm.traffic.clear()
    q, k, v, grad = (spread.dispatch(x) for x in draw(case))
    forward, backward = [], []
    for turn in range(rounds):
        for x in (q, k, v):
            x.requires_grad_()
        start = time.perf_counter()
        output, lse = spread.attend(q, k, v, return_lse=True)
        middle = time.perf_counter()
        grads = torch.autograd.grad(output, (q, k, v), grad)
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
        if not turn:
            sent = dict(comm.traffic.sent)  # every round sends the same
    if spread.pattern.causal is None or spread.method.any_mask:
        seen = area_of(spread.seen)
    else:
        seen = sum(area_of(spread.pair(other)) for other in range(spread.ring.size))
    return Part(
        spread.placement.tokens(comm.rank),
        tuple(x.detach() for x in (output, *grads)),
        lse,
        sent,
        seen,
        spread.placement.padding,
        sorted(forward)[rounds // 2],
        sorted(backward)[rounds // 2],
    )


def perform_all(comm: Communicator, cases: Sequence[Case], rounds: int = 1) -> list[Part | str]:
    """One process's part of every case, or why it cannot be."""
    parts: list[Part | str] = []
    for case in cases:
        try:
            method_called(case.method, **case.options).check(
                case.pattern, comm.size, case.heads.queries, case.heads.keys
            )
        except UserError as error:  # the same in every process
            parts.append(str(error))
            continue
        parts.append(perform(comm, case, rounds))
    return parts


def joined(parts: Sequence[Part], length: int) -> tuple[Tensor, ...]:
    """Output, gradients of queries, keys and values, and log-sum-exps of the whole row, from all processes' parts."""
    tokens = torch.cat([part.tokens for part in parts])
    real = tokens >= 0
    whole = []
    for i in range(len(NAMES) + 1):
        held = torch.cat([(*part.results, part.lse)[i] for part in parts])
        whole.append(held.new_empty(length, *held.shape[1:]).index_copy_(0, tokens[real], held[real]))
    return tuple(whole)


def alone(case: Case, rounds: int = 1) -> Part:
    """The case in one process."""
    return simulate(1, lambda comm: perform(comm, case._replace(method="ulysses", options={}), rounds))[0]


def exact(case: Case) -> tuple[Tensor, ...]:
    """Output and gradients of the same numbers in float64, by the blockwise kernel: none of its code is a method's."""
    q, k, v, grad = (x.double().transpose(0, 1).unsqueeze(0) for x in draw(case))
    blocks = plan(case.pattern.slices, case.pattern.length)
    output, lse = attend_forward(q, k, v, blocks)
    results = (output, *attend_backward(q, k, v, output, lse, grad, blocks))
    return tuple(x.squeeze(0).transpose(0, 1) for x in results)


def row_of(case: Case, parts: Sequence[Part | str], reference: tuple[Tensor, ...]) -> Row:
    """What came of a method, from all processes' parts and the exact results."""
    why = next((part for part in parts if isinstance(part, str)), None)
    if why is not None:
        return Row(case.method, status="unsupported", why=why)
    given = [part for part in parts if isinstance(part, Part)]
    method = method_called(case.method, **case.options)
    ring, ulysses = method.mesh(len(given))
    whole = joined(given, case.pattern.length)
    error = max(
        float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1))
        for ours, theirs in zip(whole[: len(NAMES)], reference, strict=True)
    )
    good = error <= TOLERANCE[case.dtype]
    sent = {f"{phase} {operator}": n.elements for (phase, operator), n in given[0].sent.items() if phase != "lse"}
    placement = method.place(case.pattern, len(given))
    formula = volume(method, len(given), placement.ring_tokens * placement.ring, case.heads).by_operator
    known = {name: int(value) for name, value in formula.items()}
    return Row(
        case.method,
        ring,
        ulysses,
        (method.windows or windows_of(ring)) if isinstance(method, LoongTrain) else 1,
        status="ok" if good else "wrong",
        why="" if good else f"differs by {error:.1e} from exact attention",
        error=error,
        sent=sent,
        bytes=sum(n.bytes for (phase, _), n in given[0].sent.items() if phase != "lse"),
        as_formula=sent == known if type(method).__module__ == METHODS["ring"].__module__ else None,
        padding=given[0].padding,
        imbalance=_imbalance([part.area for part in given]),
        forward=max(part.forward for part in given),
        backward=max(part.backward for part in given),
    )


def _imbalance(areas: Sequence[int]) -> float:
    return max(areas) * len(areas) / sum(areas)


def bench(
    mask: Mask | Pattern,
    ranks: int,
    *,
    heads: tuple[int, int] = (8, 8),
    dim: int = 32,
    methods: Sequence[str] | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rounds: int = 3,
    run: Callable[..., list[Any]] = launch,
) -> Report:
    """Every method on a mask in so many processes over gloo, forward and backward, held against exact attention.

    Args:
        mask: one of the benchmark's, or a pattern.
        ranks: processes; 1 thread each.
        heads, dim: of queries and of keys, and their width.
        methods: names; by default all.
        options: of methods, such as {"usp": {"ulysses": 2}}; by default USP and LoongTrain have U = 2 where that
            divides the processes.
        dtype, seed: of the numbers drawn.
        rounds: repetitions, of which the median is given.
        run: what starts the processes: `launch`, or `simulate` for threads of this one.

    Raises:
        UserError: bad arguments, or a process that died.
    """
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, got {rounds}")
    pattern = mask if isinstance(mask, Pattern) else pattern_of(mask)
    sizes = Heads(*heads, dim)
    if min(sizes) < 1:
        raise UserError(f"heads and dim must be at least 1, got {tuple(sizes)}")
    names = list(METHODS) if methods is None else list(methods)
    chosen = {
        name: (options or {}).get(name, {"ulysses": 2} if name in ("usp", "loongtrain") and ranks % 2 == 0 else {})
        for name in names
    }
    cases = [Case(name, chosen[name], pattern, sizes, dtype, seed) for name in names]
    for case in cases:
        method_called(case.method, **case.options)
    single, reference = alone(cases[0], rounds), exact(cases[0])
    if run is simulate:
        parts = simulate(ranks, lambda comm: perform_all(comm, cases, rounds))
    else:
        parts = run(ranks, perform_all, cases, rounds)
    rows = tuple(row_of(case, [part[i] for part in parts], reference) for i, case in enumerate(cases))
    name = "pattern" if isinstance(mask, Pattern) else mask.name
    return Report(
        name, pattern.length, ranks, sizes, str(dtype).removeprefix("torch."), single.forward, single.backward, rows
    )

"""What the paper says of attention on one device and on several, and what its authors' code counts, as measurements."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from provenn.core.cost import interleaved
from provenn.core.errors import UserError
from provenn.distributed import Inputs, Method, Partial, Pattern, Sharing, Simulation, Slice, attend, simulate
from provenn.distributed.methods import Ring, pack, with_keys
from provenn.evidence import Measurement, Run, Table, Timing, measures
from provenn.evidence.clock import clock
from provenn.evidence.measurement import lacks_memory, lacks_operation
from provenn.papers.long_context_bench import masks
from provenn.papers.long_context_bench.context_parallel import (
    METHODS,
    Heads,
    Report,
    bench,
    cost,
    launch,
    pattern_of,
    plan,
    volume,
)
from provenn.papers.long_context_bench.context_parallel.bench import Case as BenchCase
from provenn.papers.long_context_bench.context_parallel.bench import draw
from provenn.papers.long_context_bench.context_parallel.published import (
    RANKS,
    RATES,
    order_agrees,
    published_rates,
    share_reached,
)
from provenn.papers.long_context_bench.kernels import Case, Kernel, kernels, reference
from provenn.papers.long_context_bench.kernels.blockwise import Blockwise
from provenn.papers.long_context_bench.kernels.cudnn import CuDNN
from provenn.papers.long_context_bench.kernels.documents import Documents
from provenn.papers.long_context_bench.kernels.flex import Flex
from provenn.papers.long_context_bench.kernels.gathered import Gathered
from provenn.papers.long_context_bench.kernels.naive import Naive
from provenn.papers.long_context_bench.kernels.sdpa import SDPA
from provenn.papers.long_context_bench.masks import MASKS, Mask, make_mask
from provenn.papers.long_context_bench.sparse import BlockSparse, block_sparse, variable_block_sparse
from provenn.papers.long_context_bench.timing import (
    PROTOCOLS,
    Direction,
    Judge,
    Protocol,
    Stopwatch,
    flops,
    measure,
    prepare_call,
    quantiles,
    time_call,
)

SEED = 42  # of every mask, as in the authors' scripts
SMALL: dict[str, Any] = {"heads": 4, "kv_heads": 1, "head_dim": 32}  # where a clock runs: a GQA of 4:1
LARGE: dict[str, Any] = {"heads": 8, "kv_heads": 1, "head_dim": 64}  # where the work is to outweigh what calls cost
BOTH: Direction = "both"


def called(kernel: Kernel, build: Callable[[int], Mask | BlockSparse], direction: Direction) -> Callable:
    """A timing's runner: the kernel on the mask of each size; on `meta` where only counts are asked for."""

    def make(tokens: int, device: str) -> Callable[[], object]:
        case = Case(build(tokens), **SMALL, device=torch.device(device), backward=direction != "forward")
        return prepare_call(kernel, case, direction, SEED)

    return make


def counted(kernel: Kernel) -> Callable:
    """As `called` on a causal mask, with tensors that have shapes alone: what is counted is the same."""

    def make(tokens: int, device: str) -> Callable[[], object]:
        case = Case(masks.causal(tokens), **SMALL, device=torch.device("meta"), backward=True)
        return prepare_call(kernel, case, BOTH, SEED)

    return make


def windowed(tokens: int) -> Mask:
    """A causal window of 256."""
    return masks.causal_sliding_window(tokens, window=256)


def packed(tokens: int) -> Mask:
    """Causal documents drawn from the Pile's histogram."""
    return make_mask("causal_document", tokens, histogram="pile", seed=SEED)


def fifth(tokens: int) -> BlockSparse:
    """Blocks of 128, of which each block of queries keeps a fifth."""
    return block_sparse(tokens, SMALL["heads"], block=128, density=0.2, seed=SEED)


LENGTHS = (1024, 2048, 4096, 8192, 16_384)
OPERATIONS = Timing(
    "operations of explicit attention", {"naive": counted(Naive())}, LENGTHS, quantity="flops", setting=SMALL
)
BYTES = Timing(
    "memory of attention, forward and backward",
    {"naive": counted(Naive()), "blockwise": counted(Blockwise(rows=64, keys=256))},
    (1024, 2048, 4096, 8192),
    quantity="memory",
    setting={**SMALL, "block": "64 × 256"},
)
EXPLICIT_BYTES = Timing(
    "memory of explicit attention", {"naive": counted(Naive())}, LENGTHS, quantity="memory", setting=SMALL
)
SIZES = (256, 512, 1024, 4096)
CLOCK: dict[str, Any] = {"setting": {**SMALL, "dtype": "float32", "seed": SEED}, "rounds": 7}
WINDOW = Timing(
    "a causal window of 256, forward and backward",
    {name: called(kernel, windowed, BOTH) for name, kernel in (("blockwise", Blockwise()), ("naive", Naive()))},
    SIZES,
    **CLOCK,
)
GATHERED = Timing(
    "block-sparse attention, forward",
    {name: called(kernel, fifth, "forward") for name, kernel in (("gathered", Gathered()), ("sdpa", SDPA()))},
    SIZES,
    **CLOCK,
)
FULL = Timing(
    "a full mask, forward",
    {name: called(kernel, masks.full, "forward") for name, kernel in (("sdpa", SDPA()), ("blockwise", Blockwise()))},
    SIZES,
    **CLOCK,
)
DOCUMENTS = Timing(
    "packed causal documents, forward",
    {
        name: called(kernel, packed, "forward")
        for name, kernel in (("blockwise", Blockwise()), ("sdpa", SDPA()), ("documents", Documents()))
    },
    SIZES,
    **CLOCK,
)

EXPERIMENTS = {
    "flops_over_length": OPERATIONS.grows("naive"),
    "memory_over_length": EXPLICIT_BYTES.grows("naive"),
    "blockwise_memory": BYTES.grows("blockwise"),
    "blockwise_window": WINDOW.against("blockwise", "naive"),
    "sparse_gain": GATHERED.against("gathered", "sdpa"),
    "full_by_fused": FULL.against("sdpa", "blockwise"),
    "documents_by_blocks": DOCUMENTS.against("blockwise", "sdpa"),
}


@measures("share_of_a_step")
def share_of_a_step(run: Run, tokens: int = 131_072) -> Measurement:
    """Forward operations of a decoder of Llama's size: 32 layers of width 4096, feed-forward 11008, 32,000 words."""
    width, inner, layers, words = 4096, 11_008, 32, 32_000
    weights = layers * (4 * width**2 + 3 * width * inner) + words * width

    def share(n: int) -> float:
        attention = layers * flops(masks.causal(n), 32, width // 32)
        return attention / (attention + 2 * weights * n)

    rows: list[list[str | float | int | None]] = [[n, share(n)] for n in (1024, 8192, 32_768, 65_536, tokens)]
    table = Table(caption="Attention's share of a forward pass", columns=["tokens", "share"], rows=rows)
    setting = {"width": width, "layers": layers, "feed-forward": inner, "words": words, "tokens": tokens}
    return Measurement.exact(share(tokens), unit="of the operations", setting=setting, tables=[table])


@measures("kernels_agree")
def kernels_agree(run: Run) -> Measurement:
    """The largest error of the output and the gradients, over the largest value of each, kernel by kernel."""
    length, packing = 90, [1, 29, 7, 40, 13]
    factors = {"window": 11, "prefix": 13, "block": 16, "documents": packing}
    every: list[Mask | BlockSparse] = [
        build(length, **{name: value for name, value in factors.items() if name in _takes(build)})
        for build in MASKS.values()
    ]
    every += [block_sparse(length, 4, block=16), variable_block_sparse(length, 4, average=24, least=7)]
    worst, rows = 0.0, list[list[str | float | int | None]]()
    for name, kernel in kernels().items():
        errors = {}
        for mask in every:
            case = Case(mask, 4, 2, 16, torch.float64, backward=True, batch=2)
            if not kernel.refusal(case):
                errors[mask.name] = _error(kernel, case)
        reason = "" if errors else kernel.refusal(Case(every[0], 4, 2, 16, torch.float64, backward=True))
        rows.append([name, kernel.about, len(errors), max(errors.values(), default=None), reason])
        worst = max([worst, *errors.values()])
    columns = ["kernel", "what it is", f"masks of {len(every)}", "largest error", "why none"]
    table = Table(caption="Kernels against the definition, output and gradients", columns=columns, rows=rows)
    return Measurement.exact(worst, unit="of the largest value", setting={"dtype": "float64"}, tables=[table])


def _takes(build: Callable) -> set[str]:
    from inspect import signature

    return set(signature(build).parameters)


def _error(kernel: Kernel, case: Case) -> float:
    def both(attend: Callable) -> list[Tensor]:
        q, k, v, grad = case.tensors(SEED)
        output = attend(q, k, v)
        return [output, *torch.autograd.grad(output, (q, k, v), grad)]

    truth = both(lambda q, k, v: reference(q, k, v, case.mask.dense()))
    ours = both(kernel.prepare(case))
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(ours, truth, strict=True))


async def mask_times(run: Run, kernel: Kernel, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round on each of the twelve masks, in turns; forward."""
    tokens, rounds = (512, 2) if run.smoke else (tokens, rounds)

    def measure() -> dict[str, list[float]]:
        calls = {name: prepare_call(kernel, Case(_of_twelve(name, tokens), **LARGE), "forward", SEED) for name in MASKS}
        return interleaved(calls, rounds=rounds, device="cpu")

    facts = {**LARGE, "tokens": tokens, "rounds": rounds, "seed": SEED, "kernel": kernel.name}
    return await run.trial(f"twelve masks, {kernel.name}", measure, alone=True, **facts)


def _of_twelve(name: str, tokens: int) -> Mask:
    """Windows, prefixes and blocks in proportion to the length, documents from the Pile's histogram."""
    takes = _takes(MASKS[name])
    sizes = {"window": tokens // 8, "prefix": tokens // 4, "block": tokens // 8}
    given: dict[str, Any] = {factor: size for factor, size in sizes.items() if factor in takes}
    return make_mask(name, tokens, seed=SEED, histogram="pile", **given)


async def _over_area(run: Run, kernel: Kernel, tokens: int, rounds: int) -> Measurement:
    times = await mask_times(run, kernel, tokens, rounds)
    tokens = 512 if run.smoke else tokens
    areas = {name: _of_twelve(name, tokens).area for name in times}
    names = sorted(times, key=lambda name: areas[name])
    rows: list[list[str | float | int | None]] = [
        [name, f"{areas[name] / tokens**2:.1%}", 1e3 * min(times[name]), _rate(areas[name], min(times[name]))]
        for name in names
    ]
    columns = ["mask", "kept", "ms", "GFLOP/s"]
    table = Table(caption=f"{kernel.name}, {tokens} tokens, forward", columns=columns, rows=rows)
    return Measurement.of(
        "growth",
        [min(times[name]) for name in names],
        [areas[name] for name in names],
        unit="exponent of time over kept pairs",
        setting={**LARGE, "tokens": tokens, "rounds": rounds, "seed": SEED},
        tables=[table],
    )


def _rate(area: float | int, seconds: float) -> float:
    return 4 * area * LARGE["heads"] * LARGE["head_dim"] / seconds / 1e9


# What the authors timed on an H100: 64 heads of queries on 8 of keys, of width 128, in bfloat16.

ON_GPU: dict[str, Any] = {"heads": 64, "kv_heads": 8, "head_dim": 128}
GPU_KERNELS: Mapping[str, Kernel] = {kernel.name: kernel for kernel in (SDPA(), CuDNN(), Flex())}


async def gpu_point(run: Run, kernel: Kernel, name: str, tokens: int, seed: int) -> Mapping[str, Any]:
    """One kernel on one mask on the run's GPU, forward, by the authors' protocol."""
    device = torch.device(run.device)
    mask = make_mask(name, tokens, seed=seed, histogram="pile" if "documents" in _takes(MASKS[name]) else None)
    case = Case(mask, **ON_GPU, dtype=torch.bfloat16, device=device)
    protocol = PROTOCOLS["smoke" if run.smoke else "paper"]
    judge = Judge(lacks_memory, lacks_operation)
    return await run.trial(
        f"{name}, {kernel.name}",
        lambda: measure(kernel, case, "forward", protocol, judge=judge, seed=seed),
        seed=seed,
        alone=True,
        **ON_GPU,
        dtype="bfloat16",
        tokens=tokens,
        documents="lengths from the Pile's histogram",
        protocol=list(protocol),
    )


@measures("sdpa_documents_gpu")
async def sdpa_documents_gpu(run: Run, tokens: int = 32_768) -> Measurement:
    """SDPA with a dense mask, a packing a seed; beside it the other kernels, and masks that need no dense one."""
    if not run.device.startswith("cuda"):
        return Measurement.not_measured("an H100: --device cuda")
    tokens = 1024 if run.smoke else tokens
    packed = [await gpu_point(run, SDPA(), "causal_document", tokens, seed) for seed in run.seeds]
    for point in packed:
        if point["status"] != "ok":
            raise UserError(f"sdpa on causal_document: {point['status']}, {point['reason']}")
    first = run.seeds[0]
    rows: list[list[str | float | int | None]] = []
    for name in ("full", "causal", "full_document", "causal_document"):
        points = [await gpu_point(run, kernel, name, tokens, first) for kernel in GPU_KERNELS.values()]
        rows.append([name, *(point["tflops"] if point["status"] == "ok" else point["status"] for point in points)])
    caption = f"{tokens} tokens, forward, TFLOP/s"
    return Measurement.mean(
        [point["tflops"] for point in packed],
        seeds=run.seeds,
        unit="TFLOP/s",
        setting={
            **ON_GPU,
            "dtype": "bfloat16",
            "tokens": tokens,
            "protocol": "5 calls to warm up, 20 timed, cache flushed",
        },
        tables=[Table(caption=caption, columns=["mask", *GPU_KERNELS], rows=rows)],
        note="Documents are drawn from the Pile's histogram, the authors' page has none longer than a quarter.",
    )


@clock
@measures("time_over_area")
async def time_over_area(run: Run, tokens: int = 4096, rounds: int = 5) -> Measurement:
    """Of attention that skips blocks."""
    return await _over_area(run, Blockwise(), tokens, rounds)


@clock
@measures("explicit_over_area")
async def explicit_over_area(run: Run, tokens: int = 2048, rounds: int = 5) -> Measurement:
    """Of explicit attention."""
    return await _over_area(run, Naive(), tokens, rounds)


@measures("same_cases")
def same_cases(run: Run, tokens: int = 8192) -> Measurement:
    """How many of the twelve masks another process draws alike, tensors and counts included."""
    ours = fingerprints(tokens)
    code = (
        "import json; from provenn.papers.long_context_bench.experiments import fingerprints; "
        f"print(json.dumps(fingerprints({tokens})))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    theirs = json.loads(output.splitlines()[-1])
    alike = sum(ours[name] == theirs.get(name) for name in ours)
    rows: list[list[str | float | int | None]] = [[name, ours[name]] for name in ours]
    table = Table(caption="Checksums of slices, work and queries", columns=["mask", "checksum"], rows=rows)
    return Measurement.exact(alike, unit="masks of twelve", setting={"tokens": tokens, "seed": SEED}, tables=[table])


def fingerprints(tokens: int) -> dict[str, str]:
    """A checksum of each mask's slices, its count of work and the queries of a case."""
    sums = {}
    for name in MASKS:
        mask = make_mask(name, tokens, seed=SEED)
        queries = Case(mask, 1, 1, 2).tensors(SEED)[0]
        said = f"{mask.slices} {flops(mask, 64, 128)} {queries.flatten()[:64].tolist()}"
        sums[name] = hashlib.sha256(said.encode()).hexdigest()[:16]
    return sums


@clock
@measures("spread_of_repeats")
async def spread_of_repeats(run: Run, tokens: int = 2048, repetitions: int = 20) -> Measurement:
    """(80 % − 20 %) / median of the protocol's repetitions, over several runs of it."""
    tokens, repetitions = (512, 4) if run.smoke else (tokens, repetitions)
    protocol = Protocol(2, repetitions)

    def measure(seed: int) -> float:
        device = torch.device("cpu")
        case = Case(masks.causal(tokens), **SMALL)
        seconds, _ = time_call(prepare_call(Blockwise(), case, "forward", seed), device, protocol, Stopwatch(device))
        median, low, high = quantiles(seconds)
        return (high - low) / median

    setting: dict[str, Any] = {**SMALL, "tokens": tokens, "repetitions": repetitions, "warm-ups": protocol.warmups}
    values = [
        await run.trial("spread", partial(measure, seed), alone=True, of_seed=seed, **setting) for seed in run.seeds
    ]
    return Measurement.mean(values, seeds=run.seeds, unit="of the median", setting=setting)


# Several processes

SCALES = (8, 16, 32, 64)  # processes, of 8K tokens each
A_SHARE = 8192
GROUPED, EACH = Heads(64, 8, 128), Heads(64, 64, 128)
PARALLEL_MASKS = ("full", "causal", "full_document", "causal_document")
RAGGED = (1, 13, 40, 74)  # lengths that no number of processes divides


WINDOWED = {"usp": {"ulysses": 1}, "loongtrain": {"ulysses": 1, "windows": 2}}  # the double ring of two windows


def compared(name: str, ranks: int, *, real: bool = False, options: dict[str, dict[str, Any]] | None = None) -> Report:
    """The methods on one mask of ragged documents, against one process: all five, or those that have `options`."""
    documents = {"documents": RAGGED} if "document" in name else {}
    mask = MASKS[name](sum(RAGGED), **documents)
    dtype = torch.float32 if real else torch.float64
    run = launch if real else simulate
    methods = None if options is None else list(options)
    return bench(
        mask, ranks, heads=(8, 4), dim=8, methods=methods, options=options, dtype=dtype, seed=SEED, rounds=1, run=run
    )


def _errors(reports: dict[str, Report], **setting: Any) -> Measurement:
    ran = [(label, row) for label, report in reports.items() for row in report.rows if row.status != "unsupported"]
    rows: list[list[str | float | int | None]] = [
        [label, row.method, f"{row.ring} × {row.ulysses}", row.windows, row.error] for label, row in ran
    ]
    columns = ["mask and processes", "method", "R × U", "W", "largest error"]
    table = Table(caption="Context parallelism against one process, output and gradients", columns=columns, rows=rows)
    worst = max(row.error for _, row in ran)
    setting = {"heads": "8:4", "width": 8, "documents": list(RAGGED), "seed": SEED, **setting}
    return Measurement.exact(worst, unit="of the largest value", setting=setting, tables=[table])


@measures("processes_agree")
def processes_agree(run: Run) -> Measurement:
    """Five methods over gloo in float32, against blockwise attention in float64."""
    cases = (("causal", 2), ("causal_document", 4))
    reports = {f"{name}, {n}": compared(name, n, real=True) for name, n in cases}
    reports |= {f"{name}, 4, U = 1": compared(name, 4, real=True, options=WINDOWED) for name, _ in cases}
    return _errors(reports, dtype="float32")


@measures("volumes_counted")
def volumes_counted(run: Run) -> Measurement:
    """Elements in the collectives, forward and backward, operator by operator, against the formulas."""
    ran = [(name, row) for name in PARALLEL_MASKS for row in compared(name, 4).rows if row.status != "unsupported"]
    rows: list[list[str | float | int | None]] = [
        [name, row.method, f"{row.ring} × {row.ulysses}", row.elements("forward"), row.elements("backward"),
         "yes" if row.as_formula else "no"]
        for name, row in ran
    ]  # fmt: skip
    columns = ["mask", "method", "R × U", "forward", "backward", "as the formulas"]
    table = Table(caption="Elements that a process of four sends, heads 8:4 of width 8", columns=columns, rows=rows)
    equal = sum(row.as_formula is True for _, row in ran)
    setting = {"processes": 4, "heads": "8:4", "width": 8, "tokens": sum(RAGGED), "documents": list(RAGGED)}
    return Measurement.exact(equal / len(ran), unit=f"share of {len(ran)} cases", setting=setting, tables=[table])


class Rounded(Ring):
    """A ring whose running output is kept in the precision of its inputs."""

    name = "rounded"

    def forward(self, spread: Sharing, inputs: Inputs) -> tuple[Tensor, Tensor]:
        total = Partial(inputs.q, inputs.v.shape[-1])

        def visit(source: int, kv: Tensor) -> None:
            attend(with_keys(inputs, kv), spread.pair(source), total)
            total.output.copy_(total.output.to(inputs.q.dtype))

        self.go_round(spread, pack(inputs.k, inputs.v), visit)
        return total.output, total.lse


RINGS = (1, 4, 16, 32)  # processes
PRECISE: dict[str, Any] = {"heads": 4, "width": 64, "tokens": 512, "dtype": "bfloat16"}


def ring_error(method: Method, ranks: int, seed: int) -> list[float]:
    """‖ours − exact‖ / ‖exact‖ of the output and of each gradient, exact being one process in float64."""
    pattern = Pattern.of_documents([PRECISE["tokens"]])
    case = BenchCase(method.name, {}, pattern, Heads(4, 4, PRECISE["width"]), torch.bfloat16, seed)
    drawn = draw(case)

    def both(method: Method, ranks: int, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, grad = (x.to(dtype) for x in drawn)
        for x in (q, k, v):
            x.requires_grad_()
        output = Simulation(method, ranks, pattern).attend(q, k, v)
        return [output, *torch.autograd.grad(output, (q, k, v), grad)]

    ours, exact = both(method, ranks, torch.bfloat16), both(Ring(), 1, torch.float64)
    return [float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(ours, exact, strict=True)]


@measures("ring_precision")
async def ring_precision(run: Run) -> Measurement:
    """The output's error of a ring of 32 that keeps its running output in bfloat16, over that of one that does not."""
    rings = RINGS[:2] if run.smoke else RINGS
    errors = {
        method.name: [
            await run.trials(f"error of {method.name}", partial(ring_error, method, ranks), ranks=ranks, **PRECISE)
            for ranks in rings
        ]
        for method in (Ring(), Rounded())
    }
    rows: list[list[str | float | int | None]] = [
        [name, ranks, *(sum(column) / len(column) for column in zip(*seeds, strict=True))]
        for name, of_ranks in errors.items()
        for ranks, seeds in zip(rings, of_ranks, strict=True)
    ]
    columns = ["ring", "processes", "output", "gradient of queries", "of keys", "of values"]
    table = Table(caption="Errors in bfloat16 over the norm, mean of the seeds", columns=columns, rows=rows)
    sides = [[errors_of_seed[0] for errors_of_seed in errors[name][-1]] for name in ("rounded", "ring")]
    setting = {**PRECISE, "processes": rings[-1]}
    return Measurement.ratio(*sides, seeds=run.seeds, unit="times the error", setting=setting, tables=[table])


def _sends(run: Run, method: str) -> Measurement:
    sent = {
        name: [float(volume(name, n, A_SHARE * n, EACH, **_mesh(name)).forward) for n in SCALES] for name in METHODS
    }
    rows: list[list[str | float | int | None]] = [
        [n, *(values[i] / 2**20 for values in sent.values())] for i, n in enumerate(SCALES)
    ]
    caption = "Mi elements that a process sends forward, heads 64:64 of width 128"
    return Measurement.of(
        "growth",
        sent[method],
        SCALES,
        unit="exponent of elements over processes",
        setting={"tokens of a process": A_SHARE, "heads": "64:64", "width": 128},
        tables=[Table(caption=caption, columns=["processes", *sent], rows=rows)],
    )


def _mesh(name: str) -> dict[str, int]:
    """Eight processes of a server divide the heads, where a method has both."""
    return {"ulysses": 8} if name in ("usp", "loongtrain") else {}


@measures("ring_volume")
def ring_volume(run: Run) -> Measurement:
    """At 8K tokens a process."""
    return _sends(run, "ring")


@measures("ulysses_volume")
def ulysses_volume(run: Run) -> Measurement:
    """At 8K tokens a process."""
    return _sends(run, "ulysses")


@measures("padding_is_small")
async def padding_is_small(run: Run, ranks: int = 64, histogram: str = "prolong64k") -> Measurement:
    """Of the histogram with most short documents in half a million tokens."""

    def count(seed: int) -> float:
        mask = make_mask("causal_document", A_SHARE * ranks, histogram=histogram, seed=seed)
        return cost("ring", ranks, pattern_of(mask), GROUPED).padding

    values = await run.trials("padding of a ring", count, histogram=histogram, ranks=ranks)
    setting = {"processes": ranks, "tokens": A_SHARE * ranks, "histogram": histogram}
    return Measurement.mean(values, seeds=run.seeds, unit="share of places", setting=setting)


@measures("quickest_methods")
def quickest_methods(run: Run) -> Measurement:
    """How many different methods are the quickest of the model of time, over masks, scales and heads."""
    rows: list[list[str | float | int | None]] = []
    for label, heads in (("64:8", GROUPED), ("64:64", EACH)):
        for name in PARALLEL_MASKS:
            quickest = [
                plan(n, pattern_of(make_mask(name, A_SHARE * n, seed=SEED)), heads)[0].method for n in (*SCALES, 96)
            ]
            rows.append([label, name, *quickest])
    different = {str(method) for row in rows for method in row[2:]}
    columns = ["heads", "mask", *(f"{n} processes" for n in (*SCALES, 96))]
    table = Table(caption="The quickest by the model of time: 600 TFLOP/s, 400 and 50 GB/s", columns=columns, rows=rows)
    setting = {"tokens of a process": A_SHARE, "seed": SEED, "processes of a server": 8}
    return Measurement.exact(len(different), unit="methods", setting=setting, tables=[table])


async def _plan_scored(
    run: Run, score: Callable[[Mapping[str, float], Mapping[str, int]], float], unit: str
) -> Measurement:
    """A score of the model's seconds in each cell of the authors' table, mean of the cells; a packing a seed."""

    def cells(seed: int) -> list[list[float]]:
        scores = []
        for name in PARALLEL_MASKS:
            of_mask = []
            for n in RANKS:
                pattern = pattern_of(make_mask(name, A_SHARE * n, seed=seed))
                costs = {choice.method: choice.cost for choice in plan(n, pattern, GROUPED) if choice.cost is not None}
                for direction in ("forward", "backward"):
                    seconds = {method: float(getattr(each, direction)) for method, each in costs.items()}
                    of_mask.append(score(seconds, published_rates(name, direction, n)))
            scores.append(of_mask)
        return scores

    every = await run.trials(unit, cells, **{"tokens of a process": A_SHARE, "processes": list(RANKS)})
    values = [sum(map(sum, scores)) / sum(map(len, scores)) for scores in every]
    rows: list[list[str | float | int | None]] = [
        [name, *(sum(scores[i][j] for scores in every) / len(every) for j in range(2 * len(RANKS)))]
        for i, name in enumerate(PARALLEL_MASKS)
    ]
    columns = ["mask", *(f"{n}, {direction}" for n in RANKS for direction in ("forward", "backward"))]
    table = Table(caption=f"By mask, processes and direction: {unit}", columns=columns, rows=rows)
    setting = {"tokens of a process": A_SHARE, "heads": "64:8", "cells": len(RATES) * len(RANKS)}
    return Measurement.mean(values, seeds=run.seeds, unit=unit, setting=setting, tables=[table])


@measures("plan_order")
async def plan_order(run: Run) -> Measurement:
    """Of the model's order of five methods with that of the authors' clocks."""
    return await _plan_scored(run, order_agrees, "rank correlation")


@measures("plan_loss")
async def plan_loss(run: Run) -> Measurement:
    """What the method that the model calls quickest reaches by the authors' clocks, of what the quickest reaches."""
    return await _plan_scored(run, share_reached, "share of the best rate")


# What the authors' code counts


@measures("window_pairs_counted")
def window_pairs_counted(run: Run, tokens: int = 4096, window: int = 1024) -> Measurement:
    """The authors' count takes the window (w, 0) for both; their kernels get (w, w)."""
    counted_pairs = masks.causal_sliding_window(tokens, window=window).area
    computed = masks.full_sliding_window(tokens, window=window).area
    setting = {"tokens": tokens, "window": window}
    return Measurement.exact(counted_pairs / computed, unit="of the pairs", setting=setting)


@measures("global_pairs_counted")
def global_pairs_counted(run: Run, tokens: int = 2048) -> Measurement:
    """The largest share over three windows; the table has all."""
    rows: list[list[str | float | int | None]] = []
    for window in (64, 256, 600):
        theirs = sum(each.area for each in global_slices_of_the_authors(tokens, window))
        computed = masks.global_sliding(tokens, window=window).area
        rows.append([window, theirs, computed, theirs / computed])
    columns = ["window", "pairs in their slices", "pairs in their predicate", "share"]
    table = Table(caption=f"Global sliding window, {tokens} tokens", columns=columns, rows=rows)
    share = max(float(row[-1] or 0) for row in rows)
    return Measurement.exact(share, unit="of the pairs", setting={"tokens": tokens}, tables=[table])


def global_slices_of_the_authors(tokens: int, window: int) -> list[Slice]:
    """What `generate_global_sliding_window_mask` of their code lists."""
    band = masks.full_sliding_window(tokens - window, window=window).slices
    shifted = [
        Slice(each.q_start + window, each.q_end + window, each.k_start + window, each.k_end + window, each.kind)
        for each in band
    ]
    columns = [
        Slice(0, tokens, 0, window, "causal"),
        Slice(0, window, window, tokens, "causal"),
    ]
    return [*columns, *shifted]

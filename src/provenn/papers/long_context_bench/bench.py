"""`provenn bench long_context_bench`: kernels on masks over lengths, or context parallelism over processes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch

from provenn.core.cost import peak_activation_bytes
from provenn.core.errors import UserError
from provenn.evidence.measurement import Table, lacks_memory, lacks_operation
from provenn.evidence.sweep import Point, Row, Sweep
from provenn.papers.long_context_bench import documents as lengths_of
from provenn.papers.long_context_bench.kernels import Case, Kernel, pick
from provenn.papers.long_context_bench.masks import MASKS, Mask, make_mask
from provenn.papers.long_context_bench.pictures import draw_masks, draw_rates
from provenn.papers.long_context_bench.sparse import BlockSparse, block_sparse, variable_block_sparse
from provenn.papers.long_context_bench.timing import PROTOCOLS, Direction, Judge, Protocol, flops, measure

MOST_DIGITS = 12  # of a length
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
# How a block-sparse mask is made, and which of its sizes --block is.
SPARSE: dict[str, tuple[Callable[..., BlockSparse], str]] = {
    "block_sparse": (block_sparse, "block"),
    "variable_block_sparse": (variable_block_sparse, "average"),
}
JUDGE = Judge(lacks_memory, lacks_operation, peak_activation_bytes)


def sweep(
    *,
    mask: str = "causal",
    length: str = "2k",
    kernels: str = "all",
    heads: str = "64:8",
    head_dim: int = 128,
    dtype: str = "",
    direction: str = "forward,backward",
    documents: Path | None = None,
    histogram: str | None = None,
    long: bool = False,
    window: int | None = None,
    prefix: int | None = None,
    block: int | None = None,
    density: float = 0.5,
    ranks: int = 0,
    methods: str = "all",
    ulysses: int | None = None,
    windows: int | None = None,
    show: bool = False,
    seed: int = 42,
    device: str = "cpu",
    budget: str = "small",
) -> Sweep:
    """Kernels on masks over lengths: throughput, memory, and what cannot run and why.

    Args:
        mask: names with commas; all is the twelve; block_sparse and variable_block_sparse are the dynamic ones.
        length: tokens, such as 2048, 1k,4k,16k or 1k:48k, which doubles.
        kernels: names with commas or .py files; all is every one.
        heads: of queries and of keys.
        head_dim: d.
        dtype: bf16, fp16, fp32 or fp64; bf16 on a GPU and fp32 elsewhere by default.
        direction: forward, backward, both (as one call), or several with commas.
        documents: a file of document lengths.
        histogram: that document lengths are drawn from: pile, prolong64k or prolong512k.
        long: 60 % of the tokens are in documents of 8K to 30K.
        window: w.
        prefix: P.
        block: of block_causal_document and of block-sparse masks.
        density: the share that block-sparse masks keep.
        ranks: so many processes, which compare context-parallel methods instead of kernels.
        methods: of context parallelism, with commas; all is every one.
        ulysses: U of usp and loongtrain, processes that divide the heads; must divide ranks. Default: 2 where it does.
        windows: W of loongtrain's double ring; must divide the ring of ranks / U. Default: the largest W ≤ R / W.
        show: draw the masks and count, and time nothing.
        seed: of masks and numbers; 42 is the authors'.
        device: where it runs.
        budget: smoke, small or paper (5 warm-ups and 20 repetitions).
    """
    chosen_device = torch.device(device)
    if dtype and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    directions = cast("list[Direction]", _names("direction", direction, get_args(Direction)))
    names = list(MASKS) if mask == "all" else [name.replace("-", "_") for name in _split(mask)]
    if not names or not _split(length):
        raise UserError(f"mask takes names such as causal, and length tokens such as 2048, got {mask!r} and {length!r}")
    query_heads, key_heads = _heads(heads)
    factors = {"window": window, "prefix": prefix, "block": block}
    listed = lengths_of.read_lengths(documents) if documents is not None else None

    def build(name: str, tokens: int) -> Mask | BlockSparse:
        if name in SPARSE:
            make, size = SPARSE[name]
            sized = {} if block is None else {size: block}
            return make(tokens, query_heads, density=density, seed=seed, **sized)
        given = {key: value for key, value in factors.items() if len(names) == 1 or _takes(name, key)}
        packed = lengths_of.take(listed, tokens) if listed is not None and _takes(name, "documents") else None
        return make_mask(name, tokens, documents=packed, histogram=histogram, long=long, seed=seed, **given)

    masks = {(name, tokens): build(name, tokens) for name in names for tokens in _lengths(length)}
    if show:
        return _shown(masks, query_heads, head_dim)
    chosen_dtype = dtype or ("bf16" if chosen_device.type == "cuda" else "fp32")
    facts: dict[str, Any] = {
        "heads": heads,
        "head_dim": head_dim,
        "dtype": chosen_dtype,
        "seed": seed,
        "budget": budget,
    }
    if ranks:
        return _parallel(masks, ranks, methods, {"ulysses": ulysses, "windows": windows}, facts)
    if ulysses is not None or windows is not None:
        raise UserError("ulysses and windows are of context parallelism: give ranks too")
    protocol = PROTOCOLS[budget]
    points = []
    for of in masks.values():
        for way in directions:
            case = Case(
                of, query_heads, key_heads, head_dim, DTYPES[chosen_dtype], chosen_device, backward=way != "forward"
            )
            for kernel in pick(_split(kernels)).values():
                points.append(_point(kernel, case, way, protocol, {**facts, "device": _device(chosen_device)}))
    title = f"attention, heads {heads}, width {head_dim}, {chosen_dtype}"
    return Sweep(title, points, _tables, partial(draw_rates, title=title))


def _point(kernel: Kernel, case: Case, direction: Direction, protocol: Protocol, more: Mapping[str, Any]) -> Point:
    mask = case.mask
    facts = {
        "mask": mask.name,
        "length": mask.length,
        "direction": direction,
        "kernel": kernel.name,
        "area": mask.area,  # which distinguishes masks of one name
        "factors": dict(mask.factors) if isinstance(mask, Mask) else {"density": mask.density},
        "documents": len(mask.documents) if isinstance(mask, Mask) and mask.documents else 0,
        **more,
    }
    label = f"{mask.name} {mask.length} {direction} {kernel.name}"
    seed = int(more["seed"])
    return Point(facts, lambda: measure(kernel, case, direction, protocol, judge=JUDGE, seed=seed), label)


def cell(row: Row) -> str:
    """What a table says of a point: its rate in TFLOP/s, or why there is none."""
    if row["status"] != "ok":
        return str(row["status"])
    return f"{row['tflops']:.3g} ({row['low']:.3g} to {row['high']:.3g})"


def _tables(rows: Sequence[Row]) -> list[Table]:
    """One a mask and direction: TFLOP/s of each kernel at each length; then memory, and reasons."""
    tables = []
    for mask, direction in dict.fromkeys((row["mask"], row["direction"]) for row in rows):
        mine = [row for row in rows if (row["mask"], row["direction"]) == (mask, direction)]
        kernels, lengths = (list(dict.fromkeys(row[key] for row in mine)) for key in ("kernel", "length"))
        found = {(row["length"], row["kernel"]): row for row in mine}
        area = {row["length"]: row["area"] for row in mine}
        body: list[list[str | float | int | None]] = [
            [n, f"{area[n] / n**2:.2%}", *(cell(found[n, kernel]) for kernel in kernels)] for n in lengths
        ]
        caption = f"{mask}, {direction}: TFLOP/s by the pairs that the mask keeps, median (20 % to 80 %)"
        tables.append(Table(caption=caption, columns=["tokens", "kept", *kernels], rows=body))
        if any(row.get("peak_bytes") for row in mine):
            memory: list[list[str | float | int | None]] = [
                [n, *(_megabytes(found[n, kernel]) for kernel in kernels)] for n in lengths
            ]
            caption = f"{mask}, {direction}: most memory that a call holds, MiB"
            tables.append(Table(caption=caption, columns=["tokens", *kernels], rows=memory))
    reasons = {(row["kernel"], row["status"], row["reason"]): None for row in rows if row["status"] != "ok"}
    if reasons:
        caption = "What did not run, and why"
        tables.append(
            Table(caption=caption, columns=["kernel", "outcome", "reason"], rows=[list(reason) for reason in reasons])
        )
    return tables


def _megabytes(row: Row) -> str:
    peak = row.get("peak_bytes")
    return "" if row["status"] != "ok" or peak is None else f"{peak / 2**20:.1f}"


def _shown(masks: Mapping[tuple[str, int], Mask | BlockSparse], heads: int, head_dim: int) -> Sweep:
    def count(mask: Mask | BlockSparse) -> dict[str, Any]:
        static = mask if isinstance(mask, Mask) else None
        return {
            "area": mask.area,
            "kept": mask.area / mask.length**2,
            "slices": len(static.slices) if static else None,
            "documents": len(static.documents) if static and static.documents else None,
            "factors": dict(mask.factors) if isinstance(mask, Mask) else {"density": mask.density},
            "gflops": flops(mask, heads, head_dim) / 1e9,
            "told": f"keeps {mask.area / mask.length**2:.2%} of the pairs",
        }

    def tables(rows: Sequence[Row]) -> list[Table]:
        body: list[list[str | float | int | None]] = [
            [
                row["mask"],
                row["length"],
                row["area"],
                f"{row['kept']:.2%}",
                row["slices"],
                row["documents"],
                ", ".join(f"{name} {round(value, 3)}" for name, value in row["factors"].items()),
                f"{row['gflops']:,.1f}",
            ]
            for row in rows
        ]
        columns = ["mask", "tokens", "pairs", "kept", "slices", "documents", "drawn", "GFLOPs forward"]
        return [Table(caption=f"Masks; FLOPs of {heads} heads of width {head_dim}", columns=columns, rows=body)]

    points = [
        Point({"mask": name, "length": tokens}, partial(count, mask), f"{name} {tokens}")
        for (name, tokens), mask in masks.items()
    ]
    return Sweep("masks", points, tables, lambda rows: draw_masks(list(masks.values())))


def _parallel(
    masks: Mapping[tuple[str, int], Mask | BlockSparse],
    ranks: int,
    methods: str,
    sizes: Mapping[str, int | None],
    facts: dict[str, Any],
) -> Sweep:
    """Context parallelism over real processes, one point a mask and length: all methods, beside one process."""
    from provenn.papers.long_context_bench import context_parallel

    if ranks < 1:
        raise UserError(f"ranks must be at least 1, got {ranks}")
    names = list(context_parallel.METHODS) if methods == "all" else _names("methods", methods, context_parallel.METHODS)
    options = _sized(names, ranks, sizes, _heads(facts["heads"]))

    def run(mask: Mask) -> dict[str, Any]:
        report = context_parallel.bench(
            mask,
            ranks,
            heads=_heads(facts["heads"]),
            dim=facts["head_dim"],
            methods=names,
            options=options,
            dtype=DTYPES[facts["dtype"]],
            seed=facts["seed"],
            rounds=1 if facts["budget"] == "smoke" else 3,
        )
        columns, rows = report.table()
        good = "equal to exact attention" if report.good else "NOT equal to exact attention"
        return {**report.facts(), "columns": list(columns), "table": [list(row) for row in rows], "told": good}

    def tables(rows: Sequence[Row]) -> list[Table]:
        return [
            Table(
                caption=f"{row['mask']}, {row['length']} tokens over {ranks} processes; elements that a process sends",
                columns=row["columns"],
                rows=row["table"],
            )
            for row in rows
        ]

    points = []
    for (name, tokens), mask in masks.items():
        if not isinstance(mask, Mask):
            raise UserError(f"context parallelism takes no mask {name}")
        point = {"mask": name, "length": tokens, "ranks": ranks, "methods": names, "area": mask.area, **facts}
        point |= {name: size for name, size in sizes.items() if size is not None}
        points.append(Point(point, partial(run, mask), f"{name} {tokens} over {ranks} processes"))
    return Sweep(f"context parallelism over {ranks} processes", points, tables)


def _sized(
    names: Sequence[str], ranks: int, sizes: Mapping[str, int | None], heads: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    """The options of USP and LoongTrain that U and W make; sizes that do not divide are refused at once."""
    from provenn.distributed import Pattern, method_called

    given = {name: size for name, size in sizes.items() if size is not None}
    takers = {"ulysses": ("usp", "loongtrain"), "windows": ("loongtrain",)}
    for key in given:
        if not {*takers[key]} & {*names}:
            raise UserError(f"{key} is of {' and '.join(takers[key])} alone")
    if "windows" in given and ranks % 2 == 0:
        given.setdefault("ulysses", 2)
    options = {name: {key: size for key, size in given.items() if name in takers[key]} for name in names}
    options = {name: own for name, own in options.items() if own}
    for name, own in options.items():
        method_called(name, **own).check(Pattern.of_documents([1]), ranks, *heads)
    return options


def _lengths(text: str) -> list[int]:
    """2048, 1k,4k or 1k:48k, which doubles from the first and ends with the last."""
    lengths: list[int] = []
    for part in _split(text):
        ends = [_tokens(end) for end in part.split(":")]
        if len(ends) > 2 or ends[0] > ends[-1]:
            raise UserError(f"length takes tokens such as 2048, 1k,4k or 1k:48k, got {part!r}")
        while ends[0] < ends[-1]:
            lengths.append(ends[0])
            ends[0] *= 2
        lengths.append(ends[-1])
    return list(dict.fromkeys(lengths))


def _tokens(text: str) -> int:
    digits, many = text.strip().lower(), 1
    if digits.endswith("k"):
        digits, many = digits[:-1], 1024
    if not digits.isdecimal() or len(digits) > MOST_DIGITS:
        raise UserError(f"length takes tokens such as 2048, 1k,4k or 1k:48k, got {text[:40]!r}")
    if int(digits) < 1:
        raise UserError(f"a mask has a length of at least 1, got {text}")
    return int(digits) * many


def _heads(text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) not in (1, 2) or not all(part.isdecimal() for part in parts):
        raise UserError(f"heads takes those of queries and of keys, such as 64:8, got {text!r}")
    heads = int(parts[0]), int(parts[-1])
    if min(heads) < 1 or heads[0] % heads[1]:
        raise UserError(f"heads must be at least 1 and key heads divide query heads, got {text}")
    return heads


def _names(option: str, text: str, known: Any) -> list[str]:
    names = _split(text)
    if not names or not set(names) <= set(known):
        raise UserError(f"{option} takes some of {', '.join(known)}; got {text!r}")
    return names


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _takes(name: str, factor: str) -> bool:
    from inspect import signature

    return name in MASKS and factor in signature(MASKS[name]).parameters


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"

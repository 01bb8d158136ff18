"""`provenn bench little_attention`: what each block costs at each stage, and the search for places.

    provenn bench little_attention --blocks cnl,se,nonlocal --batch 1,8
    provenn bench little_attention --search stages --data photos/ --store places.journal

C-NL is our reconstruction.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from provenn.core.cost import interleaved
from provenn.core.errors import UserError
from provenn.evidence.measurement import Table
from provenn.evidence.sweep import Point, Row, Sweep, parse_numbers
from provenn.papers.little_attention.bench.search import KINDS, Search, pareto_front
from provenn.papers.little_attention.model import cnl_regions, resnet50_reid, resnet101_reid
from provenn.papers.little_attention.placement import Placement
from provenn.papers.little_attention.zoo import BLOCKS

ROUNDS = {"smoke": 1, "small": 9, "paper": 51}
NETWORKS: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, int]]] = {  # build, depths, size of a picture
    "regions": (cnl_regions, (1, 1, 2), (64, 32)),
    "resnet50": (resnet50_reid, (3, 4, 6, 3), (256, 128)),
    "resnet101": (resnet101_reid, (3, 4, 23, 3), (256, 128)),
}


def sweep(
    *,
    network: str = "resnet50",
    blocks: str = "cnl,se,nonlocal",
    batch: str = "1,8",
    search: str = "",
    data: str = "cameras",
    trials: int = 32,
    epochs: int = 12,
    lr: float = 3e-3,
    store: str = "",
    seed: int = 0,
    device: str = "cpu",
    budget: str = "small",
) -> Sweep:
    """Time of attention by block, stage and batch, in turns; or, with --search, where one block had best go.

    Args:
        network: regions, resnet50 or resnet101.
        blocks: names with commas, such as cnl,se,rga_sc; a wrong one is answered with all; of a search the first.
        batch: pictures at once, with commas; of a search the first.
        search: stages (every set of them), narrow (rules make the space smaller) or blocks (off, pre, post, evolved).
        data: what a search trains on and validates with, cameras or a folder; its test split is never read.
        trials: of a search over narrow or blocks.
        epochs: of each short training.
        lr: of each short training.
        store: a file in which a search is kept, to go on with --resume; by default it is forgotten at the end.
        seed: of the search, and of its trainings.
        device: where it runs.
        budget: smoke, small or paper (1, 9 or 51 rounds of time).
    """
    if network not in NETWORKS:
        raise UserError(f"--network must be one of {', '.join(NETWORKS)}, got {network!r}")
    names = [name.strip() for name in blocks.split(",")]
    if wrong := next((name for name in names if name not in BLOCKS), None):
        raise UserError(f"--blocks: no block is called {wrong!r}; there are: {', '.join(BLOCKS)}")
    batches = parse_numbers("--batch", batch, int)
    for name, value in (("batch", min(batches)), ("trials", trials), ("epochs", epochs)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if search:
        if search not in KINDS:
            raise UserError(f"--search must be one of {', '.join(KINDS)}, got {search!r}")
        build, depths, size = NETWORKS[network]
        data = str(Path(data).resolve()) if Path(data).exists() else data  # trials elsewhere stand in another folder
        wanted = Search(
            search, build, depths, size, names[0], batches[0], data, trials, epochs, lr, store, seed, device, budget
        )
        return wanted.sweep()
    stages = range(1, len(NETWORKS[network][1]) + 1)
    points = [
        Point(
            {
                "network": network,
                "batch": n,
                "stage": stage,
                "blocks": ",".join(names),
                "device": device,
                "rounds": ROUNDS[budget],
            },
            partial(measure, network, names, stage, n, device, ROUNDS[budget]),
            f"stage {stage}, batch {n}",
        )
        for n in batches
        for stage in stages
    ]
    return Sweep("attention after a stage", points, partial(tables, names))


def measure(network: str, blocks: Sequence[str], stage: int, batch: int, device: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of the plain network and of one block after a stage, in turns, and what each adds."""
    build, depths, size = NETWORKS[network]
    place = str(Placement.of_stages([stage], depths))
    x = torch.randn(batch, 3, *size, device=device)
    models = {"plain": build(placement="none")}
    models |= {name: build(placement=place, block=name, size=size) for name in blocks}
    calls = {name: partial(_forward, model.eval().to(device), x) for name, model in models.items()}
    seconds = interleaved(calls, rounds=rounds, device=device, min_time=0.02 if rounds > 1 else 0.0)
    plain = seconds["plain"]
    ratios = {name: median(a / b for a, b in zip(seconds[name], plain, strict=True)) for name in blocks}
    return {
        "status": "ok",
        "place": place,
        "plain": 1e3 * median(plain),
        **{name: 100 * (ratios[name] - 1) for name in blocks},
        "told": ", ".join(f"{name} {100 * (ratio - 1):+.0f} %" for name, ratio in ratios.items()),
    }


def tables(blocks: Sequence[str], rows: Sequence[Row]) -> list[Table]:
    """What each block adds to the time, in per cent."""
    cells = [
        [row["batch"], row["place"], round(row["plain"], 2), *(round(row[name], 1) for name in blocks)] for row in rows
    ]
    caption = "Per cent of time that one block adds, beside the plain network in the same rounds"
    return [Table(caption=caption, columns=["batch", "after", "plain, ms", *blocks], rows=cells)]


def latency_table(
    device: str = "cpu",
    *,
    network: str = "resnet50",
    blocks: Sequence[str] = ("cnl", "se", "nonlocal"),
    batches: Sequence[int] = (1, 8),
    rounds: int = 50,
) -> list[dict[str, Any]]:
    """A row for each batch and stage: milliseconds of the plain network, and per cent that each block adds.

    Args:
        device: of torch; of a CPU the time of one thread counts.
        network: a key of `NETWORKS`.
        blocks: keys of `BLOCKS`.
        batches: pictures at once.
        rounds: of all in turns; medians count.
    """
    stages = range(1, len(NETWORKS[network][1]) + 1)
    return [
        {"batch": n, "stage": stage, **measure(network, blocks, stage, n, device, rounds)}
        for n in batches
        for stage in stages
    ]


@torch.no_grad()
def _forward(model: nn.Module, x: torch.Tensor) -> object:
    return model(x)


__all__ = ["NETWORKS", "latency_table", "measure", "pareto_front", "sweep", "tables"]

"""`provenn bench wings --length …`: memory of the router's two forms; with --original, the forgetting report.

provenn bench wings --length 256,1024
provenn bench wings --original runs/chat --tuned runs/plain,runs/wings --data chats/
"""

from functools import partial
from pathlib import Path

from provenn.core.errors import UserError
from provenn.evidence.sweep import Point, Sweep, parse_numbers
from provenn.papers.wings.bench.forgetting import (
    CURVES,
    Curves,
    ForgettingReport,
    ModelScores,
    divide_talks,
    forgetting_report,
    measure_model,
)
from provenn.papers.wings.bench.router_memory import draw_router, measure_router, router_tables
from provenn.papers.wings.bench.runs import Asked, draw_report, report_points, report_tables

__all__ = [
    "Curves",
    "ForgettingReport",
    "ModelScores",
    "divide_talks",
    "forgetting_report",
    "measure_model",
    "sweep",
]


def sweep(
    *,
    length: str = "256,512,1024,2048",
    dim: int = 512,
    heads: int = 8,
    batch: int = 1,
    original: Path | None = None,
    tuned: str = "",
    data: str = "composed",
    texts: str = "",
    text_share: float = 0.0,
    whole: bool = False,
    task: str = "",
    curves: int = CURVES,
    device: str = "cpu",
    budget: str = "small",
) -> Sweep:
    """Memory of a layer's attention and router in both forms; or, with --original, the forgetting report.

    Args:
        length: tokens, such as 256,512,1024.
        dim: width of a token.
        heads: of attention.
        batch: texts at once.
        original: weights of the language model before it saw images; the report is then made, and no memory measured.
        tuned: weights of models that were tuned from it, with commas; each is called as its folder.
        data: of the report, conversations with and without images, a path or composed.
        texts: of the report, a file of conversations in place of the data's texts.
        text_share: of composed data, the share that is told in words and not shown.
        whole: of the report, test on all of a file that has no splits, not on what a training holds out.
        task: of the report, whose metrics are taken, that of the original by default.
        curves: of the report, conversations with an image whose attention is read.
        device: where it runs.
        budget: smoke takes a few conversations for the report; of memory it decides nothing.
    """
    if original is not None or tuned:
        if original is None or not tuned:
            raise UserError("the forgetting report needs --original and --tuned: give the weights of both")
        paths = [Path(part.strip()) for part in tuned.split(",") if part.strip()]
        if curves < 1:
            raise UserError(f"--curves must be at least 1, got {curves}")
        read = {"text_share": text_share, "whole": whole}
        asked = Asked(data, texts, task, device, budget == "smoke", curves, read)
        points = report_points(original, paths, asked)
        return Sweep("forgetting report", points, report_tables, draw_report)
    lengths = parse_numbers("--length", length, int)
    for name, value, least in (("length", min(lengths), 4), ("dim", dim, 1), ("heads", heads, 1), ("batch", batch, 1)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    if dim % heads or dim // heads % 2:
        raise UserError(f"--heads must divide --dim into even widths, got {heads} heads in {dim}")
    sizes = {"dim": dim, "heads": heads, "batch": batch}
    points = [
        Point(
            {"tokens": tokens, **sizes, "device": device},
            partial(measure_router, tokens, device=device, **sizes),
            f"{tokens} tokens",
        )
        for tokens in lengths
    ]
    return Sweep("memory of the router", points, router_tables, draw_router)

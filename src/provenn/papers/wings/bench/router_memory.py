"""What the router's input costs in memory: two more columns of values, or attention weights that exist (equation 5)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from provenn.core.cost import peak_activation_bytes
from provenn.core.narrowing import present
from provenn.evidence.measurement import Table, lacks_memory
from provenn.evidence.sweep import Row
from provenn.nn.decoder import Decoder
from provenn.papers.wings.adapter import attach, wings_blocks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = {
    "alone": "attention alone",
    "fused": "with two more columns of values",
    "explicit": "with weights that exist",
}
PASSES = {"forward": "forward", "training": "forward and backward"}
Call = Callable[[], tuple[Tensor, Tensor | None]]


def router_calls(tokens: int, *, dim: int, heads: int, batch: int, device: str = "cpu") -> dict[str, Call]:
    """The main attention of one layer in three ways, each giving its output and the router's weights.

    The way alone has no router. The fused way is that of `WingsBlock`: two columns of W join the values of a fused
    attention. The explicit way is the definition. It makes all weights a_hij, for the values and for the router.

    Args:
        tokens: S, of which the second quarter are of an image.
        dim: width of a token.
        heads: H.
        batch: B, texts at once.
        device: where it computes.
    """
    torch.manual_seed(0)
    decoder = attach(Decoder(16, dim, 1, heads), rank=2, max_len=tokens).to(device)
    block = wings_blocks(decoder)[0]
    places = torch.arange(tokens, device=device)
    images = ((places >= tokens // 4) & (places < tokens // 2)).expand(batch, -1)
    with torch.no_grad():
        reading = decoder.read(torch.randn(batch, tokens, dim, device=device), images=images, layers=True)
    x, context, attention = block.norm1(reading.layers[0]).detach(), reading.context, block.attention
    router = present(block.router, "router")

    def alone() -> tuple[Tensor, None]:
        return attention(x, context)[0], None

    def fused() -> tuple[Tensor, Tensor | None]:
        return block._attention(x, context, True, None)[:2]

    def explicit() -> tuple[Tensor, Tensor]:
        weights = attention.weights(x, context, places.expand(batch, -1))
        values = attention.project(x, context)[2].repeat_interleave(heads // attention.kv_heads, dim=1)
        return attention.out((weights @ values).transpose(1, 2).flatten(2)), router(weights)

    return {"alone": alone, "fused": fused, "explicit": explicit}


def measure_router(tokens: int, *, device: str = "cpu", **sizes: int) -> dict[str, Any]:
    """The most bytes that each of `router_calls` holds at any moment, forward without and with the backward pass.

    Args:
        tokens, sizes, device: as in `router_calls`.
    """

    def held(run: Callable[[Call], Callable[[], object]], way: str) -> int:
        call = router_calls(tokens, device=device, **sizes)[way]  # a fresh layer: no gradient of another way's is there
        return peak_activation_bytes(run(call), device=device)

    try:
        passes = {"forward": _forward, "training": _training}
        return {"status": "ok", "bytes": {name: {way: held(run, way) for way in WAYS} for name, run in passes.items()}}
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        return {"status": "out of memory", "again": True}


def _forward(call: Call) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def _training(call: Call) -> Callable[[], object]:
    def run() -> None:
        y, weights = call()
        (y.square().sum() + (0 if weights is None else weights.square().sum())).backward()

    return run


def router_tables(rows: Sequence[Row]) -> list[Table]:
    """Bytes by length, a table for each pass."""
    tables = []
    for name, words in PASSES.items():
        cells: list[list[str | float | int | None]] = []
        for row in rows:
            weights = 4 * row["batch"] * row["heads"] * row["tokens"] ** 2
            if row["status"] != "ok":
                cells.append([row["tokens"], *[row["status"]] * len(WAYS), "", f"{weights / 1e6:.2f}"])
                continue
            held = row["bytes"][name]
            cells.append(
                [
                    row["tokens"],
                    *(f"{held[way] / 1e6:.2f}" for way in WAYS),
                    f"{held['explicit'] / held['fused']:.2f}",
                    f"{weights / 1e6:.2f}",
                ]
            )
        columns = ["tokens", *WAYS.values(), "explicit over fused", "all weights of a layer"]
        first = rows[0]
        caption = (
            f"Main attention and router, {words}: most memory at any moment, MB; width {first['dim']}, "
            f"{first['heads']} heads, {first['batch']} at once"
        )
        tables.append(Table(caption=caption, columns=columns, rows=cells))
    return tables


def draw_router(rows: Sequence[Row]) -> "Figure | None":
    """Bytes over tokens on logarithmic axes, a panel for each pass; None where there is a single length."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if row["status"] == "ok"]
    if len(measured) < 2:
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, words) in zip(figure.subplots(1, len(PASSES), sharey=True), PASSES.items()):
        for way, label in WAYS.items():
            axes.loglog([row["tokens"] for row in measured], [row["bytes"][name][way] for row in measured], ".-",
                        label=label)  # fmt: skip
        axes.set(title=words, xlabel="tokens")
    figure.axes[0].set_ylabel("most bytes held")
    figure.axes[0].legend(fontsize=8)
    return figure

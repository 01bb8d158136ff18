"""Pictures: what masks keep, and how fast kernels are over lengths."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from provenn.papers.long_context_bench.masks import Mask
from provenn.papers.long_context_bench.sparse import BlockSparse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELLS = 256  # of a picture's side
INK = "#1a5fb4"


def shares(mask: Mask | BlockSparse, cells: int = CELLS) -> Tensor:
    """(rows, columns): the share of the pairs of each tile that is kept."""
    if isinstance(mask, BlockSparse):
        mask = mask.head(0)
    block = max(1, math.ceil(mask.length / cells))
    sizes = torch.full((math.ceil(mask.length / block),), block)
    sizes[-1] = mask.length - block * (len(sizes) - 1)
    return mask.tiles(block) / (sizes[:, None] * sizes)


def draw_masks(masks: Sequence[Mask | BlockSparse]) -> "Figure":
    """Each mask as a square: queries downward, keys to the right, kept pairs in colour."""
    from matplotlib.figure import Figure

    columns = min(4, len(masks))
    rows = math.ceil(len(masks) / columns)
    figure = Figure(figsize=(2.6 * max(columns, 2), 2.9 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, mask in zip(panels, masks, strict=False):
        draw_mask(axes, mask)
    for axes in panels[len(masks) :]:
        axes.set_axis_off()
    figure.suptitle("queries downward, keys to the right; kept pairs in colour", fontsize=9)
    return figure


def draw_mask(axes: "Axes", mask: Mask | BlockSparse) -> None:
    """One mask, with its share of the pairs."""
    from matplotlib.colors import LinearSegmentedColormap

    ink = LinearSegmentedColormap.from_list("kept", ["white", INK])
    edges = (0, mask.length, mask.length, 0)
    axes.imshow(shares(mask).numpy(), cmap=ink, vmin=0, vmax=1, extent=edges, interpolation="nearest")
    axes.set_title(f"{mask.name}\n{mask.area / mask.length**2:.1%} of {mask.length:,}²", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_rates(rows: Sequence[Mapping[str, Any]], title: str) -> "Figure | None":
    """TFLOP/s over tokens, a panel a mask and direction; None where nothing ran."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    panels = list(dict.fromkeys((row["mask"], row["direction"]) for row in rows))
    if not any(row["status"] == "ok" for row in rows):
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns + 1.6, 3.1 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    for axes, (mask, direction) in zip(grid, panels, strict=False):
        for number, kernel in enumerate(kernels):
            mine = [r for r in rows if (r["mask"], r["direction"], r["kernel"]) == (mask, direction, kernel)]
            ran = sorted((r for r in mine if r["status"] == "ok"), key=lambda row: row["length"])
            if ran:
                middle = [row["tflops"] for row in ran]
                spread = [
                    [row["tflops"] - row["low"] for row in ran],
                    [row["high"] - row["tflops"] for row in ran],
                ]
                style = {"color": f"C{number % 10}", "marker": "o^sDvPX*"[number % 8]}
                lengths = [row["length"] for row in ran]
                axes.errorbar(lengths, middle, spread, label=kernel, markersize=4, linewidth=1, **style)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="TFLOP/s")
        ticks = sorted({row["length"] for row in rows})
        axes.set_xticks(ticks, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in ticks])
        axes.minorticks_off()
        # Plain numbers, and enough of them where all rates are of one power of ten.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(alpha=0.3)
        axes.set_title(f"{mask}, {direction}", fontsize=9)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = {label: h for axes in grid for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure

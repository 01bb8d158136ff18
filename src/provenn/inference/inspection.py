"""What goes on inside a model that is given one input: a row of numbers for each layer, as a table and as a picture."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from provenn.core.errors import UserError
from provenn.core.files import check_output, output_suffix, save_figure
from provenn.evidence.measurement import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4  # of the picture


@dataclass(frozen=True)
class Inspection:
    """What a paper's `inspection.py` found.

    Args:
        title: which model was given what.
        caption: what the numbers are.
        layers: a row of numbers for each layer, or a map, by its name, in the order in which the model computes them.
        draw: draws it on the input itself, where that shows more than lines.
    """

    title: str
    caption: str
    layers: dict[str, Float[Tensor, " numbers"] | Float[Tensor, "height width"]]
    draw: "Callable[[Axes], None] | None" = None

    def table(self) -> Table:
        """Each layer's mean, least and greatest number."""
        rows: list[list[str | float | int | None]] = [
            [name, row.numel(), row.mean().item(), row.min().item(), row.max().item()]
            for name, row in self.layers.items()
        ]
        return Table(caption=self.caption, columns=["layer", "numbers", "mean", "least", "greatest"], rows=rows)

    def picture(self) -> "Figure":
        """What `draw` draws; else each layer's numbers as a line, all on one vertical axis, or a map as an image."""
        from matplotlib.figure import Figure

        if self.draw is not None:
            figure = Figure(figsize=(9, 7.5), layout="constrained")
            figure.suptitle(self.title, fontsize=10)
            axes = figure.subplots()
            axes.set_axis_off()
            self.draw(axes)
            return figure
        columns = min(COLUMNS, len(self.layers))
        lines = math.ceil(len(self.layers) / columns)
        figure = Figure(figsize=(3.2 * max(columns, 2), 1.9 * lines + 0.7), layout="constrained")
        figure.suptitle(f"{self.title}\n{self.caption}", fontsize=10)
        drawn = all(row.dim() == 1 for row in self.layers.values())
        panels = figure.subplots(lines, columns, sharey=drawn, squeeze=False).ravel()
        for axes, (name, row) in zip(panels, self.layers.items()):
            if row.dim() == 2:
                scale = figure.colorbar(axes.imshow(row.float().cpu().numpy()), ax=axes, format="%.3g")
                scale.ax.tick_params(labelsize=7)
            else:
                axes.plot(row.float().cpu().numpy(), color="#1a5fb4", linewidth=0.7)
            axes.set_title(f"{name}: mean {row.mean():.3g}", fontsize=8)
            axes.tick_params(labelsize=7)
        # The grid's last row may have more cells than layers.
        for axes in panels[len(self.layers) :]:
            axes.set_axis_off()
        return figure

    def save(self, file: Path) -> None:
        """Write the picture, in one step."""
        save_figure(self.picture(), file)


def check_png(output: Path, source: Path) -> None:
    """Refuse to write the picture under a name that says it is none, or over what it is made from."""
    if output_suffix(output, ".png") != ".png":
        raise UserError(f"the picture is written as .png, got {str(output)!r}")
    if output.resolve() == source.resolve():
        raise UserError(f"{output} is the input itself; choose another file with -o")
    check_output(output)

"""What a timing of networks found: its numbers, its tables and its plot. No torch is needed to read it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from provenn.core.files import save_figure, write_atomically
from provenn.evidence.measurement import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMS = ("eager", "torch.compile", "ONNX Runtime")


@dataclass(frozen=True)
class Cost:
    """What a network is, whatever runs it: `fused` says whether its batch norms are folded into its maps.

    `macs` are multiply-adds of one image.
    """

    parameters: int
    macs: int
    fused: bool


@dataclass(frozen=True)
class Latency:
    """One network in one form.

    Args:
        seconds: a call, round by round.
        ratio, interval: to the reference in the same form; None where one of the two failed.
        trouble: why there are no times.
    """

    network: str
    form: str
    batch: int
    threads: int
    seconds: tuple[float, ...] = ()
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    trouble: str = ""


@dataclass(frozen=True)
class LatencyBench:
    """All that was timed. A ratio of a few rounds is reported without an interval: fewer than six give no 95 %."""

    reference: str
    size: int
    costs: dict[str, Cost]
    latencies: tuple[Latency, ...]
    troubles: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "LatencyBench":
        """The numbers that `save` wrote.

        Raises:
            ValueError: they are none, with the line and the reason.
        """
        return TypeAdapter(cls).validate_json(file.read_bytes())

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Each batch and number of threads."""
        return list(dict.fromkeys((each.batch, each.threads) for each in self.latencies))

    @property
    def tables(self) -> list[Table]:
        """One for each batch and number of threads: milliseconds a call, and the ratio to the reference."""
        tables = []
        for batch, threads in self.cells:
            mine = {(e.network, e.form): e for e in self.latencies if (e.batch, e.threads) == (batch, threads)}
            forms = [form for form in FORMS if any(form == key[1] for key in mine)]
            rows: list[list[str | float | int | None]] = [
                [
                    name,
                    f"{cost.parameters / 1e6:.2f} M",
                    f"{cost.macs / 1e6:.0f} M",
                    *(_cell(mine[name, form], name == self.reference) for form in forms),
                ]
                for name, cost in self.costs.items()
            ]
            clock = "CPU time" if threads == 1 else "wall clock, which other processes add to"
            caption = (
                f"batch {batch}, {self.size}×{self.size} pixels, {threads} thread{'s' * (threads > 1)} ({clock}): "
                f"median milliseconds a call, and × {self.reference} in the same form (95 % interval)"
            )
            columns = ["network", "parameters", "multiply-adds", *forms]
            tables.append(Table(caption=caption, columns=columns, rows=rows))
        return tables

    def figure(self) -> "Figure":
        """Latency of each network against its parameters and its multiply-adds, in its quickest form."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        cells = self.cells
        figure = Figure(figsize=(11, 1 + 3.6 * len(cells)), layout="constrained")
        panels = figure.subplots(len(cells), 2, squeeze=False, sharey="row")
        for row, (batch, threads) in zip(panels, cells):
            for number, (name, cost) in enumerate(self.costs.items()):
                timed = [
                    each
                    for each in self.latencies
                    if (each.network, each.batch, each.threads) == (name, batch, threads) and each.seconds
                ]
                if not timed:
                    continue
                best = min(timed, key=lambda each: median(each.seconds))
                times = [1e3 * seconds / batch for seconds in best.seconds]
                style = {"color": f"C{number % 10}", "marker": "o^sDvPX*"[number % 8]}
                for axes, x in zip(row, (cost.parameters / 1e6, cost.macs / 1e6)):
                    axes.errorbar(
                        x,
                        median(times),
                        [[median(times) - min(times)], [max(times) - median(times)]],
                        linestyle="none",
                        label=f"{name} ({best.form})",
                        **style,
                    )
            for axes, label in zip(row, ("parameters, millions", "multiply-adds of an image, millions")):
                axes.set(xscale="log", yscale="log", xlabel=label)
                for axis in (axes.xaxis, axes.yaxis):
                    # Plain numbers, and few enough that they do not run into each other.
                    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                    axis.set_minor_locator(NullLocator())
                    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
                axes.grid(alpha=0.3)
            row[0].set_ylabel("milliseconds an image")
            row[0].set_title(f"batch {batch}, {threads} thread{'s' * (threads > 1)}", loc="left", fontsize=10)
            row[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        figure.suptitle(f"{self.size}×{self.size} pixels; each network in its quickest form, whiskers: all rounds")
        return figure

    def save(self, out: Path) -> list[Path]:
        """Write the tables, the plot and all times into a folder; returns the files."""
        numbers, table, plot = (out / f"latency.{kind}" for kind in ("json", "md", "png"))
        write_atomically(numbers, json.dumps(asdict(self), indent=1))
        write_atomically(table, "\n".join(each.markdown() for each in self.tables))
        save_figure(self.figure(), plot)
        return [table, plot, numbers]


def _cell(latency: Latency, is_reference: bool) -> str:
    if not latency.seconds:
        return "failed"
    text = f"{1e3 * median(latency.seconds):.3g} ms"
    if is_reference or latency.ratio is None:
        return text
    within = "" if latency.interval is None else f" ({latency.interval[0]:.3g} to {latency.interval[1]:.3g})"
    return f"{text}, {latency.ratio:.3g}×{within}"

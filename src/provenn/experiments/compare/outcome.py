"""What a comparison of a slot found: its numbers, its tables and its plots. No torch is needed to read it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from provenn.core.files import save_figure, write_atomically
from provenn.evidence.interval import Interval
from provenn.evidence.measurement import Table
from provenn.evidence.view import bytes_of
from provenn.experiments.compare.drawing import context_figure, mark, plain_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS = ("parameters", "FLOPs", "latency")
WORDS = {"parameters": "parameters", "FLOPs": "FLOPs", "latency": "time"}


@dataclass(frozen=True)
class Candidate:
    """One mechanism, measured in the host. Costs are of the whole network on one example."""

    name: str
    paper: str
    quality: tuple[float, ...]
    interval: Interval | None
    difference: float
    difference_interval: Interval | None
    parameters: int
    flops: int
    latency: float
    latency_interval: Interval | None

    def cost(self, name: str) -> float:
        """One of `COSTS`; the latency as a multiple of the reference's."""
        return float({"parameters": self.parameters, "FLOPs": self.flops, "latency": self.latency}[name])

    @property
    def mean(self) -> float:
        return sum(self.quality) / len(self.quality)


@dataclass(frozen=True)
class SlotComparison:
    """Every candidate of a slot, its quality over the seeds and its cost.

    Args:
        candidates: the first is the reference of differences and ratios.
        metric, higher_is_better: the quality.
        setting: all that is needed to repeat it.
        more: what else the host measures of each candidate, by name; see `provenn.experiments.compare.context`.
    """

    slot: str
    host: str
    data: str
    metric: str
    higher_is_better: bool
    candidates: tuple[Candidate, ...]
    setting: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "SlotComparison":
        """The numbers that `save` wrote.

        Raises:
            ValueError: they are none, with the line and the reason.
        """
        return TypeAdapter(cls).validate_json(file.read_bytes())

    def front(self, cost: str) -> list[Candidate]:
        """The Pareto front, cheapest first: nobody is at least as good at no more cost."""
        sign = 1 if self.higher_is_better else -1

        def is_dominated(candidate: Candidate) -> bool:
            own_point = (-candidate.cost(cost), sign * candidate.mean)
            other_points = [(-other.cost(cost), sign * other.mean) for other in self.candidates]
            # Equal points do not dominate each other: both stay on the front.
            return any(
                other != own_point and other[0] >= own_point[0] and other[1] >= own_point[1] for other in other_points
            )

        return sorted(
            (candidate for candidate in self.candidates if not is_dominated(candidate)),
            key=lambda candidate: candidate.cost(cost),
        )

    @property
    def distinguishing(self) -> list[str]:
        """The costs that distinguish candidates: not those that are the same for all, to a hundredth."""
        ranges = {cost: [candidate.cost(cost) for candidate in self.candidates] for cost in COSTS}
        return [cost for cost, costs in ranges.items() if max(costs) > 1.01 * min(costs)] or ["latency"]

    @property
    def tables(self) -> list[Table]:
        """Quality against cost, and what else the host measures."""
        names = [candidate.name for candidate in self.candidates]
        seeds = len(self.candidates[0].quality)
        more = [_context_table(names, self.more, seeds, self.setting["probe"])] if self.more else []
        return [self.table, *more]

    @property
    def table(self) -> Table:
        """A row for each candidate."""
        reference = self.candidates[0]
        fronts = {cost: self.front(cost) for cost in self.distinguishing}
        rows: list[list[str | float | int | None]] = []
        for candidate in self.candidates:
            added = candidate.parameters - reference.parameters
            rows.append(
                [
                    candidate.name,
                    candidate.paper,
                    _with_interval(candidate.mean, candidate.interval, ".4f"),
                    ""
                    if candidate is reference
                    else _with_interval(candidate.difference, candidate.difference_interval, "+.4f"),
                    f"{candidate.parameters:,}" + (f" ({added:+,})" if candidate is not reference else ""),
                    f"{candidate.flops / 1e6:.2f} M",
                    "1"
                    if candidate is reference
                    else _with_interval(candidate.latency, candidate.latency_interval, ".2f"),
                    ", ".join(WORDS[cost] for cost in fronts if candidate in fronts[cost]),
                ]
            )
        seeds = len(reference.quality)
        return Table(
            caption=(
                f"{self.slot} on {self.data}: {self.host}, {seeds} seed{'s' if seeds != 1 else ''}, budget "
                f"{self.setting['budget']}; {self._uncertainty()}, costs of the whole network for one example"
            ),
            columns=[
                "candidate",
                "paper",
                f"{self.metric.replace('_', ' ')} ({'higher' if self.higher_is_better else 'lower'} is better)",
                f"against {reference.name}",
                "parameters",
                "FLOPs",
                f"time × {reference.name}",
                "nobody better for less",
            ],
            rows=rows,
        )

    def _uncertainty(self) -> str:
        measured = any(candidate.interval or candidate.latency_interval for candidate in self.candidates)
        return "95 % intervals" if measured else "no intervals, since nothing is measured"

    def figure(self) -> "Figure":
        """Quality against each cost that distinguishes candidates, the front joined by a line."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.5 + 4 * len(self.distinguishing), 4.4), layout="constrained")
        scale = {"parameters": 1e3, "FLOPs": 1e6, "latency": 1.0}
        labels = {
            "parameters": "parameters, thousands",
            "FLOPs": "operations on one example, millions",
            "latency": f"time of one example, × {self.candidates[0].name}",
        }
        panels = figure.subplots(1, len(self.distinguishing), sharey=True, squeeze=False)[0]
        for axes, cost in zip(panels, self.distinguishing):
            costs = {candidate.name: candidate.cost(cost) / scale[cost] for candidate in self.candidates}
            front = self.front(cost)
            line = [costs[candidate.name] for candidate in front], [candidate.mean for candidate in front]
            axes.plot(*line, color="0.75", zorder=0, label="the best for its cost")
            for number, candidate in enumerate(self.candidates):
                low, high = candidate.interval or (candidate.mean, candidate.mean)
                bounds = [[candidate.mean - low], [high - candidate.mean]]
                style = mark(number)
                axes.errorbar(
                    costs[candidate.name],
                    candidate.mean,
                    bounds,
                    capsize=3,
                    linestyle="none",
                    label=candidate.name,
                    **style,
                )
                seed_style = {"marker": style["marker"], "color": style["color"], "s": 14, "alpha": 0.4}
                axes.scatter(
                    [costs[candidate.name]] * len(candidate.quality), candidate.quality, **seed_style
                )  # each seed
            axes.set_xlabel(labels[cost])
            plain_axis(axes, "x", list(costs.values()))
            axes.margins(x=0.15)
            axes.grid(alpha=0.3)
        better = "higher" if self.higher_is_better else "lower"
        panels[0].set_ylabel(f"test {self.metric.replace('_', ' ')} ({better} is better)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
        seeds = len(self.candidates[0].quality)
        whiskers = "; whiskers: 95 % interval of their mean" if any(one.interval for one in self.candidates) else ""
        seeds_note = f"faint: each of {seeds} seeds{whiskers}" if seeds > 1 else "one seed"
        figure.suptitle(f"{self.slot} on {self.data}: {self.host}\n{seeds_note}", fontsize=10)
        return figure

    def save(self, out: str | Path) -> list[Path]:
        """Write the numbers, the table and the plot into a folder; returns the files."""
        from provenn.core.files import check_writable

        folder = Path(out)
        check_writable(folder)
        numbers, table, plot = (folder / f"{self.slot}.{kind}" for kind in ("json", "md", "png"))
        write_atomically(numbers, json.dumps(asdict(self), indent=1))
        write_atomically(table, "\n".join(view.markdown() for view in self.tables))
        save_figure(self.figure(), plot)
        files = [table, plot, numbers]
        if self.more:
            names = [candidate.name for candidate in self.candidates]
            qualities = {candidate.name: candidate.quality for candidate in self.candidates}
            files.insert(2, folder / f"{self.slot}-context.png")
            label, chance = self.metric.replace("_", " "), self.setting["probe"]["chance"]
            figure = context_figure(names, self.more, qualities, label, chance)
            save_figure(figure, files[2])
        return files


def _with_interval(value: float, interval: Interval | None, style: str) -> str:
    if interval is None:
        return format(value, style)
    return f"{value:{style}} ({interval[0]:{style}} to {interval[1]:{style}})"


def _context_table(names: Sequence[str], more: dict[str, Any], seeds: int, probe: dict[str, Any]) -> Table:
    """What each candidate predicts right in a second task, and what a long context costs."""
    contexts = more[names[0]]["contexts"]
    rows: list[list[str | float | int | None]] = []
    for name in names:
        costs = more[name]
        right = [trial["accuracy"] for trial in costs["probe"]]
        low, high = costs["step_interval"]
        rows.append(
            [
                name,
                f"{sum(right) / len(right):.3f} ({min(right):.3f} to {max(right):.3f})"
                + _describe_diverged(costs["probe"]),
                "1" if name == names[0] else f"{costs['step']:.2f} ({low:.2f} to {high:.2f})",
                f"{costs['tokens_per_second']:,.0f}",
                *(
                    f"{1e3 * seconds:.2f} ms, {bytes_of(size)}"
                    for seconds, size in zip(costs["token_seconds"], costs["state_bytes"])
                ),
            ]
        )
    return Table(
        caption=(
            f"{probe['about']} ({seeds} seed{'s' * (seeds != 1)}, "
            f"mean and range; chance is {probe['chance']:.3f}), and what a long context costs: the time of one "
            "token more, and the bytes kept of the context"
        ),
        columns=[
            "candidate",
            probe["task"],
            f"training step × {names[0]}",
            "training tokens a second",
            *(f"after {context:,} tokens" for context in contexts),
        ],
        rows=rows,
    )


def _describe_diverged(trials: Sequence[Mapping[str, Any]]) -> str:
    """How many trainings diverged, where any did."""
    diverged = sum(trial.get("diverged", False) for trial in trials)
    return f", {diverged} of {len(trials)} diverged" if diverged else ""

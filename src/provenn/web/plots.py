"""The plots of the boards as SVG: quality against cost, with intervals, in the page's own colours."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from markupsafe import Markup, escape

from provenn.evidence.view import number
from provenn.experiments.compare.latencies import LatencyBench
from provenn.experiments.compare.outcome import SlotComparison

WIDTH, HEIGHT = 600, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 50  # margins in which the axes are written
LETTER, LINE = 7.3, 15  # about the size of a label's letters
SIDES = (  # of a point, where its name may stand: right, down and the end of the text that is there
    (9, 4, "start"), (-9, 4, "end"), (0, -11, "middle"), (0, 21, "middle"),
    (7, -8, "start"), (7, 17, "start"), (-7, -8, "end"), (-7, 17, "end"),
    (9, -24, "start"), (9, 32, "start"), (-9, -24, "end"), (-9, 32, "end"),
)  # fmt: skip
COSTS = {
    "parameters": (1e3, "parameters, thousands"),
    "FLOPs": (1e6, "operations on one example, millions"),
    "latency": (1.0, "time of one example, × {reference}"),
}


class Point(NamedTuple):
    """A candidate: its cost, its quality and the interval of that."""

    name: str
    x: float
    y: float
    low: float
    high: float


class Box(NamedTuple):
    """A rectangle on the plot that something is drawn in."""

    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: "Box") -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return wide * high if wide > 0 and high > 0 else 0.0


@dataclass(frozen=True)
class Axis:
    """Where values lie between two positions; logarithmic where the largest is more than thrice the smallest."""

    values: Sequence[float]
    start: float | int
    end: float | int

    @property
    def logarithmic(self) -> bool:
        """Whether equal steps are equal ratios."""
        return min(self.values) > 0 and max(self.values) > 3 * min(self.values)

    @property
    def _scale(self) -> Callable[[float], float]:
        return math.log if self.logarithmic else float

    @property
    def _range(self) -> tuple[float, float]:
        least, most = self._scale(min(self.values)), self._scale(max(self.values))
        room = 0.08 * (most - least) or 0.5
        return least - room, most + room

    def at(self, value: float) -> float:
        """The position of a value."""
        least, most = self._range
        return round(self.start + (self._scale(value) - least) / (most - least) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[float]:
        """Round values within the range, four to seven of them."""
        least, most = self._range
        if self.logarithmic:
            decades = range(math.floor(least / math.log(10)) - 1, math.ceil(most / math.log(10)) + 1)
            near = most - least < math.log(100)
            every = [step * 10.0**decade for decade in decades for step in ((1, 2, 5) if near else (1,))]
            return [value for value in every if least <= math.log(value) <= most]
        rough = (most - least) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
        return [step * n for n in range(math.ceil(least / step), math.floor(most / step) + 1)]


def pareto(board: SlotComparison, cost: str) -> Markup:
    """Quality against one of `provenn.experiments.compare.outcome.COSTS`, the front filled and joined by a line."""
    scale, words = COSTS[cost]
    points = [
        Point(one.name, one.cost(cost) / scale, one.mean, *(one.interval or (one.mean, one.mean)))
        for one in board.candidates
    ]
    front = [one.name for one in board.front(cost)]
    quality = f"{board.metric.replace('_', ' ')} ({'higher' if board.higher_is_better else 'lower'} is better)"
    x_label = words.format(reference=board.candidates[0].name)
    description = (
        f"{quality} against {x_label}. Nobody is better for less than {', '.join(front)}. The table has every number."
    )
    return _plot(points, front, x_label, quality, description)


def latencies(board: LatencyBench, batch: int, threads: int) -> Markup:
    """The time of each network in its quickest form against its parameters, with the range of all rounds."""
    points = []
    for name, cost in board.costs.items():
        timed = [
            each
            for each in board.latencies
            if (each.network, each.batch, each.threads) == (name, batch, threads) and each.seconds
        ]
        if timed:
            best = min(timed, key=lambda each: median(each.seconds))
            times = [1e3 * seconds / batch for seconds in best.seconds]
            points.append(Point(name, cost.parameters / 1e6, median(times), min(times), max(times)))
    y_label, x_label = "milliseconds an image", "parameters, millions"
    return _plot(points, [], x_label, y_label, f"{y_label} against {x_label}. The table has every number.")


def _plot(points: Sequence[Point], front: Sequence[str], x_label: str, y_label: str, description: str) -> Markup:
    across = Axis([point.x for point in points], LEFT, WIDTH - RIGHT)
    up = Axis([value for point in points for value in point[2:]], HEIGHT - BOTTOM, TOP)
    parts = [*_grid(across, up, x_label, y_label)]
    placed = {point.name: (across.at(point.x), up.at(point.y)) for point in points}
    line = [placed[name] for name in front]
    if line:
        parts.append(f'<polyline class="front" points="{" ".join(f"{x},{y}" for x, y in line)}"/>')
    for point in points:
        x, y = placed[point.name]
        kind = "best" if point.name in front else "other"
        parts.append(f'<line class="spread" x1="{x}" x2="{x}" y1="{up.at(point.low)}" y2="{up.at(point.high)}"/>')
        parts.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="5"/>')
    whiskers = [Box(placed[p.name][0] - 3, up.at(p.high), placed[p.name][0] + 3, up.at(p.low)) for p in points]
    parts += _labels(placed, whiskers + [box for pair in pairwise(line) for box in _along(*pair)])
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return Markup(f'<svg class="plot" {box} role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>')


def _grid(across: Axis, up: Axis, x_label: str, y_label: str) -> Iterable[str]:
    floor, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    for value in across.ticks:
        x = across.at(value)
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{floor}"/>'
        yield f'<text class="tick" x="{x}" y="{floor + 17}" text-anchor="middle">{number(value, 3)}</text>'
    for value in up.ticks:
        y = up.at(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="tick" x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{number(value, 3)}</text>'
    yield f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
    yield f"{escape(x_label)}</text>"
    yield f'<text class="axis" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
    yield f"{escape(y_label)}</text>"


def _along(start: tuple[float, float], end: tuple[float, float], pieces: int = 12) -> Iterable[Box]:
    """Small boxes that cover a line."""
    for piece in range(pieces + 1):
        x, y = (a + (b - a) * piece / pieces for a, b in zip(start, end, strict=True))
        yield Box(x - 2, y - 2, x + 2, y + 2)


def _labels(placed: dict[str, tuple[float, float]], taken: list[Box]) -> Iterable[str]:
    """Each point's name beside it, where it covers the least of the other names, points, intervals and lines."""
    frame = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    taken = [*taken, *(Box(x - 6, y - 6, x + 6, y + 6) for x, y in placed.values())]
    for name, (x, y) in sorted(placed.items(), key=lambda item: item[1]):
        wide = LETTER * len(name)
        sides: list[tuple[float, Box, str, float, float]] = []
        for right, down, anchor in SIDES:
            left = x + right - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            box = Box(left, y + down - LINE + 3, left + wide, y + down + 3)
            outside = wide * LINE - box.shared(frame)
            cover = sum(box.shared(other) for other in taken) + 4 * outside
            sides.append((cover, box, anchor, x + right, y + down))
        _, box, anchor, at_x, at_y = min(sides, key=lambda side: side[0])
        taken.append(box)
        yield f'<text class="name" x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}">{escape(name)}</text>'

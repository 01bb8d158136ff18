"""A paper's own benchmark, at the settings that a user asks for: points measured one by one, each kept as it ends.

`bench.py` of a paper defines `sweep`, a function whose keyword arguments are the options of `provenn bench SLUG`; it
checks them and returns a `Sweep`. What it is asked for is no experiment: nothing of it goes into the paper's record.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import save_figure, write_atomically
from provenn.evidence.measurement import Table
from provenn.evidence.record import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS, TABLE, PLOT = "points.json", "table.md", "plot.png"
Row = dict[str, Any]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Point:
    """One measurement.

    Args:
        facts: all that decides its value, as plain data; no two points of a sweep have the same.
        measure: gives what was measured, as plain data. That something cannot run is an outcome, not an error; with
            `again` true it is measured anew by who goes on.
        label: what the progress says.
    """

    facts: Mapping[str, Any]
    measure: Callable[[], Mapping[str, Any]]
    label: str = ""


@dataclass(frozen=True)
class Sweep:
    """What a user asked for.

    Args:
        title: of the picture.
        points: in the order in which they are measured.
        tables: made of all rows; a row is a point's facts and what was measured.
        picture: drawn of them, where there is something to draw.
    """

    title: str
    points: Sequence[Point]
    tables: Callable[[Sequence[Row]], list[Table]]
    picture: "Callable[[Sequence[Row]], Figure | None] | None" = None

    def run(self, out: Path, *, resume: bool = False, log: Callable[[str], None] = lambda message: None) -> list[Row]:
        """Measure every point that is not there yet, and keep each as it ends.

        Args:
            out: the folder, of this run alone.
            resume: keep the points of an earlier run that have the same facts.
            log: is given a line for each point.
        """
        file = out / POINTS
        before = _read(file) if resume and file.exists() else []
        kept = {_key(row, point): row for row in before for point in self.points if _has(row, point)}
        kept = {key: row for key, row in kept.items() if not row.get("again")}
        rows: list[Row] = []
        with progress.bar(self.title, len(self.points)) as advance:
            for point in self.points:
                facts = plain(dict(point.facts))
                row = kept.get(json.dumps(facts, sort_keys=True))
                if row is None:
                    advance(0, point.label)
                    row = {**facts, **plain(dict(point.measure()))}
                    log(f"{point.label}: {row.get('told', row.get('status', 'measured'))}")
                rows.append(row)
                write_atomically(file, json.dumps({"title": self.title, "points": rows}, indent=1))
                advance(1, point.label)
        return rows

    def save(self, rows: Sequence[Row], out: Path) -> list[Path]:
        """Write tables and picture beside the points; returns all files."""
        files = [out / TABLE]
        write_atomically(files[0], "\n".join(table.markdown() for table in self.tables(rows)))
        figure = self.picture(rows) if self.picture is not None else None
        if figure is not None:
            save_figure(figure, out / PLOT)
            files.append(out / PLOT)
        return [*files, out / POINTS]


def parse_numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Numbers with commas, each once, as an option of a sweep takes them.

    >>> parse_numbers("length", "64, 256,64", int)
    [64, 256]

    Raises:
        UserError: something else.
    """
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} must be {what} with commas, such as 8,16; got {text!r}") from None


def _has(row: Row, point: Point) -> bool:
    return all(key in row and row[key] == value for key, value in plain(dict(point.facts)).items())


def _key(row: Row, point: Point) -> str:
    return json.dumps({key: row[key] for key in point.facts}, sort_keys=True)


def _read(file: Path) -> list[Row]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["points"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot resume from {file} ({error}): move it away, or leave --resume out") from None
    return [row for row in rows if isinstance(row, dict)]

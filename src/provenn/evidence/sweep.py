"""A paper's own benchmark, at the settings that a user asks for: points measured one by one, each kept as it ends.

`bench.py` of a paper defines `sweep`, a function whose keyword arguments are the options of `provenn bench SLUG`; it
checks them and returns a `Sweep`. What it is asked for is no experiment: nothing of it goes into the paper's record.
"""

import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import save_figure, write_atomically
from provenn.evidence.measurement import Table
from provenn.evidence.record import LEDGER, Ledger, plain, read_or_set_aside
from provenn.evidence.run import Elsewhere, Run, run_to_end

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
        stage: of a point that is measured by trials, which may run elsewhere: `measure(run)` awaits them. Points of one
            stage need nothing of each other, and those of the next begin when all of them have ended.
    """

    facts: Mapping[str, Any]
    measure: Callable[..., Any]
    label: str = ""
    stage: int | None = None


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

    @property
    def has_trials(self) -> bool:
        """Whether anything of it may run elsewhere."""
        return any(point.stage is not None for point in self.points)

    def run(
        self,
        out: Path,
        *,
        resume: bool = False,
        log: Callable[[str], None] = lambda message: None,
        elsewhere: Elsewhere | None = None,
    ) -> list[Row]:
        """Measure every point that is not there yet, and keep each as it ends.

        Args:
            out: the folder, of this run alone.
            resume: keep the points of an earlier run that have the same facts, and trials that had ended.
            log: is given a line for each point.
            elsewhere: what runs the trials; by default they run here.
        """
        file = out / POINTS
        before = _read(file) if resume and file.exists() else []
        kept = {_key(row, point): row for row in before for point in self.points if _has(row, point)}
        kept = {key: row for key, row in kept.items() if not row.get("again")}
        ledger, trouble = read_or_set_aside(Ledger, out / LEDGER, self.title) if resume else (None, "")
        if trouble:
            log(trouble)
        run = Run(self.title, out, ledger=ledger, reuse=True, elsewhere=elsewhere)
        run.folder = out
        rows: dict[int, Row] = {}
        with progress.bar(self.title, len(self.points)) as advance:

            async def measure(index: int, point: Point) -> None:
                facts = plain(dict(point.facts))
                row = kept.get(json.dumps(facts, sort_keys=True))
                if row is None:
                    advance(0, point.label)
                    outcome = point.measure() if point.stage is None else await point.measure(run)
                    row = {**facts, **plain(dict(outcome))}
                    log(f"{point.label}: {row.get('told', row.get('status', 'measured'))}")
                rows[index] = row
                ended = [rows[i] for i in sorted(rows)]
                write_atomically(file, json.dumps({"title": self.title, "points": ended}, indent=1))
                advance(1, point.label)

            for stage, points in groupby(enumerate(self.points), lambda numbered: numbered[1].stage):
                if stage is None or elsewhere is None:
                    for index, point in points:
                        run_to_end(measure(index, point))
                else:
                    _to_the_end(run.together(measure(*numbered) for numbered in points), run, elsewhere)
        return [rows[index] for index in range(len(self.points))]

    def save(self, rows: Sequence[Row], out: Path) -> list[Path]:
        """Write tables and picture beside the points; returns all files."""
        files = [out / TABLE]
        write_atomically(files[0], "\n".join(table.markdown() for table in self.tables(rows)))
        figure = self.picture(rows) if self.picture is not None else None
        if figure is not None:
            save_figure(figure, out / PLOT)
            files.append(out / PLOT)
        return [*files, out / POINTS]


def _to_the_end(coroutine: Coroutine[Any, Any, Any], run: Run, elsewhere: Elsewhere) -> None:
    """Go on with what awaits trials as long as there are any that run elsewhere."""
    try:
        while True:
            needs = coroutine.send(None)
            while needs <= run.pending:
                elsewhere.wait()
    except StopIteration:
        return
    finally:
        coroutine.close()


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

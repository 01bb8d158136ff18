"""Tables in text files, read with errors that name the row and the column."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from provenn.data.dates import is_date
from provenn.errors import UserError
from provenn.files import whole


@dataclass(frozen=True)
class Table:
    """Cells under a header. Rows are counted as a spreadsheet does: the header is row 1."""

    file: Path
    columns: list[str]
    rows: list[list[str]]

    def column(self, name: str) -> list[str]:
        """One column as text; an empty cell is refused."""
        place = self.columns.index(name)
        for number, row in enumerate(self.rows, start=2):
            if not row[place]:
                raise UserError(f"{self.file}, row {number}, column {name!r} is empty: fill the hole or drop the row")
        return [row[place] for row in self.rows]

    def numbers(self, names: Sequence[str]) -> Float64[np.ndarray, "rows columns"]:
        """Columns as numbers.

        Raises:
            UserError: a cell that is empty, text, NaN or infinite, with its row and column.
        """
        places = [self.columns.index(name) for name in names]
        try:
            values = np.array([[float(row[place]) for place in places] for row in self.rows])
            if np.isfinite(values).all():
                return values
        except ValueError:
            pass
        cells = ((number, row[p], name) for number, row in enumerate(self.rows, 2) for p, name in zip(places, names))
        return np.array([parse_number(cell, f"{self.file}, row {row}, column {name!r}") for row, cell, name in cells])


def parse_number(cell: str, where: str) -> float:
    """A finite number, or a refusal that says where it stands."""
    if not cell:
        raise UserError(f"{where} is empty: fill the hole (interpolate it, say) or drop the row")
    try:
        value = float(cell)
    except ValueError:
        raise UserError(f"{where}: expected a number, got {cell[:40]!r}") from None
    if not math.isfinite(value):
        raise UserError(f"{where} is {cell}: every value must be a finite number, fill the hole or drop the row")
    return value


def parse_numbers(cells: Sequence[str], where: str) -> list[float]:
    """Finite numbers, or a refusal that names `where` and the place of the first cell that is none, from 1."""
    try:
        values = [float(cell) for cell in cells]
        if np.isfinite(values).all():
            return values
    except ValueError:
        pass
    return [parse_number(cell, f"{where} {i}") for i, cell in enumerate(cells, start=1)]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file; what is no text, or empty, is refused."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text in UTF-8") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{file} is empty")
    return text.splitlines()


def read_table(file: Path) -> Table:
    """A CSV file with a header; blank lines are passed over.

    Raises:
        UserError: no header, no rows, or a row with more or fewer cells than the header.
    """
    lines = read_lines(file)
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, strict=True)]
    except csv.Error as error:
        raise UserError(f"{file} is no CSV: {error}") from None
    header = rows[0]
    if len(header) == 1 and any(mark in header[0] for mark in ";\t"):
        raise UserError(f"{file} is separated by {'tabs' if chr(9) in header[0] else 'semicolons'}: expected commas")
    numbers = [is_number(cell) for cell in header]
    if any(numbers) and all(number or is_date(cell) for number, cell in zip(numbers, header)):
        what = "numbers" if all(numbers) else "a date and numbers"
        raise UserError(f"{file}, row 1 holds {what}: expected a header with the columns' names")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise UserError(f"{file}, row 1: two columns are called {twice!r}")
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) != len(header):
            raise UserError(f"{file}, row {number} has {len(row)} cells where the header has {len(header)}")
    if not any(rows[1:]):
        raise UserError(f"{file} holds a header and no rows")
    while not rows[-1]:
        rows.pop()
    for number, row in enumerate(rows, start=1):
        if not row:
            raise UserError(f"{file}, row {number} is blank: drop it")
    return Table(file, header, rows[1:])


def write_table(file: Path, columns: Sequence[str], rows: Iterable[Sequence[str | int | float]]) -> None:
    """Write a CSV file in one step; numbers with up to seven digits.

    Text that a spreadsheet would take for a formula gets an apostrophe in front: it may be the name of a stranger's
    file.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_harmless(name) for name in columns])
    writer.writerows([f"{c:.7g}" if isinstance(c, float) else _harmless(c) for c in row] for row in rows)
    with whole(file) as place:
        place.write_text(text.getvalue(), encoding="utf-8")


def _harmless(cell: str | int) -> str | int:
    formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) and not is_number(cell)
    return f"'{cell}" if formula else cell


def check_csv(output: Path | None, inputs: Iterable[Path]) -> None:
    """Refuse to write predictions under a name that says they are no table, or over what they are made from."""
    if output is None:
        return
    if output.suffix.lower() != ".csv":
        raise UserError(f"predictions are written as .csv, got {str(output)!r}")
    if output.resolve() in {file.resolve() for file in inputs}:
        raise UserError(f"{output} is the input itself; choose another place with -o")


def is_number(cell: str) -> bool:
    """Whether a cell reads as a number, NaN included."""
    try:
        float(cell)
    except ValueError:
        return False
    return True

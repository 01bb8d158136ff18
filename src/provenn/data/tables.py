"""Tables as people have them: text in any separator, decimal mark and encoding, spreadsheets and data frames.

What a file does not say is worked out from all of it; where two readings fit, it is refused, with both of them.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict, Unpack, get_args

import numpy as np
from jaxtyping import Float64

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write, output_suffix
from provenn.core.inputs import encoding_of, read_bytes
from provenn.data.dates import is_date
from provenn.data.frames import ENGINES, check_engines, read_frame, write_frame
from provenn.data.numerals import Decimal, decimal_of, fill_holes, is_hole, is_number, parse

Separator = Literal[",", ";", "|", "tab", "space"]
Holes = Literal["interpolate", "extend", "refuse"]
SEPARATORS: dict[str, str] = {",": ",", ";": ";", "|": "|", "tab": "\t", "space": " "}
NAMES = {",": "commas", ";": "semicolons", "|": "bars", "\t": "tabs", " ": "spaces"}
WRITES = (".csv", ".tsv", *ENGINES)
KIND = ".csv, .tsv, .xlsx or .parquet"
LOOKED_AT = 20  # rows, from which a separator is recognised


class Reading(TypedDict, total=False):
    """Options for reading a file, for what it does not say or says wrong.

    `holes`: interpolate (the default: a missing value lies on the line between its neighbours), extend (at the ends of
    a column it is the nearest value too) or refuse.
    """

    separator: Separator
    decimal: Decimal
    encoding: str
    sheet: str
    holes: Holes


@dataclass(frozen=True)
class Style:
    """How a table is written in text, to be written so again."""

    separator: str = ","
    decimal: str = "."
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Table:
    """Cells under a header. Rows are counted as a spreadsheet does: the header is row 1.

    Args:
        file: where they come from.
        columns, rows: the header and what is below it.
        style: how the file is written; its decimal mark is worked out from the numbers that are asked for.
        decimal: the mark, where it was said.
        missing: what becomes of missing values.
    """

    file: Path
    columns: list[str]
    rows: list[list[str]]
    style: Style = field(default_factory=Style)
    decimal: Decimal | None = None
    missing: Holes = "interpolate"

    def column(self, name: str) -> list[str]:
        """One column as text; an empty cell is refused."""
        index = self.columns.index(name)
        for number, row in enumerate(self.rows, start=2):
            if not row[index]:
                raise UserError(f"{self.file}, row {number}, column {name!r} is empty: fill the hole or drop the row")
        return [row[index] for row in self.rows]

    def decimal_of(self, names: Sequence[str]) -> Decimal:
        """The decimal mark of these columns."""
        if self.decimal is not None:
            return self.decimal
        return decimal_of(self._cells(names), str(self.file), points=self.style.separator == ",")

    def numbers(self, names: Sequence[str], *, holes: bool = False) -> Float64[np.ndarray, "rows columns"]:
        """Columns as numbers.

        Args:
            names: of the columns.
            holes: leave what is missing as NaN; by default it is refused.

        Raises:
            UserError: a cell that is missing, text or infinite, with its row and column; no one decimal mark.
        """
        indices = [self.columns.index(name) for name in names]
        # Where a comma separates cells most files hold plain numbers, and `float` is many times as fast as looking at
        # the marks of each cell. What it refuses is read again below, which can say where it stands.
        if self.decimal != "," and self.style.separator == ",":
            try:
                values = np.array([[float(row[index]) for index in indices] for row in self.rows])
                # Python's float takes 1_000, which no table means.
                if np.isfinite(values).all() and not any("_" in row[index] for row in self.rows for index in indices):
                    return values
            except ValueError:
                pass
        decimal = self.decimal_of(names)

        def number(row: int, index: int, cell: str) -> float:
            if holes and is_hole(cell):
                return math.nan
            return parse_number(cell, f"{self.file}, row {row}, column {self.columns[index]!r}", decimal)

        return np.array([[number(n, index, row[index]) for index in indices] for n, row in enumerate(self.rows, 2)])

    def filled(self, names: Sequence[str]) -> Float64[np.ndarray, "rows columns"]:
        """Columns as numbers over evenly spaced rows. The user is told how many values were missing.

        Raises:
            UserError: as in `numbers` and `fill_holes`; anything is missing where that is to be refused.
        """
        values = self.numbers(names, holes=self.missing != "refuse")
        missing = np.isnan(values)
        if missing.any():
            values = fill_holes(values, names, str(self.file), ends=self.missing == "extend")
            row, index = np.argwhere(missing)[0]
            say_filled(self.file, int(missing.sum()), values.size, f"row {row + 2}, column {names[index]!r}")
        return values

    def _cells(self, names: Sequence[str]) -> Iterator[str]:
        indices = [self.columns.index(name) for name in names]
        return (row[index] for row in self.rows for index in indices)


def check_reading(who: object, reading: Reading, *others: str) -> None:
    """Refuse what `Reading` has no name or no value for; `others` can be set too, and are looked at elsewhere."""
    known = Reading.__annotations__
    for name, value in reading.items():
        if name not in known:
            raise UserError(f"{who} takes the options {', '.join([*others, *known])}, not {name}")
        allowed = {"separator": tuple(SEPARATORS), "decimal": get_args(Decimal), "holes": get_args(Holes)}.get(name)
        if allowed and value not in allowed:
            raise UserError(f"{name} must be one of {' '.join(allowed)}, got {value!r}")


def say_filled(file: Path, missing: int, values: int, first: str) -> None:
    """Report what was filled in: how many of how many values were missing, and where the first."""
    progress.say(
        f"{file}: {missing} of {values} values missing, the first in {first}; put on the line between their neighbours "
        "(--set holes=refuse refuses such a file)"
    )


def parse_number(cell: str, where: str, decimal: Decimal = ".") -> float:
    """A finite number, or a refusal that says where it stands."""
    if not cell:
        raise UserError(f"{where} is empty: fill the hole (interpolate it, say) or drop the row")
    value = parse(cell, decimal)
    if value is None:
        mark = ", with a decimal comma" if decimal == "," else ""
        raise UserError(f"{where}: expected a number{mark}, got {cell[:40]!r}")
    if not math.isfinite(value):
        raise UserError(f"{where} is {cell}: every value must be a finite number, fill the hole or drop the row")
    return value


def parse_numbers(cells: Sequence[str], where: str, *, holes: bool = False) -> list[float]:
    """Finite numbers, or a refusal that names `where` and the number of the first bad cell, from 1.

    Args:
        cells: with a decimal point.
        where: the file and the line.
        holes: give NaN for what is missing; by default it is refused.
    """
    try:
        values = [float(cell) for cell in cells]
        if np.isfinite(values).all() and not any("_" in cell for cell in cells):
            return values
    except ValueError:
        pass
    return [
        math.nan if holes and is_hole(cell.strip()) else parse_number(cell, f"{where} {i}")
        for i, cell in enumerate(cells, start=1)
    ]


def read_lines(file: Path, encoding: str | None = None) -> list[str]:
    """The lines of a text file; what is no text, or empty, is refused.

    Args:
        file: in UTF-8, or in UTF-16 with its mark; else it is taken for Windows-1252 (Latin-1), and that is said.
        encoding: what it is in, as Python calls it.
    """
    return _decoded(file, encoding)[0].splitlines()


def _decoded(file: Path, encoding: str | None) -> tuple[str, str]:
    """The text of a file, and its encoding."""
    content = read_bytes(file)
    marked = encoding_of(content)
    chosen = encoding or marked
    try:
        text = content.decode(chosen)
    except (LookupError, TypeError, ValueError) as error:
        if not isinstance(error, UnicodeError):
            raise UserError(f"no encoding is called {encoding!r}: such as utf-8, utf-16 or latin-1") from None
        text = "\0" if encoding or marked != "utf-8" else _western(content)
        if "\0" in text:
            raise UserError(f"{file} is no text in {chosen.upper().removesuffix('-SIG')}") from None
        progress.say(f"{file}: no UTF-8, read as Windows-1252 (Latin-1); --set encoding=NAME names another")
        chosen = "cp1252"
    if "\0" in text:
        utf16 = ": if it is UTF-16, add --set encoding=utf-16-le" if encoding is None else ""
        raise UserError(f"{file} holds zero bytes, which no text in {chosen.upper().removesuffix('-SIG')} does{utf16}")
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise UserError(f"{file} is empty")
    return text, chosen


def _western(content: bytes) -> str:
    """As Windows-1252; a zero where it holds controls that no text has."""
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        return "\0"
    return "\0" if any((c < " " and c not in "\t\n\r\f") or c == "\x7f" for c in text) else text


def read_table(file: Path, **reading: Unpack[Reading]) -> Table:
    """A table with a header, by the ending of its name: .xlsx, .parquet, or text with separators.

    Args:
        file: text may be separated by commas, semicolons, tabs or bars, and encoded as in `read_lines`.
        reading: options for what the file does not say, or says wrong.

    Raises:
        UserError: it cannot be read; no header, no rows, a row with more or fewer cells than the header; or separators
            that leave two ways of reading it.
    """
    check_reading(file, reading)
    rows, style = _cells_of(file, reading)
    header = rows[0]
    numbers = [is_number(cell) for cell in header]
    if any(numbers) and all(number or is_date(cell) for number, cell in zip(numbers, header)):
        what = "numbers" if all(numbers) else "a date and numbers"
        raise UserError(f"{file}, row 1 holds {what}: expected a header with the columns' names")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        what = f"two columns are called {twice!r}" if twice else f"{header.count('')} columns have no name"
        raise UserError(f"{file}, row 1: {what}")
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) != len(header):
            comma = len(header) == 1 and parse(",".join(row), ",") is not None
            hint = f"; if {','.join(row)} is one number, add --set decimal=," if comma else ""
            raise UserError(f"{file}, row {number} has {len(row)} cells where the header has {len(header)}{hint}")
    if not any(rows[1:]):
        raise UserError(f"{file} holds a header and no rows")
    while not any(rows[-1]):
        rows.pop()
        if len(rows) == 1:
            raise UserError(f"{file} holds a header and no rows")
    for number, row in enumerate(rows, start=1):
        if not row or (len(row) > 1 and not any(row)):
            raise UserError(f"{file}, row {number} is blank: drop it")
    return Table(file, header, rows[1:], style, reading.get("decimal"), reading.get("holes", "interpolate"))


def _cells_of(file: Path, reading: Reading) -> tuple[list[list[str]], Style]:
    """Header and rows of any kind of file. A last column without a name and without a cell is dropped."""
    if file.suffix.lower() in ENGINES:
        for name in ("separator", "decimal", "encoding"):
            if name in reading:
                raise UserError(f"{file} is no text: leave {name}={reading[name]} out")
        rows, style = read_frame(file, reading.get("sheet")), Style()
        if not rows or not any(map(any, rows)):
            raise UserError(f"{file} is empty")
    else:
        if "sheet" in reading:
            raise UserError(f"{file} has no sheets: leave sheet={reading['sheet']} out")
        text, encoding = _decoded(file, reading.get("encoding"))
        lines = list(io.StringIO(text, newline=""))  # cells may hold line ends
        # Excel reads the separator there, and does not count the line.
        mark = re.fullmatch(r'"?sep=(.)"?', lines[0].rstrip("\r\n"), re.IGNORECASE)
        lines = lines[1:] if mark else lines
        named = reading.get("separator")
        separator = SEPARATORS[named] if named else mark[1] if mark else _separator(file, lines, reading.get("decimal"))
        try:
            cells = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=separator == " ")
            rows = [[cell.strip() for cell in row] for row in cells]
        except csv.Error as error:
            raise UserError(f"{file} is no CSV: {error}") from None
        style = Style(separator, reading.get("decimal") or ".", encoding)
    while len(rows[0]) > 1 and not rows[0][-1] and not any(row[len(rows[0]) - 1 :] != [""] for row in rows if row):
        rows = [row[:-1] for row in rows]
    return rows, style


def _separator(file: Path, lines: Sequence[str], decimal: Decimal | None) -> str:
    """What separates the cells: a mark in the header that splits every line alike and leaves numbers and dates.

    Raises:
        UserError: two of them do.
    """
    candidates = [mark for mark in ",;\t|" if len(_split(lines[:1], mark)[0]) > 1]
    if len(candidates) < 2:
        # Of a single column, what has a decimal comma was said to.
        return candidates[0] if candidates else ";" if decimal == "," else ","
    even = [mark for mark in candidates if len({len(row) for row in _split(lines, mark) if row}) == 1]
    if len(even) == 1:
        return even[0]
    if not even:
        return max(candidates, key=lambda mark: len(_split(lines[:1], mark)[0]))
    parsed = {mark: _readable(_split(lines[1 : 1 + LOOKED_AT], mark)) for mark in even}
    best = [mark for mark in even if parsed[mark] == max(parsed.values())]
    if len(best) > 1:
        seen = " or ".join(f"{len(_split(lines[:1], mark)[0])} by {NAMES[mark]}" for mark in best)
        header = lines[0].rstrip()[:60]
        raise UserError(f"{file} has the columns {header!r}, {seen}: say which by --set separator={best[0]!r}")
    return best[0]


def _split(lines: Sequence[str], mark: str) -> list[list[str]]:
    try:
        return list(csv.reader(lines, delimiter=mark))
    except csv.Error:
        return [[]]


def _readable(rows: Sequence[Sequence[str]]) -> float:
    """The share of cells that are a number, a date or a hole."""
    cells = [cell.strip() for row in rows for cell in row]
    return sum(is_number(cell) or is_hole(cell) or is_date(cell) for cell in cells) / max(1, len(cells))


def write_table(
    file: Path,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | int | float]],
    style: Style | None = None,
) -> None:
    """Write a table in one step, as the ending of its name says; in text, numbers with up to seven digits.

    Text that a spreadsheet would take for a formula gets an apostrophe in front: it may be the name of a stranger's
    file.

    Args:
        file: .csv, .tsv, .xlsx or .parquet.
        columns, rows: what is written.
        style: of text; by default commas, a decimal point and UTF-8.
    """
    names, cells = [str(_harmless(name)) for name in columns], ([_harmless(c) for c in row] for row in rows)
    kind = output_suffix(file, ".csv")
    if kind in ENGINES:
        with atomic_write(file) as temporary:
            write_frame(temporary, names, list(cells))
        return
    style = style or Style()

    def write(target: io.TextIOBase) -> None:  # row by row: a table may be larger than memory
        writer = csv.writer(target, delimiter="\t" if kind == ".tsv" else style.separator, lineterminator="\n")
        writer.writerow(names)
        for row in cells:
            writer.writerow([f"{c:.7g}".replace(".", style.decimal) if isinstance(c, float) else c for c in row])

    with atomic_write(file) as temporary:
        if style.encoding == "utf-8":  # a file's name may be of bytes that are no letters
            with temporary.open("w", encoding="utf-8", errors="replace", newline="") as opened:
                write(opened)
            return
        text = io.StringIO()
        write(text)
        try:
            temporary.write_bytes(text.getvalue().encode(style.encoding))
        except UnicodeEncodeError:
            temporary.write_bytes(text.getvalue().encode("utf-8", "replace"))


def _harmless(cell: str | int | float) -> str | int | float:
    formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) and not is_number(cell)
    return f"'{cell}" if formula else cell


def check_table(output: Path | None, inputs: Iterable[Path]) -> None:
    """Refuse to write predictions under a name that says they are no table, or over what they are made from."""
    if output is None:
        return
    if output_suffix(output, ".csv") not in WRITES:
        raise UserError(f"predictions are written as {KIND}, got {str(output)!r}")
    if output.suffix.lower() in ENGINES:
        check_engines(output)
    if output.resolve() in {file.resolve() for file in inputs}:
        raise UserError(f"{output} is the input itself; choose another path with -o")

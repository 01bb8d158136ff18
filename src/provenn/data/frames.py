"""Tables of spreadsheets (.xlsx) and of data frames (.parquet), by pandas: cells in and out as text and numbers."""

import datetime
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenn.core.errors import UserError
from provenn.core.inputs import check_file

ENGINES = {".xlsx": "openpyxl", ".parquet": "pyarrow"}
EXTRA = "pip install 'provenn[tables]'"


def read_frame(file: Path, sheet: str | None = None) -> list[list[str]]:
    """The cells under their header as text, holes as empty text.

    Args:
        file: ending in .xlsx or .parquet.
        sheet: of a workbook; its only one by default.

    Raises:
        UserError: a package is missing; the file cannot be read; it has several sheets and none was named.
    """
    pandas = _pandas(file)
    check_file(file)
    try:
        if file.suffix.lower() == ".parquet":
            if sheet is not None:
                raise UserError(f"{file} has no sheets: leave sheet={sheet} out")
            frame = pandas.read_parquet(file)
            named = [name for name in frame.index.names if name is not None]
            counted = pandas.api.types.is_integer_dtype(frame.index.dtype)  # rows, of a larger frame perhaps
            if named or not counted:
                frame = frame.reset_index()
            columns = [[str(name)] for name in frame.columns]
            return [[text for [text] in columns], *_cells(frame)]
        with pandas.ExcelFile(file, engine="openpyxl") as book:
            frame = book.parse(_sheet(file, book.sheet_names, sheet), header=None, dtype=object, na_filter=False)
        return _cells(frame)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes these libraries raise
        raise UserError(f"{file} cannot be read as {file.suffix}: {_in_a_line(error)}") from None


def write_frame(file: Path, columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> None:
    """Write a table where `file`'s ending says how; numbers stay numbers.

    Raises:
        UserError: a package is missing, or the kind of file cannot hold this, such as one name twice.
    """
    frame = _pandas(file).DataFrame(rows, columns=list(columns))
    try:
        if file.suffix.lower() == ".parquet":
            frame.to_parquet(file, index=False)
        else:
            frame.to_excel(file, index=False, engine="openpyxl")
    except (ValueError, TypeError) as error:
        raise UserError(f"{file.suffix} cannot hold this table: {_in_a_line(error)}; name a .csv") from None


def check_engines(file: Path) -> None:
    """Refuse where a package for this kind of file is missing, before any work is done for it."""
    needed = ("pandas", ENGINES[file.suffix.lower()])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{file}: {file.suffix} needs {' and '.join(missing)}: {EXTRA}")


def _pandas(file: Path) -> Any:
    check_engines(file)
    import pandas

    return pandas


def _sheet(file: Path, names: Sequence[str], wanted: str | None) -> str:
    if wanted is not None and wanted not in names:
        raise UserError(f"{file} has no sheet {wanted!r}; it has: {', '.join(names)}")
    if wanted is None and len(names) != 1:
        raise UserError(f"{file} has {len(names)} sheets ({', '.join(names)}): say which by --set sheet={names[0]}")
    return wanted or names[0]


def _cells(frame: Any) -> list[list[str]]:
    columns = [_column(list(frame.iloc[:, index])) for index in range(frame.shape[1])]
    return [list(row) for row in zip(*columns)]


def _column(cells: list[Any]) -> list[str]:
    """One column as text; moments that are all at midnight are days."""
    moments = [cell for cell in cells if isinstance(cell, datetime.datetime) and cell == cell]
    days = all(moment.time() == datetime.time() for moment in moments)
    return [_text(cell, days) for cell in cells]


def _text(cell: Any, days: bool) -> str:
    if cell is None or type(cell).__name__ in ("NAType", "NaTType") or (isinstance(cell, float) and cell != cell):
        return ""
    if isinstance(cell, datetime.datetime):
        return cell.date().isoformat() if days else cell.isoformat(sep=" ")
    if isinstance(cell, float) and math.isfinite(cell) and cell == int(cell) and abs(cell) < 2**53:
        return str(int(cell))  # a spreadsheet knows no whole numbers
    return str(cell).strip()


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

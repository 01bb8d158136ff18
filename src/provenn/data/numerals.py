"""Numbers as people write them: a decimal point or comma, groups of thousands, and holes where there are none."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float64

from provenn.core.errors import UserError

Decimal = Literal[".", ","]
HOLES = frozenset({"", "-", "--", "?", "na", "n/a", "#n/a", "nan", "-nan", "nat", "null", "none", "<na>"})
_GROUP = "[’'\u00a0\u202f {other}]"  # marks of thousands, besides the one of the two that is not the decimal mark
_GROUPED = "[+-]?[1-9][0-9]{{0,2}}(?:({group})[0-9]{{3}})(?:\\1[0-9]{{3}})*(?:{decimal}[0-9]*)?"
GROUPED = {
    mark: re.compile(_GROUPED.format(group=_GROUP.format(other=other), decimal=re.escape(mark)))
    for mark, other in ((".", ","), (",", "."))
}
COMMA = re.compile(r"[+-]?(?:[0-9]+,[0-9]*|,[0-9]+)(?:[eE][+-]?[0-9]+)?")


def is_hole(cell: str) -> bool:
    """Whether a cell stands for a value that is missing.

    >>> is_hole(""), is_hole("n/a"), is_hole("0")
    (True, True, False)
    """
    return cell.lower() in HOLES


def parse(cell: str, decimal: str = ".") -> float | None:
    """A number with this decimal mark, thousands in groups or not; None where the cell is none.

    >>> parse("1.5"), parse("1,5", ","), parse("1.234,5", ","), parse("1 234.5"), parse("1.234.5")
    (1.5, 1.5, 1234.5, 1234.5, None)
    """
    grouped = GROUPED[decimal].fullmatch(cell)
    if grouped:
        return float(cell.replace(grouped[1], "").replace(decimal, "."))
    if decimal == ",":
        if COMMA.fullmatch(cell):
            return float(cell.replace(",", "."))
        if "." in cell:
            return None
    if "_" in cell:  # which Python's float passes over
        return None
    try:
        return float(cell)
    except ValueError:
        return None


def is_number(cell: str) -> bool:
    """Whether a cell is a number in either way of writing, NaN included."""
    return parse(cell, ".") is not None or parse(cell, ",") is not None


def decimal_of(cells: Iterable[str], where: str, *, points: bool = True) -> Decimal:
    """The decimal mark of all cells, text and holes set aside: the one with which each is a number.

    Args:
        cells: as they are written.
        where: the file, for the refusal.
        points: read 1.234 as one and a bit where there is no evidence for a thousand. True where commas separate the
            cells. Where semicolons do, the author of the file may have meant a thousand.

    Raises:
        UserError: some cells have a decimal point and others a comma, or cells may be read in two ways.

    >>> decimal_of(["1.234,5", "7"], "a.csv"), decimal_of(["1,234.5", "7"], "a.csv")
    (',', '.')
    """
    point = comma = either = ""
    for cell in cells:
        if not ("." in cell or "," in cell) or is_hole(cell):
            continue
        with_point, with_comma = parse(cell, "."), parse(cell, ",")
        if with_point == with_comma:
            continue
        if with_comma is None:
            point = point or cell
        elif with_point is None:
            comma = comma or cell
        elif not points or "," in cell:
            either = either or cell
    if point and comma:
        raise UserError(
            f"{where} has numbers with a decimal point ({point!r}) and with a comma ({comma!r}): keep to one"
        )
    if comma or point or not either:
        return "," if comma else "."
    raise UserError(
        f"{where}: {either!r} may be {parse(either, '.'):.10g} or {parse(either, ','):.10g}, and no other number shows "
        "which: add --set decimal=. or --set decimal=,"
    )


def fill_holes(
    values: Float64[np.ndarray, "rows columns"], names: Sequence[str], where: str, *, ends: bool = False
) -> Float64[np.ndarray, "rows columns"]:
    """Put each NaN on the straight line between the values before and after it in its column.

    Args:
        values: not changed.
        names: of the columns.
        where: what the rows are of, for the refusal.
        ends: give a hole before the first value, or after the last, that value; else it is refused.

    Raises:
        UserError: a column without any value, or holes at an end of one.

    >>> fill_holes(np.array([[1.0], [np.nan], [2.0]]), ["x"], "a.csv").T
    array([[1. , 1.5, 2. ]])
    """
    filled = values.copy()
    rows = np.arange(len(values))
    for column in np.flatnonzero(np.isnan(values).any(0)):
        known = ~np.isnan(values[:, column])
        if not known.any():
            raise UserError(f"{where}: every value of {names[column]!r} is missing: leave it out")
        first, last = int(known.argmax()), len(known) - 1 - int(known[::-1].argmax())
        if not ends and (first > 0 or last < len(known) - 1):
            what = f"first {first}" if first else f"last {len(known) - 1 - last}"
            raise UserError(
                f"{where}: the {what} of {len(known)} values of {names[column]!r} are missing, with no value beyond to "
                "draw a line to: drop these rows, or repeat the nearest value by --set holes=extend"
            )
        filled[~known, column] = np.interp(rows[~known], rows[known], values[known, column])
    return filled

"""What a search found, as lines for the terminal, a table, and a sheet: queries and finds are pictures or texts."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from provenn.core.errors import UserError
from provenn.core.files import atomic_write, check_no_input, is_stream, output_suffix
from provenn.data.images import SUFFIXES
from provenn.data.tables import check_table, write_table
from provenn.tasks.demos import as_shown

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 10  # lines of a ranking in the terminal
SHEET = 50  # queries on a sheet
CELL, SPACE = 128, 4  # height of a picture on a sheet, and between two, in pixels
LETTERS, LINES = 24, 8  # of a text on a sheet
Item = Path | str  # a picture, or a text
Rows = Sequence[Sequence[tuple[Item, float]]]  # for each query what was found, the most alike first


def search_targets(
    output: Path | None, given: Sequence[Path], stem: str = "ranking"
) -> tuple[Path | None, Path | None]:
    """Where the sheet and the table of a search go.

    Args:
        output: a table (.csv), a picture, or a folder, which gets both.
        given: files that must not be written over.
        stem: of the names of both files in a folder.

    Raises:
        UserError: another ending, or one of the files that were given.
    """
    if output is None:
        return None, None
    suffix = output_suffix(output, ".csv")
    if suffix == ".csv" and not output.is_dir():
        check_table(output, given)
        return None, output
    if output.suffix and not output.is_dir():
        if suffix not in SUFFIXES or is_stream(output):
            raise UserError(f"cannot write {output.name}: expected .csv, a folder, or one of {', '.join(SUFFIXES)}")
        check_no_input(output, given)
        return output, None
    sheet, table = output / f"{stem}.png", output / f"{stem}.csv"
    for file in (sheet, table):
        check_no_input(file, given)
    return sheet, table


def in_lines(queries: Sequence[Item], rows: Rows) -> list[str]:
    """The first queries, each with the five that are most alike; files by their paths below what all share."""
    lines = []
    shown = [row[:5] for row in rows[:SHOWN]]
    folders = {str(found.parent) for row in shown for found, _ in row if isinstance(found, Path)}
    above = os.path.commonpath(folders) if folders else ""
    for query, row in zip(queries, shown):
        named = (os.path.relpath(found, above) if isinstance(found, Path) else repr(found) for found, _ in row)
        lines.append(f"{query}: " + ", ".join(f"{name} {value:.3f}" for name, (_, value) in zip(named, row)))
    if len(queries) > SHOWN:
        lines.append(f"and {len(queries) - SHOWN} more; -o FILE.csv writes them all")
    return lines


def write_ranking(table: Path, queries: Sequence[Item], rows: Rows, column: str) -> None:
    """A row for each find, with the query, the rank from 1 on and the similarity.

    Args:
        table: where it goes.
        queries, rows: what was asked and found.
        column: what a find is called in the header.
    """
    lines = [
        (str(query), str(rank), str(found), f"{value:.6f}")
        for query, row in zip(queries, rows)
        for rank, (found, value) in enumerate(row, 1)
    ]
    write_table(table, ["query", "rank", column, "similarity"], lines)


def draw_sheet(path: Path, queries: Sequence[Item], rows: Rows) -> int:
    """A row a query: the query, a gap, and what was found, the most alike first. Returns how many files are gone."""
    from PIL import Image

    gone = 0
    bands = []
    for query, row in zip(queries, rows):
        cells = []
        for item, text in ((query, "query"), *((found, f"{value:.3f}") for found, value in row)):
            if isinstance(item, Path) and not item.is_file():
                gone += 1
                continue
            cells.append(_cell(item, text))
        bands.append(cells)
    widths = [sum(cell.width + SPACE for cell in cells) + 3 * SPACE for cells in bands]
    sheet = Image.new("RGB", (max(widths), len(bands) * (CELL + 14 + SPACE)), "white")
    for number, cells in enumerate(bands):
        left = 0
        for place, cell in enumerate(cells):
            sheet.paste(cell, (left, number * (CELL + 14 + SPACE)))
            left += cell.width + SPACE + (3 * SPACE if place == 0 else 0)
    with atomic_write(path) as temporary:
        sheet.save(temporary)
    return gone


def _cell(item: Item, below: str) -> "Image":
    """A picture, or the words of a text, above a line."""
    from PIL import Image, ImageDraw

    if isinstance(item, Path):
        image = as_shown(item).convert("RGB")
        wide = max(1, round(image.width * CELL / image.height))
        cell = Image.new("RGB", (max(min(wide, 4 * CELL), 44), CELL + 14), "white")
        cell.paste(image.resize((min(wide, 4 * CELL), CELL)))
    else:
        cell = Image.new("RGB", (6 * LETTERS + 8, CELL + 14), "white")
        for number, line in enumerate(textwrap.wrap(item, LETTERS)[:LINES]):
            words = line.encode("latin-1", "replace").decode("latin-1")  # all that the font of Pillow has
            ImageDraw.Draw(cell).text((2, 2 + 15 * number), words, fill="black")
    ImageDraw.Draw(cell).text((1, CELL + 1), below, fill="black")
    return cell

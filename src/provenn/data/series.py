"""Labelled series: the UCR/UEA sets inside aeon, and the user's own in the field's formats."""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
from jaxtyping import Float32, Float64

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.frames import ENGINES
from provenn.data.numerals import fill_holes, is_hole, is_number
from provenn.data.tables import Reading, Table, check_reading, parse_numbers, read_lines, read_table, say_filled

FORMATS = (
    "a .ts file; a .tsv file of the UCR archive (a line a series: label, then values); a table with a header as .csv, "
    ".xlsx or .parquet, either a row a series (`label,1,2,3,…`) or a row a step (`series,time,CHANNEL,…,label`)"
)


@dataclass(frozen=True)
class Collection:
    """Series of one or more channels, of equal or unequal length.

    Args:
        series: each (tokens, channels).
        names: what the file calls them.
        labels: one a series; None where the file has none.
    """

    series: list[Float32[np.ndarray, "_ _"]]
    names: list[str]
    labels: list[str] | None


def bundled(relative: str) -> Path:
    """A data file that aeon ships, found without the seconds that importing aeon takes."""
    spec = importlib.util.find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the embedded series come with aeon, which is not installed: pip install 'provenn[series]'")
    file = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / relative
    if not file.exists():
        raise UserError(f"the installed aeon ships no {relative}: pip install 'aeon>=1.1'")
    return file


def read_series(file: Path, **reading: Unpack[Reading]) -> Collection:
    """Labelled or unlabelled series in any of `FORMATS`.

    A missing value lies on the line between its neighbours in its series, as `reading` says; where a row holds a
    series, what is missing at its end makes it shorter. Both are reported to the user.

    Args:
        file: its ending says which format.
        reading: options for what the file does not say, or says wrong.

    Raises:
        UserError: another format, or a cell, a line or a series that breaks the format. The message says where.
    """
    check_reading(file, reading)
    kind = file.suffix.lower()
    if kind not in (".ts", ".tsv", ".csv", *ENGINES):
        raise UserError(f"{file}: cannot read series from {kind or 'a file without suffix'}; expected {FORMATS}")
    if kind == ".ts" or (kind == ".tsv" and not _has_header(file, reading)):
        for name in reading.keys() - {"encoding", "holes"}:
            raise UserError(f"{file}: {name} is of tables with a header: leave it out")
        collection = (_read_ts if kind == ".ts" else _read_tsv)(file, reading)
    else:
        table = read_table(file, **reading)
        collection = _read_long(table) if "series" in table.columns else _read_wide(table)
    _check_channels(file, collection)
    return collection


def _has_header(file: Path, reading: Reading) -> bool:
    """A line of the archive is a label and numbers; a header has other words."""
    first, *others = (cell.strip() for cell in read_lines(file, reading.get("encoding"))[0].split("\t"))
    return bool(others) and (first == "label" or not any(is_number(cell) or is_hole(cell) for cell in others))


def _read_ts(file: Path, reading: Reading) -> Collection:
    lines = enumerate(read_lines(file, reading.get("encoding")), start=1)
    filling = _Filling(file, reading)
    classes: list[str] | None = None
    for _, line in lines:
        key, *values = line.strip().split() or [""]
        match key.lower():
            case "@data":
                break
            case "@timestamps" if values[:1] and values[0].lower() == "true":
                raise UserError(f"{file} has time stamps: expected values alone, `@timeStamps false`")
            case "@targetlabel" if values[:1] and values[0].lower() == "true":
                raise UserError(f"{file} holds a regression problem (@targetLabel): expected @classLabel")
            case "@classlabel" if values[:1] and values[0].lower() == "true":
                classes = values[1:]
    else:
        raise UserError(f"{file} has no @data line: it is no .ts file, or cut off")
    series: list[Float32[np.ndarray, "_ _"]] = []
    labels, names = [], []
    for number, line in lines:
        if not line.strip():
            continue
        *channels, label = line.strip().split(":") if classes is not None else [*line.strip().split(":"), ""]
        if classes is not None and label.strip() not in classes:
            raise UserError(f"{file}, line {number}: the label {label[:40]!r} is not among @classLabel's {classes}")
        values_of = [
            filling.parse(channel.split(","), f"line {number}, channel {c}, step")
            for c, channel in enumerate(channels, start=1)
        ]
        if len({len(channel) for channel in values_of}) != 1:
            sizes = ", ".join(str(len(channel)) for channel in values_of)
            raise UserError(f"{file}, line {number}: the channels have {sizes or 'no'} values, expected equally many")
        names.append(str(len(series) + 1))
        series.append(filling.fill(np.asarray(values_of).T, f"line {number}"))
        labels.append(label.strip())
    filling.say()
    return Collection(series, names, labels if classes is not None else None)


def _read_tsv(file: Path, reading: Reading) -> Collection:
    series: list[Float32[np.ndarray, "_ _"]] = []
    labels, filling = [], _Filling(file, reading)
    for number, line in enumerate(read_lines(file, reading.get("encoding")), start=1):
        label, *cells = line.rstrip("\r\n").split("\t") if line.strip() else [""]
        values = filling.end(np.asarray(filling.parse(cells, f"line {number}, value")))
        series.append(filling.fill(values[:, None], f"line {number}"))
        labels.append(label.strip())
    filling.say()
    return Collection(series, [str(i + 1) for i in range(len(series))], labels)


def _read_wide(table: Table) -> Collection:
    steps = [name for name in table.columns if name != "label"]
    if not steps:
        raise UserError(f"{table.file} has a label and no values: expected {FORMATS}")
    labels = table.column("label") if "label" in table.columns else None
    filling = _Filling(table.file, {"holes": table.missing})
    values = table.numbers(steps, holes=filling.holes)
    series = [filling.fill(filling.end(row)[:, None], f"row {number}") for number, row in enumerate(values, start=2)]
    filling.say()
    return Collection(series, [str(i + 1) for i in range(len(values))], labels)


class _Filling:
    """Fills the holes of one series after another, and says in the end how many there were."""

    def __init__(self, file: Path, reading: Reading):
        self.file, self.missing = file, reading.get("holes", "interpolate")
        self.holes = self.missing != "refuse"
        self.filled = self.cells = self.shortened = 0
        self.first = ""

    def parse(self, cells: Sequence[str], where: str) -> list[float]:
        """Numbers, NaN where one is missing and may be."""
        return parse_numbers(cells, f"{self.file}, {where}", holes=self.holes)

    def end(self, values: Float64[np.ndarray, " steps"]) -> Float64[np.ndarray, " kept"]:
        """Without what is missing at the end."""
        known = np.flatnonzero(~np.isnan(values))
        kept = values[: known[-1] + 1] if len(known) else values
        self.shortened += len(kept) < len(values)
        return kept

    def fill(
        self, values: Float64[np.ndarray, "steps channels"], where: str, names: Sequence[str] | None = None
    ) -> Float32[np.ndarray, "steps channels"]:
        """Without holes."""
        missing = np.isnan(values)
        self.cells += values.size
        if missing.any():
            self.filled += int(missing.sum())
            self.first = self.first or where
            channels = names or [f"channel {c}" for c in range(1, values.shape[1] + 1)]
            values = fill_holes(values, channels, f"{self.file}, {where}", ends=self.missing == "extend")
        return values.astype(np.float32)

    def say(self) -> None:
        """How many holes were filled, and how many series were made shorter."""
        if self.filled:
            say_filled(self.file, self.filled, self.cells, self.first)
        if self.shortened:
            progress.say(f"{self.file}: {self.shortened} series end where their last values are missing")


def _read_long(table: Table) -> Collection:
    channels = [name for name in table.columns if name not in ("series", "time", "label")]
    if "time" not in table.columns or not channels:
        raise UserError(
            f"{table.file} has the columns {', '.join(table.columns)}: expected series,time,CHANNEL,…,label"
        )
    names = table.column("series")
    if table.missing != "refuse" and any(map(is_hole, table.column("time"))):
        table.numbers(["time"])  # refuses it
    both = table.numbers(["time", *channels], holes=table.missing != "refuse")
    times, values = both[:, 0], both[:, 1:]
    filling = _Filling(table.file, {"holes": table.missing})
    given = table.column("label") if "label" in table.columns else None
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    series, labels = [], []
    for name, own in rows.items():
        order = np.asarray(own)[np.argsort(times[own], kind="stable")]
        if (np.diff(times[order]) == 0).any():
            raise UserError(f"{table.file}: the series {name!r} has two rows for one time")
        series.append(filling.fill(values[order], f"series {name!r}", channels))
        if given is not None:
            if len({given[row] for row in own}) > 1:
                raise UserError(f"{table.file}: the series {name!r} has more than one label")
            labels.append(given[own[0]])
    filling.say()
    return Collection(series, list(rows), labels if given is not None else None)


def _check_channels(file: Path, collection: Collection) -> None:
    if not collection.series:
        raise UserError(f"{file} holds no series")
    widths = Counter(values.shape[1] for values in collection.series)
    if len(widths) > 1:
        usual = widths.most_common(1)[0][0]
        odd = next(i for i, values in enumerate(collection.series) if values.shape[1] != usual)
        raise UserError(
            f"{file}: the series {collection.names[odd]} has {collection.series[odd].shape[1]} channels "
            f"where others have {usual}"
        )
    short = next((i for i, values in enumerate(collection.series) if len(values) == 0), None)
    if short is not None:
        raise UserError(f"{file}: the series {collection.names[short]} has no values")

"""Labelled series: the UCR/UEA sets inside aeon, and the user's own in the field's formats."""

import importlib.util
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from provenn.data.tables import Table, parse_numbers, read_lines, read_table
from provenn.errors import UserError

FORMATS = (
    "a .ts file; a .tsv file of the UCR archive (a line a series: label, then values); "
    "a CSV with a header, either a row a series (`label,1,2,3,…`) or a row a step (`series,time,CHANNEL,…,label`)"
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


def read_series(file: Path) -> Collection:
    """Labelled or unlabelled series in any of `FORMATS`.

    Raises:
        UserError: another format, or a cell, a line or a series that breaks the format's promise, with its place.
    """
    if file.suffix == ".ts":
        collection = _read_ts(file)
    elif file.suffix == ".tsv":
        collection = _read_tsv(file)
    elif file.suffix == ".csv":
        table = read_table(file)
        collection = _read_long(table) if "series" in table.columns else _read_wide(table)
    else:
        raise UserError(f"{file}: cannot read series from {file.suffix or 'a file without suffix'}; expected {FORMATS}")
    _check_channels(file, collection)
    return collection


def _read_ts(file: Path) -> Collection:
    lines = enumerate(read_lines(file), start=1)
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
    series, labels, names = [], [], []
    for number, line in lines:
        if not line.strip():
            continue
        *channels, label = line.strip().split(":") if classes is not None else [*line.strip().split(":"), ""]
        if classes is not None and label.strip() not in classes:
            raise UserError(f"{file}, line {number}: the label {label[:40]!r} is not among @classLabel's {classes}")
        values_of = [
            parse_numbers(channel.replace("?", "NaN").split(","), f"{file}, line {number}, channel {c}, step")
            for c, channel in enumerate(channels, start=1)
        ]
        if len({len(channel) for channel in values_of}) != 1:
            sizes = ", ".join(str(len(channel)) for channel in values_of)
            raise UserError(f"{file}, line {number}: the channels have {sizes or 'no'} values, expected equally many")
        series.append(np.asarray(values_of, dtype=np.float32).T)
        labels.append(label.strip())
        names.append(str(len(series)))
    return Collection(series, names, labels if classes is not None else None)


def _read_tsv(file: Path) -> Collection:
    series, labels = [], []
    for number, line in enumerate(read_lines(file), start=1):
        label, *cells = line.strip().split("\t")
        values = parse_numbers(cells, f"{file}, line {number}, value")
        series.append(np.asarray(values, dtype=np.float32)[:, None])
        labels.append(label)
    return Collection(series, [str(i + 1) for i in range(len(series))], labels)


def _read_wide(table: Table) -> Collection:
    steps = [name for name in table.columns if name != "label"]
    if not steps:
        raise UserError(f"{table.file} has a label and no values: expected {FORMATS}")
    labels = table.column("label") if "label" in table.columns else None
    values = table.numbers(steps).astype(np.float32)
    return Collection([row[:, None] for row in values], [str(i + 1) for i in range(len(values))], labels)


def _read_long(table: Table) -> Collection:
    channels = [name for name in table.columns if name not in ("series", "time", "label")]
    if "time" not in table.columns or not channels:
        raise UserError(
            f"{table.file} has the columns {', '.join(table.columns)}: expected series,time,CHANNEL,…,label"
        )
    names = table.column("series")
    times = table.numbers(["time"])[:, 0]
    values = table.numbers(channels).astype(np.float32)
    given = table.column("label") if "label" in table.columns else None
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    series, labels = [], []
    for name, own in rows.items():
        order = np.asarray(own)[np.argsort(times[own], kind="stable")]
        if (np.diff(times[order]) == 0).any():
            raise UserError(f"{table.file}: the series {name!r} has two rows for one time")
        series.append(values[order])
        if given is not None:
            if len({given[row] for row in own}) > 1:
                raise UserError(f"{table.file}: the series {name!r} has more than one label")
            labels.append(given[own[0]])
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

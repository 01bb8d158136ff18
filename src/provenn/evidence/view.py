"""How records are put into words; the terminal, the report and the board say it alike. Nothing is computed here."""

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import isfinite, isinf
from pathlib import Path

from provenn.catalog import Claim
from provenn.evidence.interval import Number
from provenn.evidence.measurement import Measurement, Series, Table
from provenn.evidence.record import Ledger, Record
from provenn.evidence.verdict import Verdict

SYMBOLS = {
    Verdict.REPRODUCED: "✔",
    Verdict.DIRECTION_HOLDS: "▲",
    Verdict.INCONCLUSIVE: "~",
    Verdict.NOT_REPRODUCED: "✘",
    Verdict.NOT_MEASURED: "–",
}


def number(value: Number | None, digits: int = 4) -> str:
    """A figure as people write it.

    >>> number(25557112.0), number(0.123456), number(-2.0), number(1.5e-9), number(None)
    ('25,557,112', '0.1235', '-2', '1.5e-09', '–')
    """
    if value is None:
        return "–"
    if not isfinite(value):
        return ("-" if value < 0 else "") + "∞" if isinf(value) else "not a number"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def ours(measurement: Measurement) -> str:
    """What was measured: the effect, its interval, and the two sides that it came from."""
    if measurement.effect is None:
        return ""
    if measurement.kind_of_effect == "truth":
        return "holds" if measurement.effect else "does not hold"
    unit = f" {measurement.unit}" if measurement.unit else ""
    unit = f" ×{unit}" if measurement.unit[:1].isdigit() else unit  # of 2^20, say
    low, high = measurement.interval or (None, None)
    spread = "" if low is None or low == high else f" [{number(low, 3)}, {number(high, 3)}]"
    if measurement.kind_of_effect == "value":
        return number(measurement.value) + unit + spread
    sides = f" ({number(measurement.value)} against {number(measurement.baseline)}{unit})"
    sign = "×" if measurement.kind_of_effect == "ratio" else "+" if measurement.effect >= 0 else ""
    return sign + number(measurement.effect) + spread + sides


def theirs(of: Claim | Record) -> str:
    """The figure that was published, or what the claim comes to in numbers."""
    if of.published or not of.expects or (isinstance(of, Record) and of.measurement.kind_of_effect == "truth"):
        return str(of.published or "")
    return f"{'claimed' if of.origin == 'paper' else 'we claim'} {of.expects}"


def tally(records: Iterable[Record]) -> str:
    """How many records got which verdict.

    >>> tally([])
    ''
    """
    counts = Counter(record.verdict for record in records)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])


def plots(measurement: Measurement) -> dict[str, list[Series]]:
    """The lines by the picture that they share."""
    found: dict[str, list[Series]] = {}
    for series in measurement.series:
        found.setdefault(series.plot, []).append(series)
    return found


def table_of(caption: str, lines: Sequence[Series]) -> Table:
    """The numbers of a plot: one row a place on its horizontal axis."""
    known = [dict(zip(line.x, line.y)) for line in lines]
    rows = [[number(x), *(values.get(x) for values in known)] for x in sorted({x for line in lines for x in line.x})]
    return Table(caption=caption, columns=[lines[0].x_label or "x", *(line.name for line in lines)], rows=rows)


def cell(value: str | float | int | None) -> str:
    """An entry of a table."""
    return value if isinstance(value, str) else number(value)


def repeat(records: Iterable[Record]) -> str:
    """The command that measures these records of one paper again."""
    records = list(records)
    seeds = max((record.measurement.seeds for record in records), key=len, default=[])
    device = records[0].environment.device.partition(":")[0]
    words = ["provenn", "reproduce", records[0].paper, "--budget", records[0].budget]
    return shlex.join(words + (["--seeds", seeds_as_given(seeds)] if seeds else []) + ["--device", device])


def seeds_as_given(seeds: Sequence[int]) -> str:
    """Seeds as `--seeds` takes them: a count where they are the first ones, else a range or a list."""
    if list(seeds) == list(range(len(seeds))):
        return str(len(seeds))
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def committed() -> Path | None:
    """The folder of the records that come with the source, where this provenn runs from a checkout."""
    folder = Path(__file__).parents[3] / "results"
    return folder if folder.is_dir() else None


def ledgers(folder: Path, tell: Callable[[str], None] = lambda message: None) -> list[Ledger]:
    """The papers' records in a folder; a file that holds none is told of and left where it is."""
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            found.append(Ledger.model_validate_json(file.read_bytes()))
        except ValueError:
            tell(f"left out {file}: it holds no records that can be read")
    return found

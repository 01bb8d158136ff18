"""A catalogue: labels of many spectra, part by part, here or on a cluster; parts are kept until it is written."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write, output_suffix, write_atomically
from provenn.core.inputs import check_file
from provenn.data.frames import ENGINES, check_engines
from provenn.data.tables import WRITES, is_number, parse_number, read_table, write_table
from provenn.papers.rrnet.task.files import ARRAYS, astropy_fits, count_spectra, read_spectra
from provenn.papers.rrnet.task.scaling import System

PART = 1024  # spectra
TRIES = 4  # of a part whose worker is lost
SHEET = 1_048_575  # rows of a workbook's sheet below its header
WRITTEN_FITS = (".fits", ".fit")
LAYOUT = b"2"  # of a part; those of another one are not read


class Rows(NamedTuple):
    """What is estimated of some spectra.

    Args:
        names: of the spectra.
        values: (spectra, 2 · labels), of each label its mean and its standard deviation.
        missing: how many pixels of each spectrum are missing.
    """

    names: list[str]
    values: np.ndarray
    missing: np.ndarray


Parts = Iterator[tuple[list[str], np.ndarray]]  # names of spectra, and their values


class Size(NamedTuple):
    """How many spectra a catalogue has, and how many letters its longest name at most."""

    spectra: int
    longest_name: int


class Slice(NamedTuple):
    """Spectra of a file, from `low` to before `high`."""

    file: Path
    low: int
    high: int


class Catalogue(NamedTuple):
    """What is to be estimated.

    Args:
        parts: slices of files, at most `PART` spectra together.
        velocity: of all stars, in km/s.
        velocities: of those spectra that a table names.
    """

    parts: list[list[Slice]]
    velocity: float | int
    velocities: dict[str, float]

    @property
    def size(self) -> Size:
        """Of all parts together."""
        pieces = [piece for part in self.parts for piece in part]
        longest = max((len(spectrum_name(piece.file)) + 1 + len(str(piece.high)) for piece in pieces), default=1)
        return Size(sum(piece.high - piece.low for piece in pieces), longest)


def parts_of(files: Sequence[Path]) -> list[list[Slice]]:
    """Slices of files in their order, `PART` spectra in a part but for the last."""
    parts: list[list[Slice]] = [[]]
    room = PART
    for file in files:
        low, count = 0, count_spectra(file)
        while low < count:
            high = min(count, low + room)
            parts[-1].append(Slice(file, low, high))
            room -= high - low
            low = high
            if not room:
                parts.append([])
                room = PART
    return [part for part in parts if part]


def estimated(systems: Sequence[System], part: Sequence[Slice], catalogue: Catalogue) -> Rows:
    """What is estimated of a part's spectra."""
    names: list[str] = []
    values, missing = [], []
    for file, low, high in part:
        velocity = catalogue.velocity
        if catalogue.velocities and file.suffix.lower() not in ARRAYS:
            velocity = catalogue.velocities.get(spectrum_name(file), velocity)
        spectra = read_spectra(file, systems[0].known.grid(), velocity, low, high)
        names += spectra.names
        told = [system(spectra.flux, spectra.error) for system in systems]
        pairs = [np.stack(pair, -1).reshape(len(spectra.flux), -1) for pair in told]
        values.append(np.concatenate(pairs, 1))
        missing.append(np.isnan(spectra.flux).sum(1))
    return Rows(names, np.concatenate(values), np.concatenate(missing))


def spectrum_name(file: Path) -> str:
    """How a file that holds one spectrum is called in a catalogue.

    >>> spectrum_name(Path("med-58025.fits.gz"))
    'med-58025'
    """
    return file.name.removesuffix(".gz").rsplit(".", 1)[0]


def catalogued(systems: Sequence[System], catalogue: Catalogue, output: Path | None, cluster: str) -> Iterator[Rows]:
    """All parts in their order; those that a run before has left beside `output` are read, not computed.

    Args:
        systems: of other labels each.
        catalogue: the spectra.
        output: where the catalogue goes; its parts lie in a folder beside it meanwhile.
        cluster: the address of a Ray cluster, or "auto"; empty for this process.
    """
    if output is None or (len(catalogue.parts) == 1 and not cluster):
        for part in progress.track(catalogue.parts, "parts"):
            yield estimated(systems, part, catalogue)
        return
    folder = output.with_name(f"{output.name}.parts")
    _begin(folder, systems, catalogue)
    places = [folder / f"{number:06}.npz" for number in range(len(catalogue.parts))]
    waiting = [number for number, place in enumerate(places) if not place.exists()]
    if len(waiting) < len(places):
        progress.say(f"{len(places) - len(waiting)} of {len(places)} parts were there, in {folder}")
    if cluster:
        done = _on_cluster(cluster, systems, [catalogue.parts[number] for number in waiting], catalogue)
    else:
        done = ((at, estimated(systems, catalogue.parts[number], catalogue)) for at, number in enumerate(waiting))
    for at, rows in progress.track(done, "parts", total=len(waiting)):
        with atomic_write(places[waiting[at]]) as temporary, temporary.open("wb") as opened:
            np.savez(opened, names=np.array(rows.names), values=rows.values, missing=rows.missing)
    for place, part in zip(places, catalogue.parts, strict=True):
        with np.load(place, allow_pickle=False) as held:
            rows = Rows(held["names"].tolist(), held["values"], held["missing"])
        if len(rows.names) != sum(piece.high - piece.low for piece in part):
            raise UserError(f"{place} holds {len(rows.names)} rows, its part has other spectra: delete {folder}")
        yield rows


def ended(output: Path) -> None:
    """Remove the parts, once the catalogue is written."""
    shutil.rmtree(output.with_name(f"{output.name}.parts"), ignore_errors=True)


def _begin(folder: Path, systems: Sequence[System], catalogue: Catalogue) -> None:
    """Keep the parts of the same weights and spectra, and no others."""
    digest = hashlib.sha256(LAYOUT + json.dumps([catalogue.velocity, sorted(catalogue.velocities.items())]).encode())
    for system in systems:
        digest.update(json.dumps([known.model_dump() for known in system.knowns]).encode())
        for name, tensor in (system.ensemble or system.network).state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    for piece in (piece for part in catalogue.parts for piece in part):
        facts = piece.file.stat()
        digest.update(f"{piece.file.resolve()} {piece.low} {piece.high} {facts.st_size} {facts.st_mtime_ns}".encode())
    plan = folder / "plan"
    if folder.exists() and (not plan.exists() or plan.read_text() != digest.hexdigest()):
        progress.say(f"{folder} is of other weights or spectra, and begins anew")
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    write_atomically(plan, digest.hexdigest())


def _on_cluster(
    address: str, systems: Sequence[System], parts: Sequence[Sequence[Slice]], catalogue: Catalogue
) -> Iterator[tuple[int, Rows]]:
    """Parts as they end, with their place; a part whose worker dies begins again on another."""
    ray = _ray()
    began = not ray.is_initialized()
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    try:
        if began:
            ray.init(**({} if address == "local" else {"address": address}), **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        said = str(error).strip().splitlines()
        raise UserError(f"no cluster at {address!r}: {said[-1] if said else type(error).__name__}") from None
    try:
        there = ray.remote(num_cpus=1, max_retries=TRIES - 1)(_there)
        held, about = ray.put(list(systems)), ray.put(catalogue._replace(parts=[]))
        side_by_side = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        running: dict[Any, int] = {}
        queue = iter(enumerate(parts))
        while True:
            for at, part in queue:
                running[there.remote(held, [piece._replace(file=piece.file.resolve()) for piece in part], about)] = at
                if len(running) >= side_by_side:
                    break
            if not running:
                return
            (handle,), _ = ray.wait(list(running), num_returns=1)
            at = running.pop(handle)
            try:
                outcome = ray.get(handle)
            except ray.exceptions.RayError as error:
                said = str(error).strip().splitlines()
                raise UserError(
                    f"a part was lost {TRIES} times ({said[-1] if said else type(error).__name__}); what had ended is "
                    "kept: the same command goes on"
                ) from None
            if isinstance(outcome, str):
                raise UserError(outcome)
            yield at, outcome
    finally:
        if began:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("--cluster needs a package: pip install 'provenn[cluster]'") from None
    return ray


def _there(systems: Sequence[System], part: Sequence[Slice], catalogue: Catalogue) -> Rows | str:
    """A part on a machine of the cluster, which sees the files under the same names; words where it cannot."""
    try:
        return estimated(systems, part, catalogue)
    except UserError as error:
        return str(error)


def velocities_of(words: str) -> tuple[float, dict[str, float]]:
    """A velocity for all spectra, or zero and those of a table.

    >>> velocities_of("-12.5")
    (-12.5, {})
    """
    if is_number(words):
        return parse_number(words, "velocity"), {}
    return 0.0, read_velocities(Path(words))


def read_velocities(file: Path) -> dict[str, float]:
    """Velocities by spectrum, of a table with the columns `spectrum` and `velocity`, in km/s.

    Raises:
        UserError: other columns, or a velocity that is no number.
    """
    check_file(file)
    table = read_table(file)
    lacking = [name for name in ("spectrum", "velocity") if name not in table.columns]
    if lacking:
        raise UserError(f"{file} has the columns {', '.join(table.columns)}; expected spectrum and velocity")
    at = [list(table.columns).index(name) for name in ("spectrum", "velocity")]
    return {row[at[0]]: parse_number(row[at[1]], f"{file}, row {number}") for number, row in enumerate(table.rows, 2)}


def check_catalogue(output: Path, spectra: int) -> None:
    """Refuse a name that says no kind of table, or one that cannot hold so many rows, before any work is done.

    Raises:
        UserError: another ending, a package that is missing, or more rows than a sheet has.
    """
    ending = output_suffix(output, ".csv")
    if ending not in (*WRITTEN_FITS, *WRITES):
        kinds = ", ".join((*WRITES, *WRITTEN_FITS))
        raise UserError(f"a catalogue is written as {kinds}; got {output.name}")
    if ending in WRITTEN_FITS:
        astropy_fits()
    elif ending in ENGINES:
        check_engines(output)
    if ending == ".xlsx" and spectra > SHEET:
        raise UserError(f"a sheet holds {SHEET:,} rows, and {spectra:,} spectra were given: name a .csv or .parquet")


def write_catalogue(
    output: Path,
    columns: Sequence[str],
    units: Sequence[str],
    parts: Parts,
    size: Size,
) -> None:
    """A table by the ending of its name, a part at a time; as FITS with the unit of each column.

    Args:
        output: .csv, .tsv, .xlsx, .parquet or .fits. A workbook alone is held in memory as a whole.
        columns: the first is the spectrum's name.
        units: of the other columns, empty where there is none.
        parts: names of spectra, and their values.
        size: of all parts together.
    """
    ending = output_suffix(output, ".csv")
    if ending in WRITTEN_FITS:
        _write_fits(output, columns, units, parts, size)
    elif ending == ".parquet":
        _write_parquet(output, columns, parts)
    else:
        rows = ([name, *row] for names, values in parts for name, row in zip(names, values.tolist(), strict=True))
        write_table(output, columns, rows)


def _write_fits(
    output: Path,
    columns: Sequence[str],
    units: Sequence[str],
    parts: Parts,
    size: Size,
) -> None:
    fits = astropy_fits()
    made = [fits.Column(name=columns[0], format=f"{max(1, size.longest_name)}A")]
    made += [
        fits.Column(name=name, format="D", unit=unit or None) for name, unit in zip(columns[1:], units, strict=True)
    ]
    table = fits.BinTableHDU.from_columns(made, nrows=0)
    table.header["NAXIS2"] = size.spectra
    kinds = [("name", f"S{max(1, size.longest_name)}"), ("values", ">f8", (len(units),))]
    with atomic_write(output) as temporary:
        stream = fits.StreamingHDU(str(temporary), table.header)
        for names, values in parts:
            rows = np.zeros(len(names), kinds)
            rows["name"] = [name.encode("ascii", "replace") for name in names]  # FITS has no other letters
            rows["values"] = values
            stream.write(rows.view(np.uint8))
        stream.close()


def _write_parquet(output: Path, columns: Sequence[str], parts: Parts) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = [(columns[0], pyarrow.string()), *((name, pyarrow.float64()) for name in columns[1:])]
    with atomic_write(output) as temporary, parquet.ParquetWriter(temporary, pyarrow.schema(kinds)) as writer:
        for names, values in parts:
            letters = [name.encode("utf-8", "replace").decode() for name in names]  # a file's name may be no text
            writer.write_table(pyarrow.table([letters, *values.T], schema=writer.schema))


class Beside:
    """Bias and scatter of each label against another catalogue of the same spectra.

    Args:
        file: a table with the column `spectrum` and some of the labels, empty where not known.
        labels: that are estimated.

    Raises:
        UserError: no column of that name, or no label in common.
    """

    def __init__(self, file: Path, labels: Sequence[str]):
        check_file(file)
        table = read_table(file)
        columns = list(table.columns)
        if "spectrum" not in columns:
            raise UserError(f"{file} has the columns {', '.join(columns)}; expected spectrum, and labels")
        self.file = file
        self.shared = [(label, at, columns.index(label)) for at, label in enumerate(labels) if label in columns]
        if not self.shared:
            raise UserError(f"{file} has no label in common with what was estimated")
        self.theirs = {row[columns.index("spectrum")]: row for row in table.rows}
        self.off: list[list[float]] = [[] for _ in self.shared]
        self.common = 0

    def add(self, names: Sequence[str], means: np.ndarray) -> None:
        """Compare further spectra; `means` is (spectra, labels)."""
        for name, row in ((name, row) for name, row in zip(names, means, strict=True) if name in self.theirs):
            self.common += 1
            for (_, at, place), off in zip(self.shared, self.off, strict=True):
                if (cell := self.theirs[name][place]).strip():
                    off.append(float(row[at]) - parse_number(cell, f"{self.file}, {name}"))

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows.

        Raises:
            UserError: no spectrum in common.
        """
        if not self.common:
            raise UserError(f"{self.file} has no spectrum in common with what was estimated")
        pairs = zip(self.shared, map(np.array, self.off), strict=True)
        rows: list[list[Any]] = [
            [label, len(off), float(off.mean()), float(off.std())] for (label, *_), off in pairs if len(off)
        ]
        return ["label", "spectra", "bias", "scatter"], rows

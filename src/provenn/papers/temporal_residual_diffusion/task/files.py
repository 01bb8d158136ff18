"""Recordings of event cameras from and to files: text, ZIP, NumPy, HDF5."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.core.inputs import check_file, machine_memory
from provenn.papers.temporal_residual_diffusion.simulator import V2E, Events, Sensor

TEXT, ARRAYS, HDF5 = (".txt", ".csv"), (".npy", ".npz"), (".h5", ".hdf5")
ENDINGS = (*TEXT, ".zip", *ARRAYS, *HDF5)
EXTRA = "pip install 'provenn[events]'"
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
NAMES = {"t": ("t", "ts", "timestamp", "timestamps"), "x": ("x", "xs"), "y": ("y", "ys"), "p": ("p", "ps", "polarity")}
LARGEST = 16_384  # pixels a side


@dataclass(frozen=True)
class Reading:
    """How a recording is to be read where its file does not say, and how frames are sampled.

    Args:
        unit: of its times: s, ms, us or ns; "" for seconds where they are numbers with a point, else microseconds.
        size: columns and rows of the sensor; None for what the file says, else the largest coordinates.
        hot: a pixel that gives more than so many times the mean of the others is left out; 0 leaves all.
        sort: put events in order that are not.
        threshold: C of the camera that is simulated where a video is given.
        sensor: "ideal", or "v2e" for one with noise, mismatch, low-pass and refractory time.
        steps: of sampling; None for the model's own.
        seed: of the noise that sampling begins from.
    """

    unit: str = ""
    size: tuple[int, int] | None = None
    hot: float = 20.0
    sort: bool = False
    threshold: float = 0.2
    sensor: str = "ideal"
    steps: int | None = None
    seed: int = 0

    def camera(self) -> Sensor:
        """What is simulated."""
        return (V2E if self.sensor == "v2e" else Sensor())._replace(positive=self.threshold, negative=self.threshold)

    def idle(self, *, simulated: bool, sampled: bool) -> list[str]:
        """What was given and says nothing of events that are read, or that are simulated, or of no sampling."""
        unused = ("unit", "size", "hot", "sort") if simulated else ("threshold", "sensor")
        names = (*unused, *(() if sampled else ("steps", "seed")))
        plain = Reading()
        return [f"{name}=" for name in names if getattr(self, name) != getattr(plain, name)]


def reading_of(text: str | None) -> Reading:
    """How a user says it: "unit=us,size=346x260,hot=0,sort=yes".

    Raises:
        UserError: another name or value, in one line.

    >>> reading_of("unit=ms,size=346x260")
    Reading(unit='ms', size=(346, 260), hot=20.0, sort=False, threshold=0.2, sensor='ideal', steps=None, seed=0)
    """
    given: dict[str, Any] = {}
    for part in (text or "").replace(" ", "").split(","):
        name, _, value = part.partition("=")
        if not part:
            continue
        if name == "unit" and value in UNITS:
            given["unit"] = value
        elif name == "sort" and value in ("yes", "no"):
            given["sort"] = value == "yes"
        elif name == "sensor" and value in ("ideal", "v2e"):
            given["sensor"] = value
        elif name == "steps" and _whole(value) and 1 <= int(value) <= 1000:
            given["steps"] = int(value)
        elif name == "seed" and _whole(value) and int(value) < 2**31:
            given["seed"] = int(value)
        elif name == "threshold" and (_number(value) or 0) >= 0.01:
            given["threshold"] = float(value)
        elif name == "hot" and _number(value) is not None and float(value) >= 0:
            given["hot"] = float(value)
        elif name == "size" and all(_whole(side) and 1 <= int(side) <= LARGEST for side in value.split("x")):
            sides = [int(side) for side in value.split("x")]
            if len(sides) != 2:
                raise UserError(f"size is columns x rows, such as 346x260; got {value}")
            given["size"] = (sides[0], sides[1])
        else:
            raise UserError(
                "events are read by unit=s, ms, us or ns, size=346x260, hot=20 and sort=yes, and simulated by "
                f"threshold=0.2 (0.01 or more) and sensor=ideal or v2e, sampled by steps=5 and seed=0; got {part!r}"
            )
    return Reading(**given)


def _whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def read_events(file: Path, reading: Reading = Reading()) -> Events:  # frozen
    """The events of a recording.

    Text, also in a ZIP, has a line `t x y p` an event, with spaces or commas between, and may begin with a line
    `width height`. A NumPy array has (events, 4) in that order, or fields t, x, y and p, as have the arrays of an .npz
    and an HDF5 file, there also in a group `events`. Polarities are 1 and 0 or −1.

    Raises:
        UserError: no such file, or one that holds no events, in one line that says what was wrong.
    """
    check_file(file)
    ending = file.suffix.lower()
    size: tuple[int, int] | None = None
    try:
        if ending in TEXT:
            columns, size = _lines(file.read_bytes(), str(file))
        elif ending == ".zip":
            columns, size = _zipped(file)
        elif ending in ARRAYS:
            columns, size = _arrays(file)
        elif ending in HDF5:
            columns, size = _hdf5(file)
        else:
            raise UserError(f"{file} is no recording of events: expected {', '.join(ENDINGS)}")
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{file} is too large for the memory of this machine: divide it") from None
    # What HDF5 and ZIP raise of damaged, locked and oddly packed files.
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        why = str(error).partition("\n")[0] or "it is damaged"
        raise UserError(f"{file} cannot be read: {why}") from None
    return checked(columns, size, reading, str(file))


def checked(columns: Mapping[str, np.ndarray], size: tuple[int, int] | None, reading: Reading, source: str) -> Events:
    """Events of columns, with times in seconds and polarities of −1 and 1.

    Args:
        columns: t, x, y and p.
        size: columns and rows, where the file says them.
        reading: what the user says.
        source: for messages.

    Raises:
        UserError: no events, coordinates outside the sensor, times that are negative or go back, other polarities.
    """
    if any(columns[name].dtype.kind not in "iufb" or columns[name].ndim != 1 for name in "txyp"):
        raise UserError(f"{source}: t, x, y and p are columns of numbers")
    lengths = {len(columns[name]) for name in "txyp"}
    if len(lengths) > 1:
        raise UserError(f"{source}: t, x, y and p have different lengths: {', '.join(map(str, sorted(lengths)))}")
    if lengths == {0}:
        raise UserError(f"{source} holds no events")
    t = columns["t"]
    for name in "txyp":
        if columns[name].dtype.kind == "f" and not np.isfinite(columns[name]).all():
            raise UserError(f"{source}: {name} of event {int(np.argmin(np.isfinite(columns[name])))} is no number")
    unit = reading.unit or ("s" if t.dtype.kind == "f" and (t != np.floor(t)).any() else "us")
    if t.min() < 0:
        raise UserError(f"{source}: the time of event {int(np.argmin(t))} is negative, {t.min():g}")
    for name in "xy":
        column = columns[name]
        wrong = (column < 0) | (column >= 2**31) | (column != np.floor(column))
        if wrong.any():
            at = int(np.argmax(wrong))
            raise UserError(f"{source}: {name} of event {at} is {column[at]:g}; expected a whole number from 0")
    x, y = columns["x"].astype(np.int64), columns["y"].astype(np.int64)
    wide, high = reading.size or size or (int(x.max()) + 1, int(y.max()) + 1)
    if max(wide, high) > LARGEST or min(wide, high) < 1:
        raise UserError(f"{source}: a sensor of {wide}×{high}; expected 1 to {LARGEST} pixels a side")
    outside = (x >= wide) | (y >= high)
    if outside.any():
        at = int(np.argmax(outside))
        raise UserError(f"{source}: event {at} lies at x {x[at]}, y {y[at]}, outside a sensor of {wide}×{high}")
    p = columns["p"]
    if not set(np.unique(p).tolist()) <= {-1, 0, 1}:
        raise UserError(f"{source}: polarities are 1 and 0, or 1 and −1; got {np.unique(p)[:4].tolist()}")
    seconds = t.astype(np.float64) * UNITS[unit]
    late = np.flatnonzero(np.diff(seconds) < 0)
    order: Any = slice(None)
    if len(late):
        if not reading.sort:
            raise UserError(
                f"{source}: event {late[0] + 1} is earlier than the one before; --events sort=yes puts them in order"
            )
        order = np.argsort(seconds, kind="stable")
    if not reading.unit:
        progress.say(f"{source}: times are taken as {'seconds' if unit == 's' else 'microseconds'}; --events unit=ms")
    if reading.size is None and size is None:
        progress.say(f"{source} does not say how large the sensor is: {wide}×{high}, by the largest coordinates")
    return Events(
        x[order].astype(np.int32),
        y[order].astype(np.int32),
        seconds[order],
        np.where(p[order] > 0, 1, -1).astype(np.int8),
        (high, wide),
    )


def _lines(content: bytes, source: str) -> tuple[dict[str, np.ndarray], tuple[int, int] | None]:
    head, _, rest = content.partition(b"\n")
    words = head.replace(b",", b" ").split()
    size = None
    if len(words) == 2:
        try:
            size = int(words[0]), int(words[1])
        except ValueError:
            raise UserError(f"{source}: the first line of two words is width and height, got {head[:40]!r}") from None
    elif words and all(word.isalpha() for word in words):  # names of columns
        if [w.decode("latin-1").lower() for w in words] not in (["t", "x", "y", "p"],):
            raise UserError(f"{source}: columns are t, x, y and p, got {head[:60].decode('latin-1')}")
    else:
        rest = content
    if not rest.strip():
        return dict.fromkeys("txyp", np.zeros(0)), size
    try:
        table = np.loadtxt(io.BytesIO(rest.replace(b",", b" ")), dtype=np.float64, ndmin=2)
    except ValueError as error:
        raise UserError(f"{source}: a line is no event `t x y p`: {str(error).splitlines()[0]}") from None
    if table.shape[1] != 4:
        raise UserError(f"{source}: a line has {table.shape[1]} numbers; expected four: t x y p")
    return {name: table[:, i] for i, name in enumerate("txyp")}, size


def _zipped(file: Path) -> tuple[dict[str, np.ndarray], tuple[int, int] | None]:
    with zipfile.ZipFile(file) as packed:
        inside = [each for each in packed.infolist() if each.filename.lower().endswith(TEXT)]
        if len(inside) != 1:
            raise UserError(f"{file} holds {len(inside)} texts; expected one .txt with a line `t x y p` an event")
        if inside[0].file_size > machine_memory() // 4:
            raise UserError(f"{file}: {inside[0].filename} has {inside[0].file_size / 1e9:.0f} GB unpacked: divide it")
        return _lines(packed.read(inside[0]), f"{file}: {inside[0].filename}")


def _named(found: Mapping[str, Any], source: str) -> dict[str, np.ndarray]:
    columns = {}
    for name, names in NAMES.items():
        known = next((each for each in names if each in found), None)
        if known is None:
            raise UserError(f"{source} has no {name}: expected t, x, y and p, found {', '.join(found) or 'nothing'}")
        columns[name] = np.asarray(found[known][()] if hasattr(found[known], "shape") else found[known])
    return columns


def _arrays(file: Path) -> tuple[dict[str, np.ndarray], tuple[int, int] | None]:
    try:
        loaded = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{file} is no NumPy file that can be read: {error}") from None
    if isinstance(loaded, np.ndarray):
        if loaded.dtype.names:
            return _named({name: loaded[name] for name in loaded.dtype.names}, str(file)), None
        if loaded.ndim != 2 or loaded.shape[1] != 4:
            raise UserError(f"{file} holds an array of {loaded.shape}; expected (events, 4): t, x, y, p")
        return {name: loaded[:, i] for i, name in enumerate("txyp")}, None
    with loaded:
        return _named({name: loaded[name] for name in loaded.files}, str(file)), _size(loaded, str(file))


def _size(found: Any, source: str) -> tuple[int, int] | None:
    if "width" in found and "height" in found:
        return _integer(found["width"], "width", source), _integer(found["height"], "height", source)
    return None


def _integer(value: Any, name: str, source: str) -> int:
    """A whole number that a file holds beside its events."""
    number = np.asarray(value)
    if number.size != 1 or number.dtype.kind not in "iuf" or float(number.item()) != int(float(number.item())):
        raise UserError(f"{source}: {name} is one whole number, got {str(value)[:40]}")
    return int(number.item())


def _hdf5(file: Path) -> tuple[dict[str, np.ndarray], tuple[int, int] | None]:
    try:
        import h5py
    except ImportError:
        raise UserError(f"{file}: HDF5 needs h5py: {EXTRA}") from None
    with h5py.File(file, "r") as opened:
        group = opened["events"] if "events" in opened and isinstance(opened["events"], h5py.Group) else opened
        columns = _named({name: group[name] for name in group if isinstance(group[name], h5py.Dataset)}, str(file))
        if "t_offset" in opened:
            columns["t"] = columns["t"].astype(np.int64) + _integer(opened["t_offset"][()], "t_offset", str(file))
        size = None
        if "sensor_resolution" in opened.attrs:  # rows and columns
            sides = np.atleast_1d(opened.attrs["sensor_resolution"])
            if len(sides) < 2:
                raise UserError(f"{file}: sensor_resolution is rows and columns, got {sides.tolist()}")
            high, wide = (_integer(side, "sensor_resolution", str(file)) for side in sides[:2])
            size = wide, high
        else:
            size = _size(opened.attrs, str(file))
        return columns, size


def write_events(file: Path, events: Events) -> None:
    """A recording as `read_events` takes it, by the ending: .txt, .zip, .npy, .npz, .h5.

    Text and .npy have seconds; HDF5 and .npz microseconds, and the size of the sensor.

    Raises:
        UserError: another ending, or HDF5 without h5py.
    """
    ending = file.suffix.lower()
    columns = {"t": events.t, "x": events.x, "y": events.y, "p": events.p}
    whole = columns | {"t": np.rint(events.t * 1e6).astype(np.int64)}
    rows, wide = events.size
    if ending in (".txt", ".zip"):
        table = np.stack([events.t, events.x, events.y, events.p > 0], 1)
        style: dict[str, Any] = {"fmt": "%.9f %d %d %d", "header": f"{wide} {rows}", "comments": ""}
        with atomic_write(file) as place:
            if ending == ".txt":
                np.savetxt(place, table, **style)
            else:
                with (
                    zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as packed,
                    packed.open("events.txt", "w") as text,
                ):
                    np.savetxt(text, table, **style)
    elif ending in ARRAYS:
        with atomic_write(file) as place, place.open("wb") as handle:
            if ending == ".npy":
                np.save(handle, np.stack([events.t, events.x, events.y, events.p], 1).astype(np.float64))
            else:
                np.savez_compressed(handle, width=wide, height=rows, **whole)  # type: ignore[arg-type]  # arrays
    elif ending in HDF5:
        try:
            import h5py
        except ImportError:
            raise UserError(f"{file}: HDF5 needs h5py: {EXTRA}") from None
        # In memory first: on a full disk HDF5 ends the process, and leaves what it had written.
        content = io.BytesIO()
        with h5py.File(content, "w") as opened:
            opened.attrs["width"], opened.attrs["height"] = wide, rows
            for name, column in whole.items():
                opened.create_dataset(f"events/{name}", data=column, compression="gzip")
        with atomic_write(file) as place:
            place.write_bytes(content.getbuffer())
    else:
        raise UserError(f"events are written as .txt, .zip, .npy, .npz or .h5; got {file.name}")

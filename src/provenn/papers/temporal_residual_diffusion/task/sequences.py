"""The user's own videos and recordings as clips: events simulated of videos, or real ones beside frames (EVREAL)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import check_file
from provenn.data.images import SUFFIXES
from provenn.papers.temporal_residual_diffusion.simulator import Events, Sensor, Simulator
from provenn.papers.temporal_residual_diffusion.task.clips import Clip, gathered
from provenn.papers.temporal_residual_diffusion.task.files import Reading, checked
from provenn.papers.temporal_residual_diffusion.task.videos import MOVING, read_video
from provenn.papers.temporal_residual_diffusion.voxels import Grids

READS = "a folder with videos or folders of pictures, or with sequences of EVREAL (events_ts.npy, images.npy, …)"
# Seconds of the sequences of ECD and MVSEC that EVREAL compares, by the names of their folders there.
CUTS = {
    "boxes_6dof": (5.0, 20.0),
    "calibration": (5.0, 20.0),
    "dynamic_6dof": (5.0, 20.0),
    "office_zigzag": (5.0, 12.0),
    "poster_6dof": (5.0, 20.0),
    "shapes_6dof": (5.0, 20.0),
    "slider_depth": (1.0, 2.5),
    "indoor_flying1_data": (10.0, 70.0),
    "indoor_flying2_data": (10.0, 70.0),
    "indoor_flying3_data": (10.0, 70.0),
    "indoor_flying4_data": (10.0, 19.8),
    "outdoor_day1_data": (0.0, 60.0),
    "outdoor_day2_data": (100.0, 160.0),
}
PARTS = ("events_ts", "events_xy", "events_p", "images", "images_ts")


def sources_in(folder: Path) -> list[Path]:
    """The videos and sequences of a folder, by name.

    Raises:
        UserError: it is none, or has none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected {READS}")
    found = [
        each
        for each in sorted(folder.iterdir())
        if not each.name.startswith(".")
        and (each.suffix.lower() in (*MOVING, ".gif") if each.is_file() else is_sequence(each) or _has_pictures(each))
    ]
    if not found:
        raise UserError(f"{folder} holds no video; expected {READS}")
    return found


def is_sequence(folder: Path) -> bool:
    """Whether a folder is a sequence of EVREAL."""
    return (folder / "events_ts.npy").is_file()


def _has_pictures(folder: Path) -> bool:
    return any(file.suffix.lower() in SUFFIXES for file in folder.iterdir())


def clips_of(
    source: Path,
    windows: int,
    camera: Sensor,
    seed: int = 0,
    cut: bool = False,
    grids: Grids = Grids(),  # noqa: B008  # a tuple
) -> Iterator[Clip]:
    """The whole of a video or a sequence, in parts of so many windows; the last one may be shorter.

    Args:
        source: a video, a folder of pictures, or a sequence of EVREAL.
        windows: of a part.
        camera: what is simulated of a video.
        seed: of its noise.
        cut: take of a sequence of ECD or MVSEC what EVREAL takes.
        grids: how grids are made.

    Raises:
        UserError: it cannot be read.
    """
    pieces = _recorded(source, cut) if is_sequence(source) else simulated(source, camera, seed)
    frames: list[np.ndarray] = []
    times: list[float] = []
    parts: list[Events] = []
    for time, frame, events in pieces:
        if frames and events is not None:
            parts.append(events)
        frames.append(frame)
        times.append(time)
        if len(parts) == windows:
            yield gathered(np.stack(frames), parts, times, grids)
            frames, times, parts = [frame], [time], []
    if parts:
        yield gathered(np.stack(frames), parts, times, grids)


def simulated(source: Path, camera: Sensor, seed: int = 0) -> Iterator[tuple[float, np.ndarray, Events | None]]:
    """Of each frame of a video its time, itself, and the events since the last one; none before the first.

    Args:
        source: a video or a folder of pictures.
        camera: what is simulated.
        seed: of its noise.
    """
    simulator = None
    for time, frame in read_video(source):
        if simulator is None:
            simulator = Simulator(frame, time, camera, seed)
            yield time, frame, None
        else:
            yield time, frame, simulator.step(frame, time)


def _recorded(folder: Path, cut: bool) -> Iterator[tuple[float, np.ndarray, Events | None]]:
    loaded = {}
    for name in PARTS:
        check_file(folder / f"{name}.npy")
        try:
            loaded[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{folder / name}.npy is no NumPy file that can be read: {error}") from None
    images, stamps = loaded["images"], np.asarray(loaded["images_ts"], np.float64).ravel()
    if len(images) != len(stamps) or len(images) < 2 or images.ndim not in (3, 4):
        raise UserError(f"{folder}: {len(images)} images and {len(stamps)} times; expected as many, two or more")
    if not np.isfinite(stamps).all() or not (np.diff(stamps) > 0).all():
        raise UserError(f"{folder}: images_ts.npy has times that are no numbers, or not each later than the last")
    if images.dtype.kind not in "uf":
        raise UserError(f"{folder}: images.npy holds {images.dtype}; expected uint8, uint16, or numbers in 0…1")
    white = np.iinfo(images.dtype).max if images.dtype.kind == "u" else 1
    size = int(images.shape[2]), int(images.shape[1])
    if loaded["events_xy"].ndim != 2 or loaded["events_xy"].shape[1] != 2:
        raise UserError(f"{folder}: events_xy.npy has the shape {loaded['events_xy'].shape}; expected (events, 2)")
    columns = {
        "t": np.asarray(loaded["events_ts"], np.float64).ravel(),
        "x": np.asarray(loaded["events_xy"][:, 0]),
        "y": np.asarray(loaded["events_xy"][:, 1]),
        "p": np.asarray(loaded["events_p"]).ravel(),
    }
    events = checked(columns, size, Reading(unit="s", size=size), str(folder))
    if cut and folder.name not in CUTS:
        progress.say(f"{folder.name} has no cut among EVREAL's of ECD and MVSEC: it is taken whole")
    start, end = CUTS.get(folder.name, (0.0, np.inf)) if cut else (0.0, np.inf)
    before = None
    for number, time in enumerate(stamps - min(stamps[0], events.t[0])):
        if not start <= time <= end:
            continue
        image = np.asarray(images[number])
        grey = image.astype(np.float64) / white
        grey = grey.mean(-1) if grey.ndim == 3 else grey
        if not (grey.min() >= 0 and grey.max() <= 1):
            raise UserError(f"{folder}: image {number} has {grey.min():g} to {grey.max():g}; expected 0 to 1")
        now = float(stamps[number])
        yield now, grey, None if before is None else events.between(before, now)
        before = now

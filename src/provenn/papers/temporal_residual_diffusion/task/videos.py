"""Videos from and to files: through PyAV, as GIF, as a folder of pictures, as an array, as one strip."""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from provenn.core.errors import UserError
from provenn.core.files import atomic_write, work_folder
from provenn.core.inputs import check_file
from provenn.data.images import Picture, images_in, read_pixels, write_image
from provenn.data.tables import write_table

MOVING = (".mp4", ".avi", ".mkv", ".mov", ".webm")
EXTRA = "pip install 'provenn[events]'"
FPS = 30.0  # of a folder of pictures
STRIP = 8  # frames of a strip
LEAST = 16  # pixels a side of what is written as a video


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise UserError(f"videos need PyAV: {EXTRA}; a folder of pictures and .gif need nothing more") from None
    return av


def is_video(file: Path) -> bool:
    """Whether a path is a video, or a folder of pictures."""
    return file.is_dir() or file.suffix.lower() in (*MOVING, ".gif")


def read_video(file: Path) -> Iterator[tuple[float, np.ndarray]]:
    """Times in seconds and grey frames in 0…1, one after another.

    Args:
        file: a video, a GIF, or a folder of pictures of one size, in order of their names and 30 a second.

    Raises:
        UserError: it cannot be read, or its frames differ in size.
    """
    size = None
    for number, (time, frame) in enumerate(_frames(file)):
        if size is not None and frame.shape != size:
            raise UserError(
                f"{file}: frame {number} has {frame.shape[1]}×{frame.shape[0]} pixels, not {size[1]}×{size[0]}"
            )
        size = frame.shape
        yield time, frame
    if size is None:
        raise UserError(f"{file} holds no frame")


def _frames(file: Path) -> Iterator[tuple[float, np.ndarray]]:
    if file.is_dir():
        for number, picture in enumerate(images_in(file)):
            yield number / FPS, read_pixels(picture, 1)[0].numpy().astype(np.float64) / 255
        return
    check_file(file)
    av = _av()
    try:
        with av.open(str(file)) as opened:
            if not opened.streams.video:
                raise UserError(f"{file} has no video in it")
            before = -1.0
            for frame in opened.decode(opened.streams.video[0]):
                time = float(frame.time) if frame.time is not None else before + 1 / FPS
                time = time if time > before else before + 1e-3
                before = time
                yield time, frame.to_ndarray(format="gray").astype(np.float64) / 255
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a video: {error}") from None


def check_written(file: Path, size: tuple[int, int]) -> None:
    """Can a video of this size be written there?

    Raises:
        UserError: an ending that is none, or a library that is missing.
    """
    ending = file.suffix.lower()
    if ending in MOVING:
        _av()
        if min(size) < LEAST:
            raise UserError(f"a video of {size[1]}×{size[0]} pixels is too small for {ending}: write .gif or .npy")
    elif ending not in ("", ".gif", ".npy", ".png"):
        raise UserError(f"frames are written as {', '.join(MOVING)}, .gif, .npy, .png, or to a folder; got {file.name}")


def write_video(file: Path, frames: Iterable[np.ndarray], times: Sequence[float]) -> None:
    """Write frames by the ending: a video or a GIF that plays as fast as it was, .npy, a .png strip, or a folder.

    A folder has a picture a frame and `timestamps.csv`. Videos and folders take frames as they come.

    Args:
        file: where to.
        frames: (height, width) or (height, width, 3), 8 bits; at least one.
        times: of each, in seconds.

    Raises:
        UserError: it cannot be written.
    """
    ending = file.suffix.lower()
    span = times[-1] - times[0] if len(times) > 1 else 0.0
    rate = (len(times) - 1) / span if span > 0 else FPS
    if ending in MOVING:
        _write_moving(file, frames, min(max(rate, 1.0), 240.0))
    elif ending == ".gif":
        from PIL import Image

        pictures = [Image.fromarray(frame) for frame in frames]
        wait = max(20, round(1000 / rate))  # browsers take shorter ones for slow ones
        with atomic_write(file) as place:
            pictures[0].save(place, format="GIF", save_all=True, append_images=pictures[1:], duration=wait, loop=0)
    elif ending == ".npy":
        with atomic_write(file) as place, place.open("wb") as handle:
            np.save(handle, np.stack(list(frames)))
    elif ending == ".png":
        write_image(file, Picture(_coloured(strip(list(frames)))))
    else:
        with work_folder(file):
            rows = []
            for number, frame in enumerate(frames):
                rows.append((f"frame_{number:06d}.png", f"{times[number]:.6f}"))
                write_image(file / rows[-1][0], Picture(_coloured(frame)))
            write_table(file / "timestamps.csv", ["file", "seconds"], rows)


def _coloured(frame: np.ndarray) -> np.ndarray:
    return frame if frame.ndim == 3 else np.repeat(frame[..., None], 3, 2)


def strip(frames: Sequence[np.ndarray], most: int = STRIP) -> np.ndarray:
    """Some of the frames side by side, evenly spaced, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int))
    return np.concatenate([frames[i] for i in chosen], 1)


def _write_moving(file: Path, frames: Iterable[np.ndarray], rate: float) -> None:
    av = _av()
    container = {".mkv": "matroska"}.get(file.suffix.lower(), file.suffix.lower()[1:])
    codec = "libvpx-vp9" if container == "webm" else "libx264"
    with atomic_write(file) as place, av.open(str(place), "w", format=container) as opened:
        stream = opened.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for number, frame in enumerate(frames):
            if number == 0:
                high, wide = (side + side % 2 for side in frame.shape[:2])  # colours have half the size
                stream.width, stream.height = wide, high
            edge = (0, high - frame.shape[0]), (0, wide - frame.shape[1]), (0, 0)
            grown = np.ascontiguousarray(np.pad(_coloured(frame), edge, mode="edge"))
            for packet in stream.encode(av.VideoFrame.from_ndarray(grown, format="rgb24")):
                opened.mux(packet)
        for packet in stream.encode():
            opened.mux(packet)

"""What a camera saw over time: crops of persons frame by frame, in folders or as boxes in whole pictures."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from provenn.core.errors import UserError
from provenn.core.inputs import read_text
from provenn.data.images import SUFFIXES, images_in, read_pixels

PICTURES, DETECTIONS = "img1", Path("det") / "det.txt"  # of MOTChallenge
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Crop:
    """What a detector cut out of a frame.

    Args:
        file: a picture.
        box: left, top, width and height of a part of it, in pixels; None where the whole picture is the crop.
    """

    file: Path
    box: Box | None = None

    def pixels(self) -> UInt8[Tensor, "3 height width"]:
        """The crop, as far as it lies in the picture.

        Raises:
            UserError: the picture cannot be read, or the box lies beside it.
        """
        if self.box is None:
            return read_pixels(self.file)
        image = _picture(self.file)
        left, top, width, height = self.box
        across = max(0, round(left)), min(image.shape[2], round(left + width))
        down = max(0, round(top)), min(image.shape[1], round(top + height))
        if across[0] >= across[1] or down[0] >= down[1]:
            size = f"{image.shape[2]}×{image.shape[1]} pixels"
            raise UserError(f"{self.file}: the box {self.in_words()} lies beside the picture, which has {size}")
        return image[:, down[0] : down[1], across[0] : across[1]]

    def in_words(self) -> str:
        """As a table names it: the file, or the box."""
        return self.file.name if self.box is None else " ".join(f"{side:g}" for side in self.box)


@lru_cache(maxsize=2)  # boxes of one frame follow each other
def _picture(file: Path) -> UInt8[Tensor, "3 height width"]:
    return read_pixels(file)


@dataclass(frozen=True)
class Frame:
    """A moment of a sequence: its name, and what was cut out of it, which may be nothing."""

    name: str
    crops: tuple[Crop, ...]


def read_sequence(root: Path) -> list[Frame]:
    """The frames of a camera in their order.

    - `frame/crop.jpg`: a folder for each frame, in the order of their names, in which numbers count as numbers. An
      empty folder is a frame in which nobody was found.
    - MOTChallenge: `img1/000001.jpg` for each frame, and `det/det.txt` with lines of frame, identity, left, top, width
      and height, with commas between; what follows is left aside.

    Raises:
        UserError: it is neither, holds no crop, or a line of the boxes cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give the one with the frames of the sequence")
    frames = list(_boxes(root) if (root / PICTURES).is_dir() else _folders(root))
    if not any(frame.crops for frame in frames):
        raise UserError(f"{root} holds no crops; expected files ending in {', '.join(SUFFIXES)} in a folder a frame")
    return frames


def _folders(root: Path) -> Iterator[Frame]:
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    if loose := sorted(e for e in entries if e.is_file() and e.suffix.lower() in SUFFIXES):
        raise UserError(
            f"{loose[0]}: expected a folder for each frame with its crops, such as {root.name}/000001/0.jpg, or "
            f"{PICTURES} and {DETECTIONS} as MOTChallenge has them"
        )
    for folder in sorted((entry for entry in entries if entry.is_dir()), key=lambda entry: _in_order(entry.name)):
        some = any(file.suffix.lower() in SUFFIXES for file in folder.rglob("*"))
        yield Frame(folder.name, tuple(Crop(file) for file in images_in(folder)) if some else ())


def _boxes(root: Path) -> Iterator[Frame]:
    listing = root / DETECTIONS
    if not listing.is_file():
        raise UserError(f"{root} has a folder {PICTURES} but no {DETECTIONS}: give the boxes of a detector")
    files: dict[int, Path] = {}
    for file in images_in(root / PICTURES):
        if not file.stem.isdecimal():
            raise UserError(f"{file}: expected the number of the frame as its name, such as 000001.jpg")
        files[int(file.stem)] = file
    crops: dict[int, list[Crop]] = {number: [] for number in files}
    for number, line in enumerate(read_text(listing).splitlines(), 1):
        if not line.strip():
            continue
        frame, box = _parsed(listing, number, line)
        if frame not in files:
            raise UserError(f"{listing}:{number}: frame {frame} has no picture in {root / PICTURES}")
        crops[frame].append(Crop(files[frame], box))
    for frame in sorted(files):
        yield Frame(files[frame].stem, tuple(crops[frame]))


def _parsed(listing: Path, number: int, line: str) -> tuple[int, Box]:
    words = line.split(",")
    try:
        frame = int(words[0])
        left, top, width, height = (float(word) for word in words[2:6])
    except ValueError:
        frame, left, top, width, height = -1, 0.0, 0.0, 0.0, 0.0
    # No number compares as true with itself where it is none.
    finite = all(abs(side) < 1e6 for side in (left, top, width, height))
    if frame < 0 or not finite or width <= 0 or height <= 0:
        raise UserError(
            f"{listing}:{number}: expected frame, identity, left, top, width and height, such as "
            f"'1,-1,794.2,47.5,71.2,174.8', got {line[:80]!r}"
        )
    return frame, (left, top, width, height)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Of 2 and 10, 2 comes first.

    >>> sorted(["f10", "f2", "e3"], key=_in_order)
    ['e3', 'f2', 'f10']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]

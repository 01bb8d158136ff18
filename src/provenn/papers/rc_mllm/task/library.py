"""A library of named things: a crop of a picture is matched to a reference, and what is known of it becomes an entry.

The features are pixels: 16×16 grey values without their mean, compared by cosine. So a reference must show the thing as
it looks in the picture. Recognising real persons is no business of this: names of the bundled faces are invented.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

from provenn.core.box_text import Box, check_box
from provenn.core.errors import UserError
from provenn.core.inputs import parse_json, read_text
from provenn.papers.rc_mllm.protocol import RegionContext
from provenn.papers.rc_mllm.task.builder import PLACES, names_of

SIDE = 16
THRESHOLD = 0.8  # cosine from which a crop is of a thing


class Item(NamedTuple):
    """A thing of a library.

    Args:
        name: of the thing.
        category: what its entry says that it is.
        text: what is known of it.
        reference: a picture of it alone.
    """

    name: str
    category: str
    text: str
    reference: UInt8[np.ndarray, "height width 3"]


class Match(NamedTuple):
    """A thing, and how like it a crop is, from −1 to 1."""

    item: Item
    likeness: float


def features(picture: Shaped[np.ndarray, "height width 3"]) -> Float[np.ndarray, " numbers"]:
    """A picture as a vector of length 1; of one colour, zeros."""
    grey = Image.fromarray(np.ascontiguousarray(picture, np.uint8)).convert("L")
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64).ravel()
    small -= small.mean()
    length = np.linalg.norm(small)
    return small / length if length > 1e-6 else np.zeros_like(small)


class Library:
    """Named things with references.

    Args:
        items: at least one, each name once.
        threshold: a crop that is less like all of them is of none.

    Raises:
        UserError: no item, or a name twice.
    """

    def __init__(self, items: Sequence[Item], threshold: float | int = THRESHOLD):
        names = [item.name for item in items]
        if not items or len(set(names)) < len(names):
            twice = next((name for name in names if names.count(name) > 1), None)
            raise UserError(f"the library has {twice!r} twice: name each once" if twice else "the library has no item")
        self.items, self.threshold = list(items), threshold
        self._known = np.stack([features(item.reference) for item in items])

    def match(self, picture: UInt8[np.ndarray, "height width 3"]) -> Match | None:
        """The thing that a picture shows, or None."""
        likeness = self._known @ features(picture)
        best = int(likeness.argmax())
        return Match(self.items[best], float(likeness[best])) if likeness[best] >= self.threshold else None

    def context(
        self, picture: UInt8[np.ndarray, "height width 3"], boxes: Sequence[Box]
    ) -> tuple[RegionContext, list[Box]]:
        """Entries of the things in a picture, and the boxes that show none.

        Args:
            picture: of any size.
            boxes: where things are, in pixels.
        """
        size = picture.shape[1], picture.shape[0]
        found, left = RegionContext(size), []
        for box in boxes:
            left_edge, top, right, bottom = check_box(box, size)
            # Whole pixels, at least one of them, inside the picture.
            x, y = min(round(left_edge), size[0] - 1), min(round(top), size[1] - 1)
            match = self.match(picture[y : max(round(bottom), y + 1), x : max(round(right), x + 1)])
            if match is None:
                left.append(box)
            else:
                found.add(box, match.item.category, match.item.text, {"name": match.item.name})
        return found, left


def read_library(file: Path) -> Library:
    """A library from a .json: `[{"name": "…", "picture": "a.png", "text": "…", "category": "figurine"}, …]`.

    Raises:
        UserError: another form, or a picture that is not there.
    """
    entries = parse_json(read_text(file), str(file))
    if not isinstance(entries, list):
        raise UserError(f"{file}: expected a list of things with name, picture and text")
    items = []
    for number, entry in enumerate(entries, 1):
        where = f"{file}, thing {number}"
        wanted = ("name", "picture", "text")
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) and entry[key] for key in wanted):
            raise UserError(f"{where}: expected name, picture and text, all of them words")
        category = entry.get("category") or "object"
        if not isinstance(category, str):
            raise UserError(f"{where}: category must be words, got {str(category)[:60]!r}")
        picture = file.parent / entry["picture"]
        if not picture.is_file():
            raise UserError(f"{where}: no picture at {picture}")
        items.append(Item(entry["name"], category, entry["text"], read_pixels_rgb(picture)))
    return Library(items)


def read_pixels_rgb(file: Path) -> UInt8[np.ndarray, "height width 3"]:
    """A picture file, (height, width, 3)."""
    from provenn.data.images import read_pixels

    return read_pixels(file).permute(1, 2, 0).numpy()


@cache
def _faces() -> np.ndarray:
    grey = np.load(str(files("skimage.data") / "lfw_subset.npy"))[:100] * 255
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=3)


def bundled_faces(count: int = 12) -> Library:
    """Faces that scikit-image ships, with invented names and facts; 25×25 pixels each.

    Each is of another picture and nobody says which show one person. So only the same picture can be recognised.

    >>> len(bundled_faces(3).items)
    3
    """
    names = names_of("train")
    items = [
        Item(
            names[k], "face", f"it belongs to {names[k]} . it was found in the {PLACES[k % len(PLACES)]} .", _faces()[k]
        )
        for k in range(count)
    ]
    return Library(items)


def draw_faces(
    numbers: Sequence[int], seed: int = 0, *, side: int = 96, noise: float | int = 12.0
) -> tuple[UInt8[np.ndarray, "side side 3"], list[Box]]:
    """Bundled faces side by side on a plain ground, brighter or darker and with noise, and their boxes.

    Args:
        numbers: of the faces, from 0 to 99; up to three.
        seed: of light, noise and places.
        side: of the picture, in pixels.
        noise: its deviation, of 255.
    """
    rng = np.random.default_rng([seed, 25])
    canvas = np.full((side, side, 3), rng.uniform(60, 180))
    boxes = []
    for place, number in enumerate(numbers):
        left, top = 4 + place * 30, int(rng.integers(2, side - 28))
        light = rng.uniform(0.8, 1.1)
        canvas[top : top + 25, left : left + 25] = _faces()[number] * light
        boxes.append(Box(left, top, left + 25, top + 25))
    noisy = canvas + rng.normal(0, noise, canvas.shape[:2])[..., None]
    return noisy.round().clip(0, 255).astype(np.uint8), boxes

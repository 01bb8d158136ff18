"""Colour photographs: those that scikit-image and scikit-learn ship, and the user's own folder."""

from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from provenn.core.errors import UserError
from provenn.data.images import images_in, read_image, size_of

# Where each photograph lies inside the installed packages: nothing is downloaded.
_FILES = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "coffee": ("skimage.data", "coffee.png"),
    "rocket": ("skimage.data", "rocket.jpg"),
    "hubble": ("skimage.data", "hubble_deep_field.jpg"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "ihc": ("skimage.data", "ihc.png"),
    "china": ("sklearn.datasets.images", "china.jpg"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
}
NAMES = tuple(_FILES)
GREY = ("brick", "grass", "gravel", "page", "camera", "moon", "coins", "cell")


@cache
def photograph(name: str) -> np.ndarray:
    """An embedded photograph, (height, width, 3), uint8.

    >>> photograph("chelsea").shape
    (300, 451, 3)
    """
    if name not in _FILES:
        raise ValueError(f"no photograph is called {name!r}; there are: {', '.join(NAMES)}")
    package, file = _FILES[name]
    with (files(package) / file).open("rb") as handle, Image.open(handle) as image:
        pixels = np.array(image.convert("RGB"))
    pixels.flags.writeable = False
    return pixels


@cache
def grey_photograph(name: str) -> np.ndarray:
    """A grey picture that scikit-image ships, or the luma (BT.601) of a colour photograph, (height, width), uint8.

    >>> grey_photograph("brick").shape
    (512, 512)
    """
    if name in _FILES:
        pixels = np.rint(photograph(name) @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    elif name in GREY:
        with (files("skimage.data") / f"{name}.png").open("rb") as handle, Image.open(handle) as image:
            pixels = np.array(image.convert("L"))
    else:
        raise ValueError(f"no picture is called {name!r}; there are: {', '.join((*NAMES, *GREY))}")
    pixels.flags.writeable = False
    return pixels


class Photographs:
    """The photographs of a folder as 8-bit RGB, kept in memory where they fit there, else read when asked for.

    Args:
        paths: image files.
        smallest: side that each must have at least, in pixels.
        memory: bytes of pixels that are kept.
    """

    def __init__(self, paths: list[Path], *, smallest: int = 1, memory: int = 2**30):
        self.paths = paths
        sizes = [size_of(path) for path in paths]
        for path, (height, width) in zip(paths, sizes):
            if min(height, width) < smallest:
                raise UserError(f"{path} is {width}×{height} pixels; expected at least {smallest} on each side")
        self._kept: dict[int, np.ndarray] | None = {} if 3 * sum(h * w for h, w in sizes) <= memory else None

    @classmethod
    def of(cls, folder: Path, **options: int) -> "Photographs":
        """All images in a folder and its subfolders."""
        return cls(images_in(folder), **options)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        picture = read_image(self.paths[index])
        pixels = (picture.colour >> 8).astype(np.uint8) if picture.deep else picture.colour
        if self._kept is not None:
            self._kept[index] = pixels
        return pixels

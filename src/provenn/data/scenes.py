"""Scenes with exact boxes: cut-outs of embedded pictures, pasted on embedded photographs.

Coins from a museum's photograph (each cut out along its rim), handwritten digits in ink, and faces from Labeled Faces
in the Wild. Among them, to be left alone, ovals of what is no face and discs of brick, grass and gravel. The pictures
are scikit-image's and scikit-learn's. No coin, digit, face or distractor, and no background photograph, is in two
splits. Light, size, position and noise are drawn. Nothing casts a shadow, all is seen from the front, and little covers
another: real pixels, but no real scenes.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

from provenn.data.photographs import photograph

CLASSES = ("coin", "digit", "face")
SIZE = (96, 128)  # height and width of a scene, in pixels
COUNTS = {"train": 600, "val": 80, "test": 200}
BACKGROUNDS = {
    "train": ("china", "coffee", "chelsea", "ihc"),
    "val": ("motorcycle",),
    "test": ("flower", "rocket", "hubble"),
}
SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}  # of the cut-outs of every kind
SIDES = (16, 52)  # of an object's longer side, in pixels
MOST_OBJECTS, MOST_DISTRACTORS = 4, 2


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Args:
        pixels: (height, width, 3), uint8.
        boxes: (objects, 4) left, top, right, bottom in pixels.
        labels: (objects,) indices into `CLASSES`.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class CutOut:
    """Something to paste: colours (height, width, 3) in 0…255, and how much of each pixel it covers, in 0…1."""

    colour: np.ndarray
    cover: np.ndarray


@cache
def scenes(split: str, seed: int = 0, count: int | None = None) -> tuple[Scene, ...]:
    """The scenes of a split, the same for a seed.

    >>> first = scenes("val")[0]
    >>> first.pixels.shape, len(first.boxes) == len(first.labels)
    ((96, 128, 3), True)
    """
    rng = np.random.default_rng([seed, list(COUNTS).index(split)])
    return tuple(_scene(split, rng) for _ in range(COUNTS[split] if count is None else count))


def _scene(split: str, rng: np.random.Generator) -> Scene:
    height, width = SIZE
    canvas = _background(split, rng)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    taken: list[tuple[int, int, int, int]] = []
    objects, distractors = int(rng.integers(MOST_OBJECTS + 1)), int(rng.integers(MOST_DISTRACTORS + 1))
    for number in range(objects + distractors):
        label = int(rng.integers(len(CLASSES))) if number < objects else None
        cut = _resized(_draw(split, label, rng), int(rng.integers(*SIDES)))
        tall, wide = cut.cover.shape
        for _ in range(20):
            top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
            box = (left, top, left + wide, top + tall)
            if all(_share(box, other) < 0.1 for other in taken):
                break
        else:
            continue
        cover = cut.cover[..., None]
        region = canvas[top : top + tall, left : left + wide]
        region[:] = region * (1 - cover) + cut.colour * cover
        taken.append(box)
        if label is not None:
            boxes.append(box)
            labels.append(label)
    noisy = canvas * rng.uniform(0.8, 1.1) + rng.normal(0, rng.uniform(0, 8), canvas.shape)
    pixels = noisy.round().clip(0, 255).astype(np.uint8)
    return Scene(pixels, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64))


def _share(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """How much of the smaller of two boxes the other covers."""
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return overlap / min((q[2] - q[0]) * (q[3] - q[1]) for q in (a, b))


def _background(split: str, rng: np.random.Generator) -> np.ndarray:
    """A piece of a photograph, at a scale of its own, as floats."""
    picture = _image(str(rng.choice(BACKGROUNDS[split])))
    height, width = SIZE
    scale = rng.uniform(1.0, min(picture.height / height, picture.width / width))
    tall, wide = int(height * scale), int(width * scale)
    top, left = (int(rng.integers(0, room + 1)) for room in (picture.height - tall, picture.width - wide))
    piece = picture.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + wide, top + tall))
    pixels = np.asarray(piece, np.float64)
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels.copy()


@cache
def _image(name: str) -> Image.Image:
    return Image.fromarray(photograph(name))


def _draw(split: str, label: int | None, rng: np.random.Generator) -> CutOut:
    """One of a class, or a distractor, in a light of its own."""
    kind = (*CLASSES, "oval", "disc")[label if label is not None else int(rng.integers(3, 5))]
    stock = _stock()[kind]
    low, high = (round(share * len(stock)) for share in SHARES[split])
    cut = stock[int(rng.integers(low, high))]
    tint = rng.uniform(0.75, 1.15, 3) if kind != "digit" else rng.uniform(0, 255, 3) / 255
    return CutOut((cut.colour * tint).clip(0, 255), cut.cover)


def _resized(cut: CutOut, side: int) -> CutOut:
    """With a longer side of so many pixels, and nothing around that covers less than half a pixel."""
    scale = side / max(cut.cover.shape)
    size = (max(4, round(cut.cover.shape[1] * scale)), max(4, round(cut.cover.shape[0] * scale)))
    cover = np.asarray(Image.fromarray(cut.cover.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    colour = np.asarray(
        Image.fromarray(cut.colour.round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC), np.float64
    )
    rows, columns = (np.flatnonzero((cover > 0.5).any(axis=axis)) for axis in (1, 0))
    inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return CutOut(colour[inside], cover[inside])


@cache
def _stock() -> dict[str, list[CutOut]]:
    from sklearn.datasets import load_digits

    grid = np.linspace(-1, 1, 25)
    oval = ((grid[:, None] ** 2 + (grid[None] / 0.8) ** 2) < 1).astype(float)
    patches = (
        np.load(str(files("skimage.data") / "lfw_subset.npy")) * 255
    )  # a hundred faces, then as many that are none
    ovals = [CutOut(np.repeat(patch[..., None], 3, axis=2), oval) for patch in patches]
    digits = [
        CutOut(np.full((8, 8, 3), 255.0), (image / 16).clip(0, 1)) for image in load_digits().images if image.max() > 0
    ]
    return {"coin": _coins(), "digit": digits, "face": ovals[:100], "oval": ovals[100:], "disc": _discs()}


def _coins() -> list[CutOut]:
    """The coins of scikit-image's photograph, each along its rim."""
    from scipy import ndimage

    picture = _grey("coins")
    # Coins are brighter than the cloth near them, which darkens from left to right: against a wide mean they stand out.
    inside = ndimage.binary_fill_holes(ndimage.binary_closing(picture > ndimage.gaussian_filter(picture, 40) + 4))
    regions, _ = ndimage.label(ndimage.binary_opening(inside, iterations=4))
    coins = []
    for rows, columns in ndimage.find_objects(regions):
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        if min(tall, wide) < 25 or max(tall, wide) > 1.3 * min(tall, wide):
            continue  # cloth, or two coins that touch
        y, x = np.meshgrid(np.linspace(-1, 1, tall), np.linspace(-1, 1, wide), indexing="ij")
        colour = np.repeat(picture[rows, columns][..., None], 3, axis=2)
        coins.append(CutOut(colour * (1.0, 0.85, 0.6), (x**2 + y**2 < 1).astype(float)))
    return coins


def _discs() -> list[CutOut]:
    grid = np.linspace(-1, 1, 48)
    disc = (grid[:, None] ** 2 + grid[None] ** 2 < 1).astype(float)
    discs = []
    for name in ("brick", "grass", "gravel"):
        picture = _grey(name)
        for top in range(0, 480, 80):
            for left in range(0, 480, 80):
                discs.append(CutOut(np.repeat(picture[top : top + 48, left : left + 48, None], 3, axis=2), disc))
    return discs


def _grey(name: str) -> np.ndarray:
    with (files("skimage.data") / f"{name}.png").open("rb") as handle, Image.open(handle) as image:
        return np.asarray(image.convert("L"), np.float64)

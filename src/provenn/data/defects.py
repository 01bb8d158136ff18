"""Images of good and defective things with masks: MVTec-AD, VisA, BTAD, plain folders, and textures that are composed.

- mvtec: `bottle/train/good/`, `bottle/test/good/`, `bottle/test/broken/`, `bottle/ground_truth/broken/*_mask.png`
- visa: `candle/Data/Images/Normal/`, `Anomaly/` beside it, `candle/Data/Masks/Anomaly/`; `split_csv/1cls.csv`
- btad: `01/train/ok/`, `01/test/ok/`, `01/test/ko/`, `01/ground_truth/ko/`
- plain: `good/`, `bad/` and `masks/` with files of the same names, or folders of such
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFilter

from provenn.core.errors import UserError
from provenn.core.inputs import read_text
from provenn.data.images import SUFFIXES, read_image, size_of
from provenn.data.photographs import GREY, grey_photograph, photograph

LAYOUTS = ("mvtec", "visa", "btad", "plain")
EXPECTED = {
    "mvtec": "CATEGORY/train/good/ and CATEGORY/test/good/",
    "visa": "CATEGORY/Data/Images/Normal/",
    "btad": "CATEGORY/train/ok/ and CATEGORY/test/ok/",
    "plain": "good/, bad/ and masks/, or CATEGORY/good/ and so on",
}
SIDE = 64  # of a composed image, in pixels
# A category is a texture: those of the test are seen nowhere else.
CATEGORIES = {
    "train": ("brick", "gravel", "page", "camera", "cell", "chelsea", "coffee", "ihc", "motorcycle", "china"),
    "val": ("moon", "rocket"),
    "test": ("grass", "coins", "hubble", "astronaut", "flower"),
}
KINDS = ("scratch", "blend", "stain")
COUNTS = {"train": 40, "val": 20, "test": 40}  # images of each category, of which half are good
Split = Literal["train", "val", "test"]


class Part(NamedTuple):
    """An image of a category.

    Args:
        image: the file.
        category: what it shows.
        mask: of its defect; None of a good one.
    """

    image: Path
    category: str
    mask: Path | None


@dataclass(frozen=True)
class Inspected:
    """What a folder holds, by the splits of the field.

    Args:
        train: good images, that detectors of one class are trained on.
        test: good and defective ones.
    """

    train: list[Part]
    test: list[Part]

    @property
    def categories(self) -> list[str]:
        return sorted({part.category for part in (*self.train, *self.test)})


class Drawn(NamedTuple):
    """Composed images of a split.

    Args:
        images: of 8 bits.
        masks: of the defects.
        categories: the name of each image's texture.
        kinds: of each image's defect; "" of a good one.
    """

    images: UInt8[np.ndarray, "images height width 3"]
    masks: Bool[np.ndarray, "images height width"]
    categories: tuple[str, ...]
    kinds: tuple[str, ...]


@cache
def composed_defects(
    split: Split, seed: int = 0, count: int | None = None, categories: tuple[str, ...] | None = None
) -> Drawn:
    """Textures with scratches, blends of another texture, and stains, with exact masks; the same for a seed.

    Args:
        split: whose textures they have.
        seed: of the drawing.
        count: images of each texture, of which every second has a defect. Default: `COUNTS`.
        categories: the textures, two at least. Default: those of the split in `CATEGORIES`.

    >>> drawn = composed_defects("val", count=2)
    >>> drawn.images.shape, drawn.masks.any((1, 2)).tolist()
    ((4, 64, 64, 3), [False, True, False, True])
    """
    rng = np.random.default_rng([seed, list(CATEGORIES).index(split), 26])
    textures = CATEGORIES[split] if categories is None else categories
    images, masks, names, kinds = [], [], [], []
    for name in textures:
        for number in range(COUNTS[split] if count is None else count):
            canvas = _piece(name, rng)
            mask = np.zeros((SIDE, SIDE), bool)
            kind = KINDS[int(rng.integers(len(KINDS)))] if number % 2 else ""
            if kind:
                others = [other for other in textures if other != name]
                mask = _spoil(canvas, kind, _piece(others[int(rng.integers(len(others)))], rng), rng)
            noisy = canvas + rng.normal(0, 3, canvas.shape[:2])[..., None]
            images.append(noisy.round().clip(0, 255).astype(np.uint8))
            masks.append(mask)
            names.append(name)
            kinds.append(kind)
    return Drawn(np.stack(images), np.stack(masks), tuple(names), tuple(kinds))


@cache
def _pixels(name: str) -> np.ndarray:
    return np.repeat(grey_photograph(name)[..., None], 3, 2) if name in GREY else photograph(name)


def _piece(name: str, rng: np.random.Generator) -> np.ndarray:
    pixels = _pixels(name)
    step = 2 if min(pixels.shape[:2]) >= 2 * SIDE and rng.random() < 0.5 else 1
    top, left = (int(rng.integers(0, length - SIDE * step + 1)) for length in pixels.shape[:2])
    return pixels[top : top + SIDE * step : step, left : left + SIDE * step : step].astype(np.float64)


def _spoil(canvas: np.ndarray, kind: str, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a defect into an image; returns exactly the pixels that it changed by a visible amount."""
    shape = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(shape)
    if kind == "scratch":
        start, turn = rng.uniform(8, SIDE - 8, 2), rng.uniform(0, 2 * np.pi)
        bend = start + rng.uniform(8, 14) * np.array([np.cos(turn), np.sin(turn)])
        end = bend + rng.uniform(8, 14) * np.array([np.cos(turn + rng.normal(0, 0.5)), np.sin(turn)])
        draw.line([tuple(start), tuple(bend), tuple(end)], fill=255, width=int(rng.integers(1, 3)))
    else:
        wide, tall = rng.uniform(5, 12, 2)
        x, y = rng.uniform(12, SIDE - 12, 2)
        draw.ellipse((x - wide, y - tall, x + wide, y + tall), fill=255)
    if kind == "stain":
        shape = shape.filter(ImageFilter.GaussianBlur(1.5))
    cover = np.asarray(shape, np.float64)[..., None] / 255
    if kind == "scratch":
        paint = np.full(3, 245.0 if canvas.mean() < 128 else 20.0)
    elif kind == "blend":
        paint = 0.85 * other + 0.15 * canvas
    else:
        paint = canvas * rng.uniform(0.3, 0.5)
    canvas[:] = canvas * (1 - cover) + paint * cover
    return cover[..., 0] > 0.5


def layout_of(root: Path) -> str:
    """The layout that a folder has.

    Raises:
        UserError: none of them.
    """
    found = next((name for name in LAYOUTS if _categories(root, name)), None)
    if found is None:
        raise UserError(f"{root} holds no images to inspect: expected {'; '.join(EXPECTED.values())}")
    return found


def _categories(root: Path, layout: str) -> list[Path]:
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir()] if root.is_dir() else []
    if layout == "plain" and (root / "good").is_dir():
        return [root]
    inside = {
        "mvtec": ("train/good", "test"),
        "visa": ("Data/Images",),
        "btad": ("train/ok", "test"),
        "plain": ("good",),
    }
    either = {"mvtec": ("ground_truth",), "visa": ("Data/Masks",), "btad": ("ground_truth",), "plain": ("bad", "masks")}
    names = inside[layout]
    found = [folder for folder in folders if all((folder / name).is_dir() for name in names)]
    if layout == "plain" or not found:
        return found
    # One category without good images is named later, where others have the layout.
    also = [f for f in folders if f not in found and any((f / name).is_dir() for name in either[layout])]
    return sorted([*found, *also])


def read_defects(root: Path, layout: str | None = None) -> Inspected:
    """The images of a folder, good and defective, with masks.

    Args:
        root: the folder.
        layout: one of `LAYOUTS`. Default: the one that it has.

    Raises:
        UserError: another layout than the one that is given; a category without a good image; a defect without a mask;
            a mask of another size than its image.
    """
    if not root.is_dir():
        raise UserError(f"{root} is a file: give the folder that holds images and masks")
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    chosen = layout or layout_of(root)
    folders = _categories(root, chosen)
    if not folders:
        there = next((name for name in LAYOUTS if _categories(root, name)), None)
        hint = f"; it looks like layout={there}" if there else ""
        raise UserError(f"{root} has not the layout {chosen}: expected {EXPECTED[chosen]}{hint}")
    split = _visa_split(root) if chosen == "visa" else None
    train, test = [], []
    for folder in folders:
        name = folder.name if folder != root else root.resolve().name
        good, tested, bad = _parts(folder, name, chosen)
        if split is not None:
            of_test = {image for image, where in split.items() if where == "test"}
            tested = [part for part in good if part.image.relative_to(root).as_posix() in of_test]
            good = [part for part in good if part not in tested]
        if not good and not tested:
            raise UserError(f"{folder}: the category {name!r} has no normal image: expected {EXPECTED[chosen]}")
        if not tested and chosen in ("visa", "plain"):  # without a split: every fifth good image is for the test
            tested, good = good[::5], [part for k, part in enumerate(good) if k % 5]
        if not good:
            raise UserError(f"{folder}: the category {name!r} has no normal image to train on: add some")
        train += good
        test += [*tested, *bad]
    for part in test:
        if part.mask is not None and size_of(part.mask) != size_of(part.image):
            sizes = ["×".join(map(str, reversed(size_of(file)))) for file in (part.mask, part.image)]
            raise UserError(
                f"{part.mask} has {sizes[0]} pixels and its image {part.image.name} {sizes[1]}: make them equal"
            )
    return Inspected(train, test)


def _parts(folder: Path, name: str, layout: str) -> tuple[list[Part], list[Part], list[Part]]:
    """Good images to train on, good ones of the test, and defective ones with masks."""
    if layout == "visa":
        good, kinds, masks = folder / "Data/Images/Normal", [folder / "Data/Images/Anomaly"], folder / "Data/Masks"
        tested: list[Path] = []
    elif layout == "plain":
        good, kinds, masks, tested = folder / "good", [folder / "bad"], folder / "masks", []
    else:
        word = "good" if layout == "mvtec" else "ok"
        good, masks = folder / "train" / word, folder / "ground_truth"
        tested = _images(folder / "test" / word)
        there = sorted((folder / "test").iterdir()) if (folder / "test").is_dir() else []
        kinds = [kind for kind in there if kind.is_dir() and kind.name != word]
    bad = []
    for kind in kinds:
        where = masks if layout == "plain" else masks / kind.name
        known = {file.stem.removesuffix("_mask"): file for file in _images(where)}
        for image in _images(kind):
            mask = known.get(image.stem)
            if mask is None:
                raise UserError(
                    f"{image} has no mask: expected {where / image.stem}.png or {image.stem}_mask.png there"
                )
            bad.append(Part(image, name, mask))
    return [Part(f, name, None) for f in _images(good)], [Part(f, name, None) for f in tested], bad


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


def _visa_split(root: Path) -> dict[str, str] | None:
    """Of VisA's `split_csv/1cls.csv` which split an image is of."""
    file = root / "split_csv" / "1cls.csv"
    if not file.is_file():
        return None
    split = {}
    for number, row in enumerate(csv.reader(read_text(file).splitlines()), 1):
        if number == 1 and row[:2] == ["object", "split"]:
            continue
        if len(row) < 4 or row[1] not in ("train", "test"):
            raise UserError(
                f"{file}, line {number}: expected object, split, label, image and mask, got {','.join(row)[:60]!r}"
            )
        if not (root / row[3]).is_file():
            raise UserError(f"{file}, line {number}: no image at {root / row[3]}")
        split[row[3]] = row[1]
    return split


def read_defect_mask(file: Path) -> Bool[np.ndarray, "height width"]:
    """Where a mask is not black."""
    picture = read_image(file)
    return picture.colour.max(2) > 0

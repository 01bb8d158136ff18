"""Images with masks: a class number for each pixel, in the layouts that people keep them in."""

import math
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write, output_suffix
from provenn.core.inputs import check_file, read_text
from provenn.data.images import SUFFIXES, images_in

IGNORED = 255  # of a mask: not trained on and not judged
MOST_UNKNOWN = 0.01  # of all pixels, that may be in no class without a word from the user
MASKS = (".png", ".tif", ".tiff", ".bmp")  # that lose nothing

# Folders of images and of masks, as they are called.
IMAGE_FOLDERS = ("images", "image", "imgs", "JPEGImages", "leftImg8bit")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "SegmentationClass", "gtFine", "stuffthingmaps")
SPLITS = {
    "train": ("train", "training", "train2017"),
    "val": ("val", "valid", "validation", "val2017"),
    "test": ("test", "testing", "test2017"),
}

# Cityscapes numbers 34 labels, of which these are judged, in this order (cityscapesscripts, `labels.py`).
CITYSCAPES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}

# CamVid's masks are coloured; of its 32 classes these are judged, in this order (the lists of XuJiacong/PIDNet).
CAMVID = {
    "bicyclist": (0, 128, 192),
    "building": (128, 0, 0),
    "car": (64, 0, 128),
    "pole": (192, 192, 128),
    "fence": (64, 64, 128),
    "pedestrian": (64, 64, 0),
    "road": (128, 64, 128),
    "sidewalk": (0, 0, 192),
    "sign": (192, 128, 128),
    "sky": (128, 128, 128),
    "tree": (128, 128, 0),
}

# The other colours of CamVid's list, which are not judged.
CAMVID_VOID = frozenset(
    [
        (64, 128, 64), (192, 0, 128), (0, 128, 64), (64, 0, 192), (192, 128, 64), (128, 0, 192), (192, 0, 64),
        (128, 128, 64), (192, 0, 192), (128, 64, 64), (64, 192, 128), (128, 128, 192), (64, 128, 192), (0, 0, 64),
        (0, 64, 64), (192, 64, 128), (192, 128, 192), (64, 0, 64), (192, 192, 0), (0, 0, 0), (64, 192, 0),
    ]
)  # fmt: skip

Colour = tuple[int, int, int]
Unknown = Literal["refuse", "ignore"]
Values = Counter[tuple[int, ...]]  # pixels of each colour, or of each number (in a tuple of one)


GREYS: tuple[Colour, ...] = tuple((value, value, value) for value in range(256))


@dataclass(frozen=True)
class MaskFolder:
    """Images and masks of a folder.

    Args:
        splits: of train, val and test what there is: each image with its mask.
        classes: names, by number; empty where the folder does not say.
        colours: of each class, where masks are coloured.
        numbers: what a number in a file means, where it is another: Cityscapes' labels.
        subtract: 1 where class 0 in the files means "no class", as ADE20K has it.
        order: the number that a model has for each of these classes, where it counts them otherwise.
        void: colours of no class that are not judged.
        count: how many classes a model knows, where the folder names none.
    """

    splits: dict[str, list[tuple[Path, Path]]]
    classes: list[str]
    colours: list[Colour]
    numbers: dict[int, int] | None = None
    subtract: int = 0
    order: tuple[int, ...] | None = None
    void: frozenset[Colour] = frozenset()
    count: int | None = None

    @property
    def labels(self) -> dict[int, int] | None:
        """The class of each number in a file; None where every number is a class."""
        count = len(self.classes) or self.count
        if self.numbers is not None or (count is None and not self.subtract):
            return self.numbers
        return {number + self.subtract: number for number in range(count or IGNORED - self.subtract)}

    def read(self, mask: Path) -> UInt8[np.ndarray, "height width"]:
        """A mask as class numbers, 255 for what is not judged or in no class.

        Raises:
            UserError: as `read_mask`.
        """
        return self.read_values(mask)[0]

    def read_values(self, mask: Path) -> tuple[UInt8[np.ndarray, "height width"], Values]:
        """A mask as `read` gives it, and the pixels of each colour or number in it that is in no class.

        Raises:
            UserError: as `read_mask`.
        """
        labels = self.labels or {}
        # Cityscapes' other labels, and the 0 of ADE20K, are declared to be nothing that is judged.
        declared = {**dict.fromkeys(range(max(labels, default=-1)), IGNORED), **labels}
        numbers, unknown = _read(mask, self.colours, declared)
        if self.order is not None:
            table = np.full(256, IGNORED, np.uint8)
            table[: len(self.order)] = self.order
            numbers = table[numbers]
        return numbers, Counter({value: pixels for value, pixels in unknown.items() if value not in self.void})

    def nearest(self, value: tuple[int, ...]) -> str:
        """The class that is nearest to a colour, or to a number, in words."""
        if len(value) == 3:
            index = min(range(len(self.colours)), key=lambda k: math.dist(value, self.colours[k]))
            written = " ".join(map(str, self.colours[index]))
        else:
            labels = self.labels or {}
            number = min(labels, key=lambda k: abs(value[0] - k))
            index, written = labels[number], str(number)
        return f"{self.classes[index] if self.classes else f'class {index}'!r} ({written})"


@dataclass
class UnknownPixels:
    """Pixels of masks that are in no class, counted over the files of a folder.

    Args:
        folder: which says what is a class.
        values: pixels of each colour or number, of the commonest in each file.
        unknown, files: such pixels, and the files that hold them, of which `first` is one.
        pixels: all there are.
    """

    folder: MaskFolder
    values: Values = field(default_factory=Counter)
    unknown: int = 0
    files: int = 0
    first: Path | None = None
    pixels: int = 0

    def read(self, mask: Path) -> UInt8[np.ndarray, "height width"]:
        """A mask as the folder reads it."""
        numbers, unknown = self.folder.read_values(mask)
        self.values.update(dict(unknown.most_common(100)))
        self.unknown += unknown.total()
        self.files += bool(unknown)
        self.first = self.first or (mask if unknown else None)
        self.pixels += numbers.size
        return numbers

    def check(self, root: Path, unknown: Unknown) -> None:
        """Say in one line which values are in no class.

        Raises:
            UserError: they are more than 1 % of all pixels, and `unknown` is not "ignore".
        """
        if self.first is None:
            return
        share, value = self.unknown / self.pixels, self.values.most_common(1)[0][0]
        where = f"{self.files} file{'s' * (self.files > 1)} such as {self.first.name}"
        message = (
            f"{root}: {100 * share:.2g} % of the masks' pixels, in {where}, "
            f"are in no class: most often {' '.join(map(str, value))}, nearest to {self.folder.nearest(value)}"
        )
        if share > MOST_UNKNOWN and unknown != "ignore":
            raise UserError(
                f"{message}; correct classes.txt or the masks, or add --set unknown=ignore to leave them out"
            )
        progress.say(f"{message}; they are not judged")


def read_mask(file: Path, colours: Sequence[Colour] = ()) -> UInt8[np.ndarray, "height width"]:
    """The class number of each pixel: an index into a palette, a grey value, or the class of a colour.

    Args:
        file: PNG, TIFF or BMP: of 8 or 16 bits, with a palette, of 1 bit, or coloured.
        colours: of each class; what has none of them is not judged. A grey mask, or one with a palette, is read by
            them where they explain all of its values, and else holds numbers.

    Raises:
        UserError: no image, a damaged one, one with loss, numbers over 255, or colours that nobody explained.
    """
    return _read(file, colours, {})[0]


def _read(
    file: Path, colours: Sequence[Colour], labels: Mapping[int, int]
) -> tuple[UInt8[np.ndarray, "height width"], Values]:
    """Class numbers of a mask, and the pixels of each colour or number that is in no class.

    Args:
        file, colours: as in `read_mask`.
        labels: what each number in a file means; without any, every number is a class.
    """
    if file.suffix.lower() not in MASKS:
        raise UserError(f"{file}: a mask is kept without loss, as {', '.join(MASKS)}")
    check_file(file)
    try:
        with Image.open(file) as image:
            palette = None
            if image.mode == "P":
                entries = (image.getpalette("RGB") or []) + [0] * 768
                palette = [(r, g, b) for r, g, b in zip(entries[0:768:3], entries[1:768:3], entries[2:768:3])]
            elif image.mode == "1":
                palette = [(0, 0, 0), (255, 255, 255)]
            if image.mode in ("P", "L", "1"):
                return _of_numbers(np.asarray(image).astype(np.uint8), palette or GREYS, colours, labels)
            values = np.asarray(image) if image.mode.startswith(("I", "F")) else np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, zlib.error, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is no mask that can be read: {error}") from None
    if values.ndim == 2:
        if values.min() < 0 or values.max() > IGNORED or (values % 1).any():
            raise UserError(
                f"{file}: a mask holds class numbers from 0 to {IGNORED}, got {values.min()} to {values.max()}"
            )
        return _of_numbers(values.astype(np.uint8), GREYS, (), labels)
    if (values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all():
        return _of_numbers(values[..., 0].copy(), GREYS, colours, labels)
    if not colours:
        raise UserError(
            f"{file} is coloured: say what its colours mean in a file classes.txt beside the folders, a line a class, "
            "such as 'road 128 64 128'"
        )
    key = np.array([1 << 16, 1 << 8, 1])
    codes, known = values.astype(np.int64) @ key, np.array(colours, np.int64) @ key
    order = known.argsort()
    index = np.minimum(np.searchsorted(known[order], codes), len(known) - 1)
    is_known = known[order][index] == codes
    strange, pixels = np.unique(codes[~is_known], return_counts=True)
    unknown = {(code >> 16, code >> 8 & 255, code & 255): n for code, n in zip(strange.tolist(), pixels.tolist())}
    return np.where(is_known, order[index], IGNORED).astype(np.uint8), Counter(unknown)


def _of_numbers(
    values: UInt8[np.ndarray, "height width"],
    palette: Sequence[Colour],
    colours: Sequence[Colour],
    labels: Mapping[int, int],
) -> tuple[UInt8[np.ndarray, "height width"], Values]:
    """Numbers as classes: by their colours in the palette, where these are classes' colours; else as they are.

    Numbers that could be classes are read by colour all the same, where a colour says another class than its number
    and most pixels have a colour of a class: black and white with a few greys are no classes 0, 1 and 255.
    """
    counts = np.bincount(values.ravel(), minlength=256)
    used = np.flatnonzero(counts).tolist()
    of_colour = {colour: index for index, colour in enumerate(colours)}
    shades = {value: palette[value] if value < len(palette) else (0, 0, 0) for value in used}
    by_number = {value: labels.get(value, IGNORED) if labels else value for value in used}
    by_colour = {value: of_colour.get(shade, IGNORED) for value, shade in shades.items()}
    number_unknown = {v for v in used if labels and v not in labels and v != IGNORED}
    colour_unknown = {v for v, shade in shades.items() if shade not in of_colour and v != IGNORED}
    lost, missed = (int(counts[list(some)].sum()) for some in (number_unknown, colour_unknown))
    contradicted = any(shade in of_colour and by_colour[v] != by_number[v] for v, shade in shades.items())
    coloured = bool(colours) and (not missed or missed < lost or (contradicted and 2 * missed < values.size))
    table = np.full(256, IGNORED, np.uint8)
    table[used] = list((by_colour if coloured else by_number).values())
    strange = {shades[v]: int(counts[v]) for v in colour_unknown}
    numbers = {(v,): int(counts[v]) for v in number_unknown}
    return table[values], Counter(strange) if coloured else Counter(numbers)


def write_mask(file: Path, mask: UInt8[np.ndarray, "height width"], colours: Sequence[tuple[int, int, int]]) -> None:
    """Write class numbers as a PNG whose palette shows them.

    Raises:
        UserError: another ending, or a path that cannot be written.
    """
    if output_suffix(file, ".png") != ".png":
        raise UserError(f"a mask is written as .png, got {file.name}")
    image = Image.fromarray(mask)
    # All 256: of a shorter palette a PNG keeps fewer bits a pixel, in which 255 does not fit.
    image.putpalette([value for colour in [*colours, *[(0, 0, 0)] * 256][:256] for value in colour])
    with atomic_write(file, suffix=".png") as temporary:
        image.save(temporary)


def palette(count: int) -> list[tuple[int, int, int]]:
    """Colours that the eye can distinguish: hues by the golden angle, in three turns of lightness.

    >>> len(set(palette(150)))
    150
    """
    turns = [(f"hsl({(137.508 * k) % 360:.1f}, 65%, {(45, 62, 30)[k // 8 % 3]}%)") for k in range(count)]
    return [ImageColor.getrgb(turn)[:3] for turn in turns]


def read_folder(root: Path, skip_broken: bool = False) -> MaskFolder:
    """Find images and their masks in a folder.

    Understood are `images/` and `masks/` with files of the same name, either split into `train`, `val` and `test`
    within or under these. So are ADE20K (`images/training`, `annotations/training`), Pascal VOC (`JPEGImages`,
    `SegmentationClass`), Cityscapes (`leftImg8bit`, `gtFine`), CamVid (masks `…_L.png`) and COCO-stuff
    (`images/train2017`, `annotations/train2017` or `stuffthingmaps`). `classes.txt` names the classes, a line each,
    with a colour where masks are coloured.

    Raises:
        UserError: says what is missing, or that an image has no mask.
    """
    if not root.is_dir():
        raise UserError(
            f"{root} {'is a file' if root.exists() else 'does not exist'}: give a folder that holds images/ and masks/"
        )
    classes, colours = _classes(root)
    images, masks = (_first_folder(root, names) for names in (IMAGE_FOLDERS, MASK_FOLDERS))
    folders: dict[str, tuple[Path, Path]] = {}
    for split, names in SPLITS.items():
        for name in names:
            if images is not None and masks is not None and (images / name).is_dir() and (masks / name).is_dir():
                folders[split] = (images / name, masks / name)
            within = [_first_folder(root / name, kinds) for kinds in (IMAGE_FOLDERS, MASK_FOLDERS)]
            if within[0] is not None and within[1] is not None:
                folders[split] = (within[0], within[1])
    if not folders:
        if images is None or masks is None:
            missing = "images/" if images is None else "masks/"
            raise UserError(
                f"{root} holds no {missing}: give a folder with images/ and masks/, files of the same names"
            )
        folders["train"] = (images, masks)
    splits = {split: _pairs(*both, skip_broken) for split, both in folders.items()}
    splits = {split: pairs for split, pairs in splits.items() if pairs}
    if images is not None and images.name == "leftImg8bit":
        if len(splits) > 1:
            splits.pop("test", None)  # Cityscapes keeps its labels back: what lies there judges no pixel
        numbers = None if _is_train_ids(splits) else {label: k for k, label in enumerate(CITYSCAPES)}
        return MaskFolder(splits, list(CITYSCAPES.values()), [], numbers)
    if not classes and all(mask.stem.endswith("_L") for pairs in splits.values() for _, mask in pairs):
        return MaskFolder(splits, list(CAMVID), list(CAMVID.values()), void=CAMVID_VOID)
    ade = masks is not None and masks.name == "annotations" and (masks / "training").is_dir()
    return MaskFolder(splits, classes, colours, subtract=int(ade))


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _is_train_ids(splits: dict[str, list[tuple[Path, Path]]]) -> bool:
    return next(iter(splits.values()))[0][1].stem.endswith("labelTrainIds")


def _classes(root: Path) -> tuple[list[str], list[tuple[int, int, int]]]:
    file = root / "classes.txt"
    if not file.is_file():
        return [], []
    names, colours = [], []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        rgb = tuple(int(word) for word in words[-3:] if word.isdecimal() and int(word) < 256)
        coloured = len(words) > 3 and len(rgb) == 3
        names.append(" ".join(words[:-3] if coloured else words))
        if coloured:
            colours.append((rgb[0], rgb[1], rgb[2]))
        if colours and len(colours) != len(names):
            raise UserError(f"{file}, line {number}: either every class has a colour (red green blue) or none")
    if len(set(colours)) < len(colours):
        raise UserError(f"{file}: two classes have the same colour")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{file}: two classes are called {twice!r}: give each a name of its own")
    if len(names) > IGNORED:
        raise UserError(f"{file} names {len(names)} classes: a mask holds {IGNORED} at the most, from 0 on")
    return names, colours


def _pairs(images: Path, masks: Path, skip_broken: bool) -> list[tuple[Path, Path]]:
    by_name: dict[str, Path] = {}
    for file in sorted(masks.rglob("*")):
        if file.suffix.lower() in MASKS and not file.name.startswith("."):
            kind, stem = file.stem.rpartition("_gtFine_")[::2]
            name = kind or stem
            if kind and stem not in ("labelIds", "labelTrainIds"):
                continue  # of Cityscapes: colours, instances
            if kind and stem == "labelIds" and name in by_name:
                continue
            by_name[name] = file
    found, without = [], []
    for image in images_in(images, skip_broken):
        if image.suffix.lower() not in SUFFIXES:
            continue
        stem = image.stem.removesuffix("_leftImg8bit")
        mask = by_name.get(stem) or by_name.get(f"{stem}_mask") or by_name.get(f"{stem}_L")
        if mask is None:
            without.append(image)
        else:
            found.append((image, mask))
    if without:
        raise UserError(
            f"{without[0]} has no mask: expected {masks / (without[0].stem + '.png')}"
            + (f"; nor have {len(without) - 1} others" if len(without) > 1 else "")
        )
    return found

"""Images with masks: a class number for each pixel, in the layouts that people keep them in."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor

from provenn.data.images import SUFFIXES, images_in
from provenn.errors import UserError
from provenn.files import whole

IGNORED = 255  # of a mask: not trained on and not judged
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
    """

    splits: dict[str, list[tuple[Path, Path]]]
    classes: list[str]
    colours: list[tuple[int, int, int]]
    numbers: dict[int, int] | None = None
    subtract: int = 0
    order: tuple[int, ...] | None = None

    def read(self, mask: Path) -> UInt8[np.ndarray, "height width"]:
        """A mask as class numbers, 255 for what is not judged.

        Raises:
            UserError: as `read_mask`, or a number that has no name, where a model's order goes by names.
        """
        numbers = self._numbers(mask)
        if self.order is None:
            return numbers
        judged = numbers[numbers != IGNORED]
        if judged.size and judged.max() >= len(self.order):
            raise UserError(f"{mask} holds the class {judged.max()}; there are {len(self.order)}, from 0 on")
        table = np.full(256, IGNORED, np.uint8)
        table[: len(self.order)] = self.order
        return table[numbers]

    def _numbers(self, mask: Path) -> UInt8[np.ndarray, "height width"]:
        numbers = read_mask(mask, self.colours)
        if self.numbers is not None:
            table = np.full(256, IGNORED, np.uint8)
            table[list(self.numbers)] = list(self.numbers.values())
            return table[numbers]
        if self.subtract:
            numbers = np.where(numbers == IGNORED, IGNORED, numbers - np.uint8(self.subtract)).astype(np.uint8)
        return numbers


def read_mask(file: Path, colours: Sequence[tuple[int, int, int]] = ()) -> UInt8[np.ndarray, "height width"]:
    """The class number of each pixel: the place in a palette, a grey value, or the class of a colour.

    Args:
        file: PNG, TIFF or BMP: of 8 or 16 bits, with a palette, of 1 bit, or coloured.
        colours: of each class; what has none of them is not judged. A grey mask is read by them where they explain
            all of its values, and else holds numbers.

    Raises:
        UserError: no image, a damaged one, one with loss, numbers over 255, or colours that nobody explained.
    """
    if file.suffix.lower() not in MASKS:
        raise UserError(f"{file}: a mask is kept without loss, as {', '.join(MASKS)}")
    try:
        with Image.open(file) as image:
            if image.mode == "1":
                return np.asarray(image).astype(np.uint8)
            if image.mode in ("P", "L"):
                numbers = np.asarray(image).copy()
                return numbers if image.mode == "P" else _of_greys(numbers, colours)
            values = np.asarray(image) if image.mode.startswith(("I", "F")) else np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, zlib.error, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is no mask that can be read: {error}") from None
    if values.ndim == 2:
        if values.min() < 0 or values.max() > IGNORED or (values % 1).any():
            raise UserError(
                f"{file}: a mask holds class numbers from 0 to {IGNORED}, got {values.min()} to {values.max()}"
            )
        return values.astype(np.uint8)
    if not colours and (values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all():
        return values[..., 0].copy()
    if not colours:
        raise UserError(
            f"{file} is coloured: say what its colours mean in a file classes.txt beside the folders, a line a class, "
            "such as 'road 128 64 128'"
        )
    key = np.array([1 << 16, 1 << 8, 1])
    codes, known = values.astype(np.int64) @ key, np.array(colours, np.int64) @ key
    order = known.argsort()
    place = np.minimum(np.searchsorted(known[order], codes), len(known) - 1)
    return np.where(known[order][place] == codes, order[place], IGNORED).astype(np.uint8)


def _of_greys(
    values: UInt8[np.ndarray, "height width"], colours: Sequence[tuple[int, int, int]]
) -> UInt8[np.ndarray, "height width"]:
    """Grey values as classes where all of them are classes' colours, as in black and white; else as they are."""
    greys = {red: index for index, (red, green, blue) in enumerate(colours) if red == green == blue}
    there = np.unique(values).tolist()
    if not set(there) <= greys.keys():
        return values
    table = np.zeros(256, np.uint8)
    table[there] = [greys[value] for value in there]
    return table[values]


def write_mask(file: Path, mask: UInt8[np.ndarray, "height width"], colours: Sequence[tuple[int, int, int]]) -> None:
    """Write class numbers as a PNG whose palette shows them.

    Raises:
        UserError: another ending, or a place that cannot be written.
    """
    if file.suffix.lower() != ".png":
        raise UserError(f"a mask is written as .png, got {file.name}")
    image = Image.fromarray(mask)
    # All 256: of a shorter palette a PNG keeps fewer bits a pixel, in which 255 does not fit.
    image.putpalette([value for colour in [*colours, *[(0, 0, 0)] * 256][:256] for value in colour])
    with whole(file) as place:
        image.save(place)


def palette(count: int) -> list[tuple[int, int, int]]:
    """Colours that are told apart: hues by the golden angle, in three turns of lightness.

    >>> len(set(palette(150)))
    150
    """
    turns = [(f"hsl({(137.508 * k) % 360:.1f}, 65%, {(45, 62, 30)[k // 8 % 3]}%)") for k in range(count)]
    return [ImageColor.getrgb(turn)[:3] for turn in turns]


def read_folder(root: Path, skip_broken: bool = False) -> MaskFolder:
    """Find images and their masks in a folder.

    Understood are `images/` and `masks/` with files of the same name, either split into `train`, `val` and `test`
    within or under these; ADE20K (`images/training`, `annotations/training`), Pascal VOC (`JPEGImages`,
    `SegmentationClass`), Cityscapes (`leftImg8bit`, `gtFine`), CamVid (masks `…_L.png`) and COCO-stuff
    (`images/train2017`, `annotations/train2017` or `stuffthingmaps`). `classes.txt` names the classes, a line each,
    with a colour where masks are coloured.

    Raises:
        UserError: says what is missing, or that an image has no mask.
    """
    if not root.is_dir():
        raise UserError(f"{root} is a file: give a folder that holds images/ and masks/")
    classes, colours = _classes(root)
    images, masks = (_first_folder(root, names) for names in (IMAGE_FOLDERS, MASK_FOLDERS))
    places: dict[str, tuple[Path, Path]] = {}
    for split, names in SPLITS.items():
        for name in names:
            if images is not None and masks is not None and (images / name).is_dir() and (masks / name).is_dir():
                places[split] = (images / name, masks / name)
            within = [_first_folder(root / name, kinds) for kinds in (IMAGE_FOLDERS, MASK_FOLDERS)]
            if within[0] is not None and within[1] is not None:
                places[split] = (within[0], within[1])
    if not places:
        if images is None or masks is None:
            missing = "images/" if images is None else "masks/"
            raise UserError(
                f"{root} holds no {missing}: give a folder with images/ and masks/, files of the same names"
            )
        places["train"] = (images, masks)
    splits = {split: _pairs(*folders, skip_broken) for split, folders in places.items()}
    splits = {split: pairs for split, pairs in splits.items() if pairs}
    if images is not None and images.name == "leftImg8bit":
        if len(splits) > 1:
            splits.pop("test", None)  # Cityscapes keeps its labels back: what lies there judges no pixel
        numbers = None if _is_train_ids(splits) else {label: k for k, label in enumerate(CITYSCAPES)}
        return MaskFolder(splits, list(CITYSCAPES.values()), [], numbers)
    if not classes and all(mask.stem.endswith("_L") for pairs in splits.values() for _, mask in pairs):
        return MaskFolder(splits, list(CAMVID), list(CAMVID.values()))
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
    for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1):
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

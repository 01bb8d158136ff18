"""Pictures with boxes as COCO writes them: a JSON file of images, categories and annotations, and a folder of images.

`bbox` is [left, top, width, height] in pixels. A crowd (`iscrowd`: 1) stands for more objects than one could draw.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import parse_json, read_text
from provenn.data.images import SUFFIXES, size_of

SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class Labelled:
    """An image and what is in it.

    Args:
        file: the image.
        boxes: (objects, 4) left, top, right, bottom in its pixels, inside it.
        labels: (objects,) indices into the categories of its set.
        areas: (objects,) pixels², of the object's outline where it was drawn, by which it counts as small or large.
        crowd: (objects,) whether the box is of a crowd.
        number: the image's id.
    """

    file: Path
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    number: int | str = 0


@dataclass(frozen=True)
class CocoSet:
    """What one file of annotations holds.

    Args:
        images: in the file's order.
        classes: names of the categories, in the order of their ids.
        ids: of the categories.
    """

    images: list[Labelled]
    classes: list[str]
    ids: list[int]


class Outlined(NamedTuple):
    """An object in an image.

    Args:
        mask: (height, width) its pixels.
        noun: its category.
    """

    mask: np.ndarray
    noun: str


def find_coco(root: Path) -> dict[str, Path]:
    """The files of annotations in a folder by split, or the only one as `train`.

    They lie in `annotations`, beside the images, or in the folders train, val (or valid) and test; the names of files
    or folders say of which split they are. Where there are COCO's `instances_…`, the others are left alone.

    Raises:
        UserError: there are none, or several of which none says what it is.
    """
    if root.is_file():
        return {"train": root}
    folders = [root / "annotations", *(f for f in sorted(root.iterdir()) if f.is_dir() and _split_of(f.name)), root]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.json"))]
    files = [file for file in files if file.name.startswith("instances_")] or files
    if not files:
        raise UserError(
            f"{root} holds no annotations: expected COCO JSON, such as annotations/instances_train2017.json or "
            "train/_annotations.coco.json"
        )
    named: dict[str, Path] = {}
    for file in files:
        split = _split_of(file.stem) or (_split_of(file.parent.name) if file.parent != root else None)
        if split is None and len(files) > 1:
            raise UserError(f"{file}: its name says neither train, val nor test, and there are {len(files)} JSON files")
        split = split or "train"
        if split in named:
            raise UserError(f"{named[split]} and {file} are both for {split}: keep one, or give the one that is meant")
        named[split] = file
    return named


def _split_of(name: str) -> str | None:
    return next((split for split, words in SPLITS.items() if any(word in name.lower() for word in words)), None)


def read_coco(file: Path, root: Path | None = None, *, skip_broken: bool = False) -> CocoSet:
    """Read annotations, and find their images.

    What many sets hold and no detector can use is left out, and said: boxes without width or height, boxes that lie
    outside of their image, and the same box twice. Boxes are cut to their image.

    Args:
        file: the JSON.
        root: of the data set: images are looked for beside the JSON, in folders called as it is (`train2017` of
            `instances_train2017.json`), in `images` and in the folder itself.
        skip_broken: leave images out that are missing or cannot be read, and say so.

    Raises:
        UserError: no such JSON; ids that are unknown or occur twice; boxes that are no four numbers; images that are
            missing or of another size.
    """
    content = _parse(file)
    ids, classes = _categories(content["categories"], file)
    listed = _images(content["images"], file)
    folder = _folder_of(file, root or file.parent, [str(image["file_name"]) for image in listed.values()])
    shapes, broken = _sizes(listed, folder, file, skip_broken)
    things: dict[Any, list[tuple[list[float], int, float, bool]]] = {number: [] for number in shapes}
    position = {number: index for index, number in enumerate(ids)}
    empty, outside, twice, cut_off = [], [], [], []
    seen: set[tuple[Any, ...]] = set()
    beyond = 0
    for count, note in enumerate(content["annotations"]):
        where = f"{file}: annotation {note.get('id', count) if isinstance(note, dict) else count}"
        if not isinstance(note, dict) or not {"image_id", "category_id", "bbox"} <= note.keys():
            raise UserError(f"{where} lacks image_id, category_id or bbox")
        number, category, box = note["image_id"], note["category_id"], note["bbox"]
        if not _is_id(number) or number not in listed:
            raise UserError(f"{where} is of image {number!r}, which the file does not list")
        if not _is_id(category) or category not in position:
            raise UserError(f"{where} is of category {category!r}, which the file does not list")
        if not _is_box(box):
            raise UserError(f"{where}: bbox must be four numbers, [left, top, width, height], got {str(box)[:80]}")
        if number in broken:
            continue
        (left, top, wide, tall), (height, width) = map(float, box), shapes[number]
        cut = [max(0.0, left), max(0.0, top), min(float(width), left + wide), min(float(height), top + tall)]
        if note.get("iscrowd", 0) not in (0, 1):
            raise UserError(f"{where}: iscrowd must be 0 or 1, got {str(note['iscrowd'])[:40]!r}")
        crowd = bool(note.get("iscrowd", 0))
        reaches = left + wide > width + 1 or top + tall > height + 1
        beyond += reaches
        key = (number, category, *box, crowd)
        if wide <= 0 or tall <= 0:
            empty.append(where)
        elif cut[2] <= cut[0] or cut[3] <= cut[1]:
            outside.append(where)
        elif key in seen:
            twice.append(where)
        else:
            seen.add(key)
            area = note.get("area", 0)
            drawn = _is_finite(area) and 0 < area <= height * width
            if reaches or min(left, top) < -1:
                cut_off.append(where)
                wide, tall = cut[2] - cut[0], cut[3] - cut[1]
            things[number].append((cut, position[category], float(area if drawn else wide * tall), crowd))
    total = len(content["annotations"])
    if total >= 4 and beyond + len(empty) > total / 2:
        raise UserError(
            f"{file}: {beyond + len(empty)} of {total} boxes are empty or reach beyond their image: "
            "bbox is [left, top, width, height] in pixels, not two corners and no shares"
        )
    for left_out, why in (
        (empty, "without width or height"),
        (outside, "outside of the image"),
        (twice, "given twice"),
    ):
        if left_out:
            progress.say(f"left out {len(left_out)} box{'es' * (len(left_out) > 1)} {why}, such as {left_out[0]}")
    if cut_off:
        boxes = f"{len(cut_off)} boxes that reach" if len(cut_off) > 1 else "1 box that reaches"
        progress.say(f"cut {boxes} beyond the sides of the image, such as {cut_off[0]}")
    images = [_labelled(folder / listed[number]["file_name"], rows, number) for number, rows in things.items()]
    return CocoSet(images, classes, ids)


def read_outlines(file: Path, root: Path | None = None) -> tuple[list[str], Iterator[tuple[Path, list[Outlined]]]]:
    """The categories, and image by image its file and the objects that are outlined there.

    Left out are crowds, which are no objects, and annotations without an outline; the latter are said.

    Args:
        file, root: as of `read_coco`. Outlines are lists of polygons or runs, compressed or not.

    Raises:
        UserError: the file is as `read_coco` refuses it, an outline is no polygon and no runs of its image, or
            pycocotools, which fills polygons, is not installed.
    """
    content = _parse(file)
    ids, classes = _categories(content["categories"], file)
    listed = _images(content["images"], file)
    folder = _folder_of(file, root or file.parent, [str(image["file_name"]) for image in listed.values()])
    shapes, _ = _sizes(listed, folder, file, False)
    of_image: dict[Any, list[tuple[str, str, Any]]] = {number: [] for number in listed}
    bare = []
    for count, note in enumerate(content["annotations"]):
        where = f"{file}: annotation {note.get('id', count) if isinstance(note, dict) else count}"
        if not isinstance(note, dict) or not {"image_id", "category_id"} <= note.keys():
            raise UserError(f"{where} lacks image_id or category_id")
        number, category = note["image_id"], note["category_id"]
        if not _is_id(number) or number not in listed:
            raise UserError(f"{where} is of image {number!r}, which the file does not list")
        if not _is_id(category) or category not in ids:
            raise UserError(f"{where} is of category {category!r}, which the file does not list")
        if note.get("iscrowd"):
            continue
        if note.get("segmentation"):
            of_image[number].append((where, classes[ids.index(category)], note["segmentation"]))
        else:
            bare.append(where)
    if len(bare) == len(content["annotations"]):
        raise UserError(f"{file} outlines no object: expected `segmentation`, polygons or runs, in its annotations")
    if bare:
        progress.say(f"left out {len(bare)} of {len(content['annotations'])} without an outline, such as {bare[0]}")

    def walk() -> Iterator[tuple[Path, list[Outlined]]]:
        for number, notes in of_image.items():
            objects = [Outlined(filled(drawn, shapes[number], where), noun) for where, noun, drawn in notes]
            yield folder / listed[number]["file_name"], objects

    return classes, walk()


def filled(outline: Any, shape: tuple[int, int], where: str) -> np.ndarray:
    """The pixels of an outline, (height, width), as COCO writes it: polygons [x, y, x, y, …], or runs by columns.

    >>> filled({"size": [2, 3], "counts": [1, 2, 3]}, (2, 3), "here").astype(int).tolist()
    [[0, 1, 0], [1, 0, 0]]

    Raises:
        UserError: it is neither, or of another size; `where` begins the sentence.
    """
    if isinstance(outline, dict):
        if outline.get("size") != list(shape):
            raise UserError(f"{where}: the outline is of {str(outline.get('size'))[:40]} pixels, its image of {shape}")
        counts = outline.get("counts")
        runs = _expanded(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
            raise UserError(f"{where}: its runs are no lengths: expected whole numbers, or COCO's compressed text")
        if sum(runs) != shape[0] * shape[1]:
            raise UserError(f"{where}: its runs do not fill an image of {shape[1]}×{shape[0]} pixels")
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape[::-1]).T
    polygons = isinstance(outline, list) and all(
        isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 and all(map(_is_finite, part))
        for part in outline
    )
    if not polygons:
        raise UserError(f"{where}: expected polygons of three points or more, [x, y, x, y, …], got {str(outline)[:60]}")
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("filling polygons needs a package: pip install 'provenn[detection]'") from None
    height, width = shape
    inside = [np.clip(part, 0, np.tile([width, height], len(part) // 2)).tolist() for part in outline]
    return mask.decode(mask.merge(mask.frPyObjects(inside, height, width))).astype(bool)


def _expanded(text: str) -> list[int] | None:
    """The runs of COCO's compressed text; None where it is none.

    Each number stands in groups of five bits, the lowest first, with a sixth bit where more follow. From the fourth run
    on it is what is added to the last but one before.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs if shift == 0 else None


def _labelled(file: Path, rows: list[tuple[list[float], int, float, bool]], number: int | str) -> Labelled:
    boxes, labels, areas, crowd = zip(*rows) if rows else ((), (), (), ())
    return Labelled(
        file,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(areas, np.float64),
        np.array(crowd, bool),
        number,
    )


def _parse(file: Path) -> dict[str, Any]:
    content = parse_json(read_text(file), str(file))
    for key in ("images", "categories", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{file} is no COCO JSON: it has no list {key!r}; expected images, categories, annotations")
    if not content["images"]:
        raise UserError(f"{file} lists no images")
    return content


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    return all(_is_finite(x) for x in box)


def _is_finite(value: Any) -> bool:
    """A number that a float can hold: JSON's whole numbers may have 400 digits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _categories(listed: list[Any], file: Path) -> tuple[list[int], list[str]]:
    names: dict[int, str] = {}
    for entry in listed:
        given, number = (entry.get("name"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(given, str) or not given.strip():
            raise UserError(f"{file}: a category needs an id, a whole number, and a name, got {str(entry)[:80]}")
        name = given.strip()
        if number in names or name in names.values():
            raise UserError(f"{file}: the category {name!r} (id {number}) is listed twice")
        names[number] = name
    if not names:
        raise UserError(f"{file} lists no categories")
    ids = sorted(names)
    return ids, [names[number] for number in ids]


def _images(listed: list[Any], file: Path) -> dict[Any, dict[str, Any]]:
    images: dict[Any, dict[str, Any]] = {}
    files: dict[str, Any] = {}
    for entry in listed:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("file_name"), str):
            raise UserError(f"{file}: an image needs an id and a file_name, got {str(entry)[:80]}")
        if entry["id"] in images:
            raise UserError(f"{file}: two images have the id {entry['id']!r}")
        if Path(entry["file_name"]).suffix.lower() not in SUFFIXES:
            raise UserError(f"{file}: {entry['file_name']!r} is no image that is read: {', '.join(SUFFIXES)}")
        path = Path(entry["file_name"])
        if path.is_absolute() or ".." in path.parts or "\0" in entry["file_name"]:
            raise UserError(f"{file}: the image {entry['file_name']!r} lies outside of the data set")
        if (first := files.setdefault(str(path), entry["id"])) != entry["id"]:
            raise UserError(f"{file}: the images {first!r} and {entry['id']!r} are the same file, {entry['file_name']}")
        images[entry["id"]] = entry
    return images


def _folder_of(file: Path, root: Path, names: Sequence[str]) -> Path:
    """The folder that holds most of the images, of all in which they may lie."""
    words = [word for word in file.stem.split("_") if _split_of(word)]
    split = _split_of(file.stem)
    words += [word for word in SPLITS.get(split or "", ()) if word not in words]
    inside = [root / "images" / word for word in words] + [root / word for word in words]
    folders = [file.parent, *inside, *(folder / "images" for folder in inside), file.parent / "images"]
    folders += [root / "images", root]
    some = names[:: max(1, len(names) // 20)]
    found = {folder: sum((folder / name).is_file() for name in some) for folder in dict.fromkeys(folders)}
    best = max(found, key=lambda folder: found[folder])
    if not found[best]:
        there = ", ".join(str(folder) for folder in found if folder.is_dir())
        raise UserError(f"{file}: its images, such as {names[0]}, are in none of {there}")
    return best


def _sizes(
    listed: dict[Any, dict[str, Any]], folder: Path, file: Path, skip_broken: bool
) -> tuple[dict[Any, tuple[int, int]], set[Any]]:
    """Height and width of each image from its file, and the ids of those that are left out."""
    sizes: dict[Any, tuple[int, int]] = {}
    missing, broken = [], set()
    for number, entry in listed.items():
        path = folder / entry["file_name"]
        if not path.is_file():
            missing.append(number)
            continue
        try:
            height, width = size_of(path)
        except UserError:
            if not skip_broken:
                raise
            broken.add(number)
            continue
        sides = {"height": height, "width": width}
        said = tuple(side if entry.get(name) is None else entry[name] for name, side in sides.items())
        if said != (height, width):
            raise UserError(f"{path} is {width}×{height} pixels; {file.name} says {said[1]}×{said[0]}")
        sizes[number] = height, width
    if missing and not skip_broken:
        name = listed[missing[0]]["file_name"]
        raise UserError(f"{file}: {len(missing)} of {len(listed)} images are not in {folder}, such as {name}")
    left_out = {*missing, *broken}
    if left_out:
        name = next(entry["file_name"] for number, entry in listed.items() if number in left_out)
        progress.say(f"{file}: left out {len(left_out)} of its images, missing or not to be read, such as {name}")
    if not sizes:
        raise UserError(f"{file}: none of its images can be read")
    return sizes, left_out

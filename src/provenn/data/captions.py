"""Images with captions in the layouts of the field: COCO, Flickr30K, features of regions, and plain folders.

- karpathy: `dataset_flickr30k.json` or `dataset_coco.json` with sentences and splits, and the images below
- coco: `annotations/captions_train2017.json`, and folders such as `train2017/`
- flickr30k: `results_20130124.token`, `results.csv` or `Flickr8k.token.txt`, and a folder of images
- features: `train_ims.npy` (images, regions, numbers) and `train_caps.txt`, a caption a line; so `dev` and `test`
- plain: `captions.csv`, `captions.tsv` or `captions.txt`: an image and a caption a line, and the images

Of `features`, `train_lens.npy` says how many regions of each image are real. In the field's files an image may stand
once for all of its captions, or once for each.
"""

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from provenn.core.errors import UserError
from provenn.core.inputs import check_file, parse_json, read_text
from provenn.data.images import SUFFIXES

LAYOUTS = ("karpathy", "coco", "flickr30k", "features", "plain")
SPLITS = {"train": ("train", "restval"), "val": ("val", "dev"), "test": ("testall", "test")}
PLAIN = ("captions.csv", "captions.tsv", "captions.txt")
TOKENS = ("results_20130124.token", "results.csv", "Flickr8k.token.txt")
BLOCK = 256  # images of features that are looked at together
TOKEN = re.compile(r"(.+?)#(\d+)\t(.*)")  # 1000092795.jpg#0, a tab, a caption


@dataclass(frozen=True)
class Captioned:
    """Images and the captions of each.

    Args:
        images: files; or features of regions (images, regions, numbers), which may lie on the disk.
        captions: of each image, one or more.
        lengths: of features, how many regions of each image are real.
    """

    images: Sequence[Path] | np.ndarray
    captions: list[list[str]] = field(repr=False)
    lengths: np.ndarray | None = None

    def some(self, rows: Sequence[int]) -> "Captioned":
        """The images of these numbers."""
        images = self.images[list(rows)] if isinstance(self.images, np.ndarray) else [self.images[row] for row in rows]
        return Captioned(
            images, [self.captions[row] for row in rows], None if self.lengths is None else self.lengths[list(rows)]
        )


def layout_of(root: Path) -> str:
    """The layout that a folder has.

    Raises:
        UserError: none of them.
    """
    found = next((name for name in LAYOUTS if _marks(root, name)), None)
    if found is None:
        raise UserError(f"{root} holds no captions: expected {'; '.join(EXPECTED[name] for name in LAYOUTS)}")
    return found


EXPECTED = {
    "karpathy": "dataset_….json",
    "coco": "annotations/captions_….json",
    "flickr30k": " or ".join(TOKENS),
    "features": "train_ims.npy with train_caps.txt",
    "plain": " or ".join(PLAIN),
}


def _marks(root: Path, layout: str) -> list[Path]:
    if layout == "karpathy":
        return sorted(root.glob("dataset_*.json"))
    if layout == "coco":
        return sorted((root / "annotations").glob("captions_*.json")) or sorted(root.glob("captions_*.json"))
    if layout == "features":
        return sorted(root.glob("*_caps.txt"))
    return [root / name for name in (TOKENS if layout == "flickr30k" else PLAIN) if (root / name).is_file()]


def read_captions(root: Path, layout: str | None = None) -> dict[str, Captioned]:
    """The images and captions of a folder by split; without splits, all as `train`.

    Args:
        root: the folder.
        layout: one of `LAYOUTS`. Default: the one that its files have.

    Raises:
        UserError: another layout than the one that is given; a caption without an image, an image without a caption,
            or an image that is missing, with the file and the line or the number.
    """
    if not root.is_dir():
        raise UserError(f"{root} is a file: give the folder that holds captions and images")
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    layout = layout or layout_of(root)
    marks = _marks(root, layout)
    if not marks:
        there = next((name for name in LAYOUTS if _marks(root, name)), None)
        hint = f"; it looks like layout={there}" if there else ""
        raise UserError(f"{root} has not the layout {layout}: expected {EXPECTED[layout]}{hint}")
    readers: dict[str, Callable[[Path, list[Path]], dict[str, Captioned]]] = {
        "karpathy": _karpathy,
        "coco": _coco,
        "flickr30k": _flickr,
        "features": _features,
        "plain": _plain,
    }
    return readers[layout](root, marks)


class Images:
    """The image files below a folder, by their paths and by their names."""

    def __init__(self, root: Path):
        self.root = root
        self.files = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
        self.by_name: dict[str, list[Path]] = {}
        for file in self.files:
            self.by_name.setdefault(file.name, []).append(file)

    def find(self, name: str, where: str) -> Path:
        """The file of a name or of a path below the folder.

        Raises:
            UserError: there is none, or several have the name.
        """
        path = self.root / name
        if path.is_file():
            return path
        found = self.by_name.get(Path(name).name, [])
        if not found:
            raise UserError(f"{where}: no image {name!r} below {self.root}: add the file or remove the line")
        exact = [file for file in found if file.as_posix().endswith(f"/{name}")]
        if len(exact or found) > 1:
            raise UserError(f"{where}: {len(found)} images are called {name!r}, such as {found[0]} and {found[1]}")
        return (exact or found)[0]


def _karpathy(root: Path, marks: list[Path]) -> dict[str, Captioned]:
    file = marks[0]
    content = parse_json(read_text(file), str(file))
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise UserError(f'{file}: expected {{"images": [{{"filename", "split", "sentences"}}, …]}}')
    files, parts = Images(root), dict[str, dict[Path, list[str]]]()
    for number, image in enumerate(images):
        where = f"{file}, image {number}"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            raise UserError(f"{where}: expected filename, split and sentences")
        name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
        sentences = image.get("sentences")
        said = [s.get("raw") for s in sentences if isinstance(s, dict)] if isinstance(sentences, list) else []
        captions = [text for text in said if isinstance(text, str) and text.strip()]
        if not captions:
            raise UserError(f"{where}: {name!r} has no caption: add sentences with raw, or remove the image")
        split = _split_of(str(image.get("split")), where)
        parts.setdefault(split, {})[files.find(name, where)] = captions
    return {split: Captioned(list(found), list(found.values())) for split, found in parts.items()}


def _split_of(word: str, where: str) -> str:
    for split, names in SPLITS.items():
        if word in names:
            return split
    raise UserError(f"{where}: its split is {word!r}: expected train, restval, val or test")


def _coco(root: Path, marks: list[Path]) -> dict[str, Captioned]:
    files, parts = Images(root), dict[str, Captioned]()
    for file in marks:
        split = next((s for s, words in SPLITS.items() if any(w in file.stem for w in words)), None)
        if split is None:
            raise UserError(f"{file}: its name says neither train, val nor test")
        content = parse_json(read_text(file), str(file))
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise UserError(f"{file}: expected COCO JSON with images and annotations")
        names: dict[Any, str] = {}
        for number, image in enumerate(content["images"]):
            if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
                raise UserError(f"{file}, image {number}: expected id and file_name")
            names[str(image["id"])] = image["file_name"]
        captions: dict[str, list[str]] = {number: [] for number in names}
        for number, note in enumerate(content.get("annotations", [])):
            if not isinstance(note, dict) or not isinstance(note.get("caption"), str):
                raise UserError(f"{file}, annotation {number}: expected image_id and caption")
            if str(note.get("image_id")) not in captions:
                raise UserError(
                    f"{file}, annotation {number}: a caption without an image: the file lists no image "
                    f"{note.get('image_id')!r}"
                )
            captions[str(note["image_id"])].append(note["caption"].strip())
        _none_without(captions, names, str(file))
        found = [files.find(names[number], f"{file}, image {number}") for number in captions]
        parts[split] = Captioned(found, list(captions.values()))
    return parts


def _none_without(captions: dict[str, list[str]], names: dict[Any, str], where: str) -> None:
    without = [names[number] for number, said in captions.items() if not said]
    if without:
        more = f", nor have {len(without) - 1} others" if len(without) > 1 else ""
        raise UserError(f"{where}: the image {without[0]!r} has no caption{more}: add one, or remove the image")


def _flickr(root: Path, marks: list[Path]) -> dict[str, Captioned]:
    file = marks[0]
    lines = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip() or (number == 1 and line.startswith("image_name")):
            continue
        match = TOKEN.fullmatch(line)
        parts = [match[1], match[3]] if match else [line.split("|")[0], line.split("|")[-1]] if "|" in line else []
        if len(parts) != 2 or not parts[1].strip():
            raise UserError(f"{file}, line {number}: expected 'name.jpg#0', a tab and a caption, got {line[:60]!r}")
        lines.append((number, parts[0].strip(), parts[1].strip()))
    return {"train": _listed(root, file, lines)}


def _plain(root: Path, marks: list[Path]) -> dict[str, Captioned]:
    file = marks[0]
    mark = {".csv": ",", ".tsv": "\t"}.get(file.suffix)
    text = read_text(file)
    mark = mark or ("\t" if "\t" in text else ",")
    lines = []
    reader = csv.reader(text.splitlines(keepends=True), delimiter=mark)
    for row in reader:
        number = reader.line_num
        if not row or (number == 1 and Path(row[0]).suffix.lower() not in SUFFIXES):
            continue  # an empty line, or the header
        caption = mark.join(row[1:]).strip()
        if len(row) < 2 or not caption:
            raise UserError(f"{file}, line {number}: the image {row[0]!r} has no caption: expected an image and a text")
        if not row[0].strip():
            raise UserError(f"{file}, line {number}: a caption without an image: {caption[:60]!r}")
        lines.append((number, row[0].strip(), caption))
    captioned = _listed(root, file, lines)
    known = set(captioned.images)
    without = [image for image in Images(root).files if image not in known]
    if without:
        more = f", nor have {len(without) - 1} others" if len(without) > 1 else ""
        raise UserError(f"{without[0]}: the image has no caption in {file.name}{more}: add one, or remove the image")
    return {"train": captioned}


def _listed(root: Path, file: Path, lines: Iterable[tuple[int, str, str]]) -> Captioned:
    files, captions = Images(root), dict[Path, list[str]]()
    for number, name, caption in lines:
        captions.setdefault(files.find(name, f"{file}, line {number}"), []).append(caption)
    if not captions:
        raise UserError(f"{file} holds no captions")
    return Captioned(list(captions), list(captions.values()))


def _features(root: Path, marks: list[Path]) -> dict[str, Captioned]:
    parts: dict[str, Captioned] = {}
    for split, names in SPLITS.items():
        name = next((name for name in names if (root / f"{name}_caps.txt") in marks), None)
        if name is not None:
            parts[split] = _precomputed(root, name)
    if not parts:
        raise UserError(
            f"{root}: {marks[0].name} is of no split: expected train_caps.txt, dev_caps.txt or test_caps.txt"
        )
    return parts


def _precomputed(root: Path, name: str) -> Captioned:
    """Features and captions of a split; an image has as many captions as there are lines to an image."""
    features, text = root / f"{name}_ims.npy", root / f"{name}_caps.txt"
    images = _array(features, 3)
    captions = read_text(text).splitlines()
    empty = next((number for number, line in enumerate(captions, 1) if not line.strip()), None)
    if empty is not None:
        raise UserError(f"{text}, line {empty}: an image without a caption: the line is empty")
    count, each = len(images), len(captions) // max(1, len(images))
    if not count or len(captions) != each * count or not each:
        what = "captions without an image" if len(captions) > each * count and each else "images without a caption"
        raise UserError(
            f"{text} has {len(captions)} lines for {count} images in {features.name}: {what}; expected as many lines "
            "for each image"
        )
    lengths_file = root / f"{name}_lens.npy"
    lengths = None
    if lengths_file.is_file():
        lengths = np.asarray(_array(lengths_file, 1)).astype(np.int64)
        if len(lengths) != count or lengths.min() < 1 or lengths.max() > images.shape[1]:
            raise UserError(
                f"{lengths_file}: expected {count} numbers from 1 to {images.shape[1]}, one for each image, got "
                f"{len(lengths)} from {lengths.min()} to {lengths.max()}"
            )
    _check_finite(features, images, lengths)
    if (
        each == 1
        and count % 5 == 0
        and all((images[5 * k] == images[5 * k + 1]).all() for k in range(min(50, count // 5)))
    ):
        images, each = images[::5], 5  # each image five times, as in the field's files of dev and test
        lengths = None if lengths is None else lengths[::5]
    return Captioned(images, [captions[each * k : each * (k + 1)] for k in range(len(images))], lengths)


def _check_finite(file: Path, images: np.ndarray, lengths: np.ndarray | None) -> None:
    """Are all numbers of real regions finite? Read part by part, as the array may be larger than the memory."""
    for start in range(0, len(images), BLOCK):
        wrong = ~np.isfinite(images[start : start + BLOCK]).all(2)
        if lengths is not None:
            wrong &= np.arange(images.shape[1]) < lengths[start : start + BLOCK, None]
        if wrong.any():
            image, region = np.argwhere(wrong)[0]
            raise UserError(
                f"{file}: image {start + image}, region {region} holds NaN or infinity: expected finite numbers, so "
                "extract its features again"
            )


def _array(file: Path, dimensions: int) -> np.ndarray:
    check_file(file, 1 << 60)  # it is read from the disk part by part
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{file} is no array of NumPy: {' '.join(str(error).split())[:150]}") from None
    if values.ndim != dimensions or values.dtype.kind not in "fiu":
        raise UserError(f"{file}: expected numbers in {dimensions} dimensions, got {values.dtype} {values.shape}")
    return values

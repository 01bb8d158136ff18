"""Images whose class and split stand in lists: CUB-200-2011, NABirds, Stanford Dogs and Tiny-ImageNet."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from provenn.core.errors import UserError
from provenn.core.inputs import check_file, read_text
from provenn.data.class_folders import Splits
from provenn.data.images import images_in

BIRDS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
DOGS = {"train": "train_list.mat", "test": "test_list.mat"}
ANNOTATIONS = Path("val") / "val_annotations.txt"


def listed_splits(root: Path) -> Splits | None:
    """The images of each class of each split, by the lists that the folder has; None where it has none of these.

    - CUB-200-2011, NABirds: `images.txt`, `image_class_labels.txt`, `train_test_split.txt` and `classes.txt` beside
      `images/`.
    - Stanford Dogs: `train_list.mat` and `test_list.mat`, in `lists/` or at once, beside `Images/`.
    - Tiny-ImageNet: `wnids.txt`, `train/n01443537/images/` and `val/val_annotations.txt` beside `val/images/`. Its test
      has no labels, so its validation is the test.

    Raises:
        UserError: a list is damaged or lacks something, an image is not there, or a class has none to train on.
    """
    if (root / BIRDS[1]).is_file():
        return _birds(root)
    lists = next((folder for folder in (root / "lists", root) if (folder / DOGS["train"]).is_file()), None)
    if lists is not None:
        return _dogs(root, lists)
    if (root / "wnids.txt").is_file():
        return _tiny(root)
    return None


def _birds(root: Path) -> Splits:
    if missing := [name for name in BIRDS if not (root / name).is_file()]:
        raise UserError(f"{root} has {BIRDS[1]} but no {missing[0]}")
    files, labels, training, names = (dict(_pairs(root / name)) for name in BIRDS)
    for name, table in zip(BIRDS[1:3], (labels, training)):
        if odd := sorted(files.keys() ^ table.keys()):
            where = BIRDS[0] if odd[0] in files else name
            raise UserError(f"{root}: the image {odd[0]!r} is in {where} alone, of {BIRDS[0]} and {name}")
    if odd := sorted(set(labels.values()) - names.keys()):
        raise UserError(f"{root}: {BIRDS[1]} has the class {odd[0]!r}, which {BIRDS[3]} does not")
    if odd := sorted(set(training.values()) - {"0", "1"}):
        raise UserError(f"{root}: {BIRDS[2]} says 1 for training and 0 for the test, got {odd[0]!r}")
    used = sorted(set(labels.values()), key=lambda number: (len(number), number))
    twice = Counter(names[number] for number in used)
    called = {n: names[n] if twice[names[n]] == 1 else f"{names[n]} ({n})" for n in used}
    rows = (
        ("train" if training[image] == "1" else "test", called[labels[image]], root / "images" / file)
        for image, file in files.items()
    )
    return _divided(root, list(called.values()), rows)


def _dogs(root: Path, lists: Path) -> Splits:
    listed = {split: _mat_list(lists / name) for split, name in DOGS.items()}
    rows = [(split, name.split("/")[0], root / "Images" / name) for split, names in listed.items() for name in names]
    return _divided(root, sorted({name for _, name, _ in rows}), rows)


def _mat_list(file: Path) -> list[str]:
    from scipy.io import loadmat

    check_file(file)
    try:
        names = [str(entry.item() if hasattr(entry, "item") else entry) for entry in loadmat(file)["file_list"].ravel()]
    except Exception as error:  # SciPy has many, for a file that is no MATLAB file or holds something else
        raise UserError(f"{file} holds no file_list: {' '.join(str(error).split())[:200]}") from None
    if odd := next((name for name in names if name.count("/") != 1), None):
        raise UserError(f"{file}: expected class/file.jpg in its file_list, got {odd!r}")
    return names


def _tiny(root: Path) -> Splits:
    numbers = [line.strip() for line in read_text(root / "wnids.txt").splitlines() if line.strip()]
    if not (root / ANNOTATIONS).is_file():
        raise UserError(f"{root} has wnids.txt but no {ANNOTATIONS}")
    words = dict(_pairs(root / "words.txt")) if (root / "words.txt").is_file() else {}
    called = {n: f"{n} {words[n].split(',')[0]}" if n in words else n for n in dict.fromkeys(numbers)}
    rows: list[tuple[str, str, Path]] = []
    for number, name in called.items():
        if not (folder := root / "train" / number).is_dir():
            raise UserError(f"{root}: wnids.txt has {number}, and there is no folder {folder}")
        rows += [("train", name, file) for file in images_in(folder)]
    for image, rest in _pairs(root / ANNOTATIONS):
        number = rest.split()[0]
        if number not in called:
            raise UserError(f"{root / ANNOTATIONS}: {image} is of {number}, which wnids.txt does not have")
        rows.append(("val", called[number], root / "val" / "images" / image))
    return _divided(root, list(called.values()), rows)


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    """The first word of each line, and the rest of it."""
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        key, _, value = line.strip().replace("\t", " ", 1).partition(" ")
        if not value.strip():
            raise UserError(f"{file}:{number}: expected two columns, such as '1 001.Albatross/a.jpg', got {line!r}")
        yield key, value.strip()


def _divided(root: Path, classes: list[str], rows: Iterable[tuple[str, str, Path]]) -> Splits:
    """Files by split and class, with all classes in each split in the same order."""
    parts: Splits = {}
    inside, listed = root.resolve(), set()
    for split, name, file in rows:
        if not file.resolve().is_relative_to(inside):
            raise UserError(f"{root}: the lists name {file}, which lies outside of it")
        if not file.is_file():
            raise UserError(f"{root}: the lists name {file}, which is not there")
        if file in listed:
            raise UserError(f"{root}: the lists name {file} twice, and an image may be in one split alone")
        listed.add(file)
        parts.setdefault(split, {name: [] for name in classes})[name].append(file)
    for split in ("train", *(set(parts) - {"train"})):
        if lacking := [name for name in classes if not parts.get(split, {}).get(name)]:
            raise UserError(f"{root}: the lists have no {split} images of the class {lacking[0]!r}")
    return parts

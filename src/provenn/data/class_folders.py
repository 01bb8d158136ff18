"""Folders that hold a sub-folder of files for each class, divided into splits or not."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

from provenn.core import progress
from provenn.core.errors import UserError

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # and the folders' names
Splits = dict[str, dict[str, list[Path]]]  # the files of each class of each split


def given_splits(root: Path, files_in: Callable[[Path], list[Path]], what: str) -> Splits:
    """What a folder holds: the splits that it names, or all of it as `train`.

    Args:
        root: the folder.
        files_in: the files of a class; says what is wrong where there are none.
        what: the files are called, for messages.

    Raises:
        UserError: it is no folder, or holds no folders of classes.
    """
    if not root.is_dir():
        raise UserError(f"{root} is a file: give a folder with one sub-folder of {what} for each class")
    found = {split: [root / name for name in names if (root / name).is_dir()] for split, names in SPLITS.items()}
    parts = {split: _classes(folders[0], files_in, what) for split, folders in found.items() if folders}
    return parts or {"train": _classes(root, files_in, what)}


def sibling_splits(root: Path, files_in: Callable[[Path], list[Path]], what: str) -> Splits:
    """A folder of classes as the test, and the folders of the same classes beside it together to train on.

    Args:
        root: such as one of the sessions that lie in a folder.
        files_in, what: as in `given_splits`.

    Raises:
        UserError: no folder, one without classes, or none beside it.
    """
    test = given_splits(root, files_in, what).get("train", {})
    beside = sorted(f for f in root.resolve().parent.iterdir() if f.is_dir() and not f.name.startswith("."))
    train: dict[str, list[Path]] = {}
    for folder in beside:
        if folder != root.resolve():
            for name, files in _classes(folder, files_in, what).items():
                train.setdefault(name, []).extend(files)
    if not train:
        raise UserError(f"{root} has no folders beside it to train on")
    return {"train": dict(sorted(train.items())), "test": test}


def _classes(folder: Path, files_in: Callable[[Path], list[Path]], what: str) -> dict[str, list[Path]]:
    folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not folders:
        loose = len(files_in(folder))
        raise UserError(f"{folder} holds {loose} {what} and no folders: give each class a folder of its {what}")
    alike: dict[str, str] = {}
    for name in (f.name for f in folders):
        if (other := alike.setdefault(unicodedata.normalize("NFKC", name).strip().casefold(), name)) != name:
            progress.say(
                f"{folder}: {other!r} and {name!r} are two classes, whose names differ by case or blanks alone"
            )
    return {f.name: files_in(f) for f in folders}


def check_splits(root: Path, parts: Splits) -> None:
    """Can a classifier be trained on these?

    Raises:
        UserError: nothing to train on, one class, or a class that some split lacks.
    """
    if "train" not in parts:
        raise UserError(f"{root} holds a folder {next(iter(parts))!r} but none called 'train': add one")
    classes = list(parts["train"])
    if len(classes) == 1:
        raise UserError(f"{root} holds one class, {classes[0]!r}: a classifier needs two or more")
    for split, listed in parts.items():
        if list(listed) != classes:
            odd = sorted(set(listed) ^ set(classes))[0]
            raise UserError(f"{root}: the class {odd!r} is in {'train' if odd in classes else split} alone")

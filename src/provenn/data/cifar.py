"""CIFAR-10 and CIFAR-100 in their binary version: a byte or two of labels, then 3,072 of red, green and blue."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from provenn.core.errors import UserError
from provenn.core.inputs import check_file, read_text

SIDE = 32


class Files(NamedTuple):
    """What a folder of one of the two holds; `labels` bytes stand before each image, the last one is its class."""

    train: tuple[str, ...]
    test: str
    names: str
    labels: int


TEN = Files(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt", 1)
HUNDRED = Files(("train.bin",), "test.bin", "fine_label_names.txt", 2)


class Cifar(NamedTuple):
    """Images and classes, of training and of the test; names of the classes."""

    train: UInt8[np.ndarray, "images 3 32 32"]
    train_labels: Int64[np.ndarray, " images"]
    test: UInt8[np.ndarray, "others 3 32 32"]
    test_labels: Int64[np.ndarray, " others"]
    classes: list[str]


def files_in(folder: Path) -> Files | None:
    """Which of the two a folder holds, by its first file; None for neither."""
    return next((files for files in (TEN, HUNDRED) if (folder / files.train[0]).is_file()), None)


def read_cifar(folder: Path) -> Cifar:
    """The images of a folder of CIFAR's binary files.

    Raises:
        UserError: a missing file, one that is cut off, or a label beyond the classes.
    """
    files = files_in(folder)
    if files is None:
        raise UserError(f"{folder} holds neither {TEN.train[0]} nor {HUNDRED.train[0]}")
    missing = [name for name in (*files.train, files.test) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}")
    count = 10 if files is TEN else 100
    names = _names(folder / files.names, count)
    parts = [_read(folder / name, files.labels, count) for name in (*files.train, files.test)]
    images, labels = zip(*parts)
    return Cifar(np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1], names)


def _read(file: Path, labels: int, classes: int) -> tuple[UInt8[np.ndarray, "images 3 32 32"], np.ndarray]:
    check_file(file)
    content = np.fromfile(file, dtype=np.uint8)
    row = labels + 3 * SIDE * SIDE
    if not len(content) or len(content) % row:
        raise UserError(f"{file} has {len(content):,} bytes: expected a multiple of {row}; is it cut off, or unpacked?")
    rows = content.reshape(-1, row)
    numbers = rows[:, labels - 1].astype(np.int64)
    if numbers.max() >= classes:
        raise UserError(
            f"{file} has the label {numbers.max()} where there are {classes} classes: is it the binary one?"
        )
    return rows[:, labels:].reshape(-1, 3, SIDE, SIDE), numbers


def _names(file: Path, count: int) -> list[str]:
    """The classes' names, or their numbers where they are not given."""
    lines = read_text(file).split() if file.is_file() else []
    return lines if len(lines) == count else [str(number) for number in range(count)]

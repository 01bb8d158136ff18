"""Sequences of tokens with a class each, in the layouts of Long Range Arena and of GenomicsBenchmarks.

- train/CLASS/*.txt, test/CLASS/*.txt: a text or a sequence of nucleotides a file, as IMDB and GenomicsBenchmarks have
  it.
- basic_train.tsv, basic_val.tsv, basic_test.tsv: ListOps, the columns Source and Target.
- imgs/*/*.png, metadata/*.npy: Pathfinder, pixels row by row.
- data_batch_1.bin to test_batch.bin: CIFAR-10, grey pixels row by row.
- new_aan_pairs.train.tsv, .eval.tsv, .test.tsv: Retrieval, without a header: class, two names, two texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import check_file, read_text
from provenn.data.cifar import files_in, read_cifar
from provenn.data.images import read_image

NUCLEOTIDES = "ACGT"
UNSUPERVISED = "unsup"  # IMDB's reviews without a class
LUMA = np.array([0.299, 0.587, 0.114])  # of ITU-R BT.601
BYTES = 256
STREAMED = 1 << 50  # bytes of a file that is read line by line
PAIRS = "new_aan_pairs.{}.tsv"  # as Long Range Arena releases them


@dataclass(frozen=True)
class Sequences:
    """Sequences of one split.

    Args:
        tokens: each of whole numbers below the alphabet's size.
        labels: one each.
        others: the second of each pair, where a class is of two sequences; else none.
    """

    tokens: list[UInt8[np.ndarray, " _"]]
    labels: list[str]
    others: list[UInt8[np.ndarray, " _"]] = field(default_factory=list)

    def pick(self, indices: Sequence[int]) -> "Sequences":
        """The sequences with these indices."""
        others = [self.others[i] for i in indices] if self.others else []
        return Sequences([self.tokens[i] for i in indices], [self.labels[i] for i in indices], others)


@dataclass(frozen=True)
class Corpus:
    """Sequences in their splits: `train` and `test`, and `val` where the data bring one.

    Args:
        splits: by name.
        alphabet: how many kinds of tokens there are.
        about: what they are, in a few words.
    """

    splits: dict[str, Sequences]
    alphabet: int
    about: str

    @property
    def paired(self) -> bool:
        """Whether a class is of two sequences."""
        return any(part.others for part in self.splits.values())


def read_corpus(folder: Path, most: int | None = None) -> Corpus | None:
    """The sequences in a folder, or None where it has none of the layouts.

    Args:
        folder: in one of them.
        most: cut sequences after so many tokens.

    Raises:
        UserError: one of the layouts, with something in it that cannot be read.
    """
    if (folder / "basic_train.tsv").is_file():
        return _listops(folder, most)
    if (folder / PAIRS.format("train")).is_file():
        return _pairs(folder, most)
    if (folder / "imgs").is_dir() and (folder / "metadata").is_dir():
        return _pathfinder(folder, most)
    if files_in(folder) is not None:
        return _pixels(folder, most)
    if all(next((folder / split).glob("*/*.txt"), None) for split in ("train", "test")):
        return _texts(folder, most)
    return None


def _texts(folder: Path, most: int | None) -> Corpus:
    read: dict[str, list[tuple[str, str]]] = {}
    for split in ("train", "test"):
        files = [file for file in sorted((folder / split).glob("*/*.txt")) if file.parent.name != UNSUPERVISED]
        read[split] = [
            (read_text(file).strip(), file.parent.name) for file in progress.track(files, f"reading {split}")
        ]
    if all(set(text.upper()) <= {*NUCLEOTIDES, "N"} for part in read.values() for text, _ in part):
        numbers, alphabet, about = NUCLEOTIDES + "N", len(NUCLEOTIDES) + 1, "nucleotides"
        tokens = {split: [_numbered(text.upper(), numbers, most) for text, _ in part] for split, part in read.items()}
    else:
        alphabet, about = BYTES, "bytes of text"
        tokens = {split: [np.frombuffer(t.encode()[:most], np.uint8) for t, _ in part] for split, part in read.items()}
    for split, part in read.items():
        if not all(text for text, _ in part):
            raise UserError(f"{folder / split} holds an empty text")
    splits = {split: Sequences(tokens[split], [label for _, label in part]) for split, part in read.items()}
    return Corpus(splits, alphabet, about)


def _numbered(text: str, kinds: str, most: int | None) -> UInt8[np.ndarray, " _"]:
    return np.array([kinds.index(kind) for kind in text[:most]], np.uint8)


def _listops(folder: Path, most: int | None) -> Corpus:
    """Nested operations on digits, without the brackets around arguments, which the authors leave out too."""
    words: dict[str, int] = {}
    splits = {}
    for split in ("train", "val", "test"):
        file = folder / f"basic_{split}.tsv"
        if not file.is_file():
            raise UserError(f"{folder} lacks {file.name}")
        header, *lines = read_text(file).rstrip("\n").split("\n")
        if header.rstrip("\r").split("\t") != ["Source", "Target"]:
            raise UserError(f"{file}: expected the columns Source and Target, got {header[:60]!r}")
        tokens, labels = [], []
        for number, line in enumerate(lines, 2):
            source, _, target = line.rstrip("\r").partition("\t")
            kinds = source.replace("(", " ").replace(")", " ").split()[:most]
            if not kinds or not target.strip():
                raise UserError(f"{file}, line {number}: expected operations, a tab and their value")
            tokens.append(np.array([words.setdefault(kind, len(words)) for kind in kinds], np.int64))
            labels.append(target.strip())
        splits[split] = (tokens, labels)
    if len(words) > BYTES:
        raise UserError(f"{folder} has {len(words):,} kinds of tokens: ListOps has about 15")
    made = {name: Sequences([t.astype(np.uint8) for t in tokens], labels) for name, (tokens, labels) in splits.items()}
    return Corpus(made, len(words), "operations on digits")


def _pairs(folder: Path, most: int | None) -> Corpus:
    """Whether one text cites the other. Read line by line: the published files have some gigabytes."""
    splits: dict[str, Sequences] = {}
    for split, name in {"train": "train", "val": "eval", "test": "test"}.items():
        file = folder / PAIRS.format(name)
        first, second, labels = [], [], []
        check_file(file, most=STREAMED)
        try:
            with file.open(encoding="utf-8", newline="\n") as lines:
                for number, line in enumerate(progress.track(lines, f"reading {split}"), 1):
                    parts = line.rstrip("\r\n").split("\t")
                    if len(parts) != 5 or parts[0] not in ("0", "1", "0.0", "1.0") or not all(parts[3:]):
                        raise UserError(
                            f"{file}, line {number}: expected 0.0 or 1.0, two names and two texts between tabs, "
                            f"got {len(parts)} parts, {parts[0][:20]!r} the first"
                        )
                    labels.append(parts[0][0])
                    first.append(np.frombuffer(parts[3].encode()[:most], np.uint8))
                    second.append(np.frombuffer(parts[4].encode()[:most], np.uint8))
        except UnicodeDecodeError:
            raise UserError(f"{file} is no text in UTF-8; convert it first") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
        if not labels:
            raise UserError(f"{file} holds no pairs")
        splits[split] = Sequences(first, labels, second)
    return Corpus(splits, BYTES, "bytes of text, in pairs")


def _pathfinder(folder: Path, most: int | None) -> Corpus:
    """Whether two points are joined; 80 % to train, 10 % each to validate and to test, in the files' order."""
    tokens, labels = [], []
    lines = [line for file in sorted(folder.glob("metadata/*.npy")) for line in read_text(file).split("\n") if line]
    for line in progress.track(lines, "reading images"):
        parts = line.split(" ")
        if len(parts) < 4 or parts[3] not in "01":
            raise UserError(f"{folder}/metadata: expected a folder, a file, a number and 0 or 1, got {line[:60]!r}")
        image = read_image(folder / parts[0] / parts[1]).colour
        tokens.append((image @ LUMA if image.ndim == 3 and image.shape[-1] == 3 else image).round().astype(np.uint8))
        labels.append(parts[3])
    flat = [image.reshape(-1)[:most] for image in tokens]
    cuts = (0, round(0.8 * len(flat)), round(0.9 * len(flat)), len(flat))
    parts_of = {name: slice(*cuts[i : i + 2]) for i, name in enumerate(("train", "val", "test"))}
    return Corpus(
        {name: Sequences(flat[part], labels[part]) for name, part in parts_of.items()}, BYTES, "grey pixels, row by row"
    )


def _pixels(folder: Path, most: int | None) -> Corpus:
    content = read_cifar(folder)

    def grey(images: UInt8[np.ndarray, "images 3 32 32"]) -> list[UInt8[np.ndarray, " _"]]:
        return list(np.tensordot(images, LUMA, (1, 0)).round().astype(np.uint8).reshape(len(images), -1)[:, :most])

    pairs = {"train": (content.train, content.train_labels), "test": (content.test, content.test_labels)}
    splits = {
        name: Sequences(grey(images), [content.classes[label] for label in labels])
        for name, (images, labels) in pairs.items()
    }
    return Corpus(splits, BYTES, "grey pixels, row by row")

"""Sentences, or pairs of them, with a class or a score: GLUE's folders, tables of texts, and docstrings of the library.

A folder holds train.tsv and dev.tsv, of MNLI dev_matched.tsv, without quoting. Which of GLUE's tasks it is, the header
says; CoLA has none, and four columns. The published test.tsv has no labels and is not read. Or it holds train.csv and
test.csv, with columns `text` and `label`, or as AG News has them: without a header a class and texts that belong
together, a title and a description.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from provenn.core.errors import UserError
from provenn.core.inputs import read_text
from provenn.data.text import Document, split_documents, standard_library

DEV = ("dev.tsv", "dev_matched.tsv")
DOCSTRING = re.compile(r'^ *def (\w+\([^()\n]*\)):\n +"""([^"\n]{20,160})', re.MULTILINE)


class Example(NamedTuple):
    """One text or two, and their target: the name of a class, or a score."""

    first: str
    second: str | None
    label: str | float


class Form(NamedTuple):
    """Columns of one of GLUE's tasks, and the metrics that it is judged by (Wang et al., 2018, arXiv:1804.07461)."""

    first: str
    second: str | None
    label: str
    official: tuple[str, ...]


FORMS = {
    "MRPC": Form("#1 String", "#2 String", "Quality", ("accuracy", "f1")),
    "QQP": Form("question1", "question2", "is_duplicate", ("accuracy", "f1")),
    "STS-B": Form("sentence1", "sentence2", "score", ("pearson", "spearman")),
    "MNLI": Form("sentence1", "sentence2", "gold_label", ("accuracy",)),
    "QNLI": Form("question", "sentence", "label", ("accuracy",)),
    "RTE": Form("sentence1", "sentence2", "label", ("accuracy",)),
    "SST-2": Form("sentence", None, "label", ("accuracy",)),
}
COLA = Form("3", None, "1", ("matthews",))  # by number: its files have no header


@dataclass(frozen=True)
class Labelled:
    """Examples for training and for the test.

    Args:
        train, test: in the files' order.
        official: names of the metrics that they are judged by.
        about: what they are, and how many lines were left out.
    """

    train: list[Example]
    test: list[Example]
    official: tuple[str, ...]
    about: str

    @property
    def scored(self) -> bool:
        """Whether the targets are scores and not classes."""
        return "pearson" in self.official


def read_sentences(folder: Path) -> Labelled:
    """The examples of a folder in the layout of GLUE, whose dev.tsv is the test; or of train.csv and test.csv.

    Raises:
        UserError: a file that is missing, is none of GLUE's, or has a line that cannot be read.
    """
    tables = [folder / "train.csv", folder / "test.csv"]
    if all(file.is_file() for file in tables):
        train, test = (_read_table(file) for file in tables)
        return Labelled(train, test, ("accuracy",), f"texts of {len({e.label for e in train})} classes")
    dev = next((folder / name for name in DEV if (folder / name).is_file()), None)
    if not (folder / "train.tsv").is_file() or dev is None:
        raise UserError(
            f"{folder} is no folder of GLUE: expected train.tsv and {' or '.join(DEV)}; nor are there train.csv and "
            "test.csv"
        )
    train, left_out, name, form = _read(folder / "train.tsv")
    test, more, _, other = _read(dev)
    if form != other:
        raise UserError(f"{dev} has other columns than {folder / 'train.tsv'}: expected both of one task")
    lines = f"; {left_out + more} lines with too few columns left out" if left_out + more else ""
    return Labelled(train, test, form.official, f"{name}, a task of GLUE{lines}")


def _read(file: Path) -> tuple[list[Example], int, str, Form]:
    lines = [line.rstrip("\r").split("\t") for line in read_text(file).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty")
    header = lines[0]
    name, form = next(
        (
            (name, form)
            for name, form in FORMS.items()
            if {form.first, form.second or form.first, form.label} <= {*header}
        ),
        ("CoLA", COLA),
    )
    start = 2
    if form is COLA:
        if len(header) != 4 or header[1] not in ("0", "1"):
            raise UserError(f"{file} is of none of GLUE's tasks ({', '.join(FORMS)}, CoLA): it begins {header[:6]}")
        header, lines, start = ["0", "1", "2", "3"], [header, *lines], 0
    columns = [header.index(name) for name in (form.first, form.second or form.first, form.label)]
    examples, left_out = [], 0
    for number, parts in enumerate(lines[1:], start):
        if len(parts) <= max(columns):
            left_out += 1
            continue
        first, second, label = (parts[column].strip() for column in columns)
        target: str | float = label
        if "pearson" in form.official:
            try:
                target = float(label)
            except ValueError:
                raise UserError(f"{file}, line {number}: expected a score, got {label[:40]!r}") from None
        elif not re.fullmatch(r"[a-z_01]{1,20}", label):
            raise UserError(f"{file}, line {number}: expected a class, got {label[:40]!r}")
        examples.append(Example(first, second if form.second else None, target))
    if not examples:
        raise UserError(f"{file} holds no examples")
    return examples, left_out, name, form


def _read_table(file: Path) -> list[Example]:
    """Texts with a class, by the header's `text` and `label`, or in AG News's columns."""
    rows = [row for row in csv.reader(read_text(file).splitlines(keepends=True)) if row]
    header = [name.strip().lower() for name in rows[0]] if rows else []
    named = {"text", "label"} <= {*header}
    twice = next((name for name in ("text", "label") if header.count(name) > 1), None)
    if named and twice is not None:
        raise UserError(f"{file}, row 1: two columns are called {twice!r}")
    examples = []
    for number, row in enumerate(rows[1:] if named else rows, 2 if named else 1):
        if len(row) != len(rows[0]) or len(row) < 2:
            raise UserError(f"{file}, row {number}: expected {max(2, len(rows[0]))} columns, got {len(row)}")
        text = row[header.index("text")] if named else " ".join(row[1:])
        label = (row[header.index("label")] if named else row[0]).strip()
        if not label or not text.strip():
            raise UserError(f"{file}, row {number}: expected a class and a text, got {label[:40]!r} and {text[:40]!r}")
        examples.append(Example(text.strip(), None, label))
    if not examples:
        raise UserError(f"{file} holds no examples")
    return examples


def docstrings() -> list[list[Example]]:
    """Heads of functions with docstrings of their own or of another in the same part, for training, validation, test.

    Whole files are held out. Every second one, drawn once, has the docstring of the function after it.
    """
    parts = []
    for number, part in enumerate(split_documents(standard_library())):
        pairs = [pair for document in part for pair in _heads(document)]
        foreign = np.random.default_rng(number).permutation(len(pairs)) < len(pairs) // 2
        shifted = [*pairs[1:], *pairs[:1]]
        parts.append(
            [
                Example(head, other if swap else own, "other" if swap else "own")
                for (head, own), (_, other), swap in zip(pairs, shifted, foreign)
            ]
        )
    return parts


def _heads(document: Document) -> list[tuple[str, str]]:
    return DOCSTRING.findall(document.text)

"""What comes of a demo: a model applied to what a reader gave, as plain JSON and pictures in the folder at hand.

The `answer` of a task's form (`provenn.tasks.faces.Demo`) is a function from a `Trial` to one of these, by `kind`:

- `classes`: `shares` holds the likeliest classes with their probabilities, and `of` says how many there are. There is
  a `size` where a picture was classified.
- `table`: `columns` and `rows`, each of which begins with a name. `each` says what a row is; `left` rows are left out.
- `text`: `text`.
- `compared`: `before.png` and `after.png` under two `names`, of one `size`, and a line of `text` below.
- `enlarged`, `mask`, `boxes`, `drawing` and `forecast`: as their tasks write them.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import nn

from provenn.core.narrowing import present
from provenn.core.progress import without_controls
from provenn.tasks.base import Task

CLASSES = 10  # that an answer names
ROWS = 50  # of a table


@dataclass(frozen=True)
class Trial:
    """What a reader asks of a model.

    Args:
        task, model, meta: as of `Task.predict`.
        given: the file, under a name that says its type; None where only options are given.
        options: the numbers of the form, and the `classes` that were picked.
        write: is given a text piece by piece, as it comes.
    """

    task: Task
    model: nn.Module
    meta: dict[str, Any]
    given: Path | None
    options: dict[str, Any]
    write: Callable[[str], None]

    @property
    def file(self) -> Path:
        """What was given, where the form takes something."""
        return present(self.given, "given")

    def predict(self, output: Path | None = None, **options: Any) -> str:
        """The task's prediction of the file that was given."""
        return self.task.predict(self.model, self.meta, [self.file], output, **options)


def classify_picture(trial: Trial) -> dict[str, Any]:
    """The likeliest classes of a picture."""
    return {**classify(trial), "size": save_shown(trial.file)}


def classify(trial: Trial) -> dict[str, Any]:
    """The likeliest classes of a file, by a task that writes a table of probabilities."""
    trial.predict(Path("classes.csv"))
    with open("classes.csv", encoding="utf-8", newline="") as file:
        _, row = csv.reader(file)
    shares = sorted(zip(trial.meta["classes"], map(float, row[2:])), key=lambda pair: -pair[1])
    return {"kind": "classes", "shares": shares[:CLASSES], "of": len(shares)}


def write(trial: Trial) -> dict[str, Any]:
    """A text that goes on from the words that were given."""
    text = trial.predict(**trial.options, log=trial.write)
    return {"kind": "text", "text": without_controls(text)}


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, each: str) -> dict[str, Any]:
    """Numbers of several things; `each` says in a word what a row is."""
    shown = [list(row) for row in rows[:ROWS]]
    return {"kind": "table", "columns": list(columns), "rows": shown, "each": each, "left": len(rows) - len(shown)}


def as_shown(file: Path) -> Image.Image:
    """A picture as a browser shows it: turned as its EXIF says, 8 bits, in colour."""
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            image = image.point(lambda value: value / 257).convert("L")
        return image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")


def save_shown(file: Path) -> tuple[int, int]:
    """Keep what was given as `shown.png`; its size."""
    image = as_shown(file)
    image.save("shown.png")
    return image.size

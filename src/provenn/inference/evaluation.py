"""How good a trained model is on data: each metric of its task with an interval, and what classes are taken for."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from provenn.catalog import Card, Preset
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import save_figure, strict_json, write_atomically
from provenn.evidence.interval import Interval, resampled
from provenn.evidence.measurement import Table
from provenn.tasks import face_of
from provenn.tasks.base import LABEL, PREDICTED, HeldOut, Scores, Task, count_examples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS, CLASSES, CONFUSION, PICTURE = "evaluation.json", "classes.csv", "confusion.png", "evaluation.png"
DRAWS = 2000
MOST_CELLS = 30  # classes whose counts are written into the picture
# What presets publish, as our metrics are called.
PUBLISHED = {
    "top-1": "accuracy",
    "top-5": "top5",
    "perplexity": "perplexity",
    "validation perplexity": "perplexity",
    "mIoU": "miou",
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
}


@dataclass(frozen=True)
class Evaluation:
    """What came of it.

    Args:
        title: which model, with which weights.
        about: which examples.
        examples: how many.
        metrics: by name, the task's own first.
        intervals: of 95 % each; None where the examples give none.
        method: how they were computed.
        published: what the paper says of a metric, and of which data.
        classes: names of the classes, where examples have some.
        confusion: (classes, classes) how often the row's class was taken for the column's.
        by_class: columns and rows of the table of classes, where the task makes one of its own.
        figure: draws the task's own picture of them, where it has one.
    """

    title: str
    about: str
    examples: int
    metrics: dict[str, float]
    intervals: dict[str, Interval | None]
    method: str
    published: dict[str, list[str]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    confusion: Int[np.ndarray, "classes classes"] | None = None
    by_class: tuple[list[str], list[list[Any]]] | None = None
    figure: "Callable[[], Figure] | None" = None

    def table(self) -> Table:
        """A row a metric: its value, its interval, and the published figure."""
        rows: list[list[str | float | int | None]] = []
        for name, value in self.metrics.items():
            low, high = self.intervals.get(name) or (None, None)
            row: list[str | float | int | None] = [name.replace("_", " "), value, low, high]
            rows.append([*row, "; ".join(self.published.get(name, []))] if self.published else row)
        columns = ["metric", "value", "from", "to (95 %)", *(["published"] if self.published else [])]
        return Table(caption=f"{self.title}: {self.about}, {self.examples:,} examples", columns=columns, rows=rows)

    def class_table(self, most: int | None = None) -> Table | None:
        """One row for each class, the worst first: its recall, its precision, and what it is most often taken for.

        Args:
            most: so many rows at most.
        """
        if self.by_class is not None:
            columns, rows = self.by_class
            return Table(caption=_worst_first(len(rows), most), columns=columns, rows=rows[:most])
        if self.confusion is None:
            return None
        counts, predicted = self.confusion.sum(1), self.confusion.sum(0)
        right = self.confusion.diagonal()
        rows = []
        # By recall, and among equals by class; `maximum` keeps a class without examples from dividing by 0.
        for index in np.lexsort((np.arange(len(right)), right / np.maximum(counts, 1))).tolist():
            if not counts[index] and not predicted[index]:
                continue
            wrong = self.confusion[index].copy()
            # Right answers aside, the largest of the row is what the class is taken for.
            wrong[index] = 0
            for_what = f"{self.classes[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else ""
            recall = right[index] / counts[index] if counts[index] else None
            precision = right[index] / predicted[index] if predicted[index] else None
            rows.append([self.classes[index], int(counts[index]), recall, precision, for_what])
        columns = ["class", "examples", "recall", "precision", "most often taken for"]
        return Table(caption=_worst_first(len(rows), most), columns=columns, rows=rows[:most])

    def picture(self) -> "Figure | None":
        """The confusion matrix: rows are true classes, columns what they are taken for, colours shares of the row."""
        if self.confusion is None:
            return None
        from matplotlib.figure import Figure

        size = len(self.classes)
        side = min(14.0, 2.5 + 0.32 * size)
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        shares = self.confusion / np.maximum(self.confusion.sum(1, keepdims=True), 1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
        if size <= MOST_CELLS:
            for row, column in np.argwhere(self.confusion > 0).tolist():
                colour = "white" if shares[row, column] > 0.5 else "black"
                text = str(self.confusion[row, column])
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
            axes.set(xticks=range(size), yticks=range(size))
            turn = 60 if max(map(len, self.classes)) > 3 else 0
            axes.set_xticklabels(self.classes, rotation=turn, ha="right" if turn else "center")
            axes.set_yticklabels(self.classes)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(f"{self.title}\n{self.about}: {self.confusion.trace()} of {self.examples} right", fontsize=10)
        return figure

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "title": self.title,
            "about": self.about,
            "examples": self.examples,
            "metrics": self.metrics,
            "intervals": {
                name: None if interval is None else list(interval) for name, interval in self.intervals.items()
            },
            "method": self.method,
            "published": self.published,
            "classes": self.classes,
            "confusion": None if self.confusion is None else self.confusion.tolist(),
        }

    def save(self, folder: Path) -> list[Path]:
        """Write the metrics, and of classes a table and a picture; returns the files."""
        from provenn.core.files import check_writable

        check_writable(folder)
        write_atomically(folder / METRICS, strict_json(self.as_json(), indent=1))
        written = [folder / METRICS]
        table, picture = self.class_table(), self.picture()
        if table is not None:
            write_atomically(folder / CLASSES, _as_csv(table))
            written.append(folder / CLASSES)
        if picture is not None:
            save_figure(picture, folder / CONFUSION)
            written.append(folder / CONFUSION)
        if self.figure is not None:
            save_figure(self.figure(), folder / PICTURE)
            written.append(folder / PICTURE)
        return written


def _worst_first(rows: int, most: int | None) -> str:
    more = f"; {rows - most} more with --out" if most is not None and rows > most else ""
    return f"Classes, the worst first{more}"


def evaluate(
    model: nn.Module,
    task: Task,
    held_out: HeldOut,
    *,
    meta: dict[str, Any] | None = None,
    batch_size: int = 256,
    title: str = "",
    published: dict[str, list[str]] | None = None,
) -> Evaluation:
    """The metrics of a model on examples, each with its interval over them.

    Args:
        model: in eval mode, on the device where it is to run.
        task: whose metrics.
        held_out: what `Task.held_out` gives; or any data set of the task's, in a `HeldOut`.
        meta: the weights' own, for names of classes.
        batch_size: examples at a time.
        title: which model with which weights.
        published: what the paper says of each metric.

    Raises:
        UserError: no examples, examples that do not fit the model, or metrics that are no numbers.
    """
    count = count_examples(held_out.dataset)
    if not count:
        raise UserError(f"{held_out.about} holds no examples")
    try:
        with torch.no_grad():
            # A task that scores no single examples has one figure for all of them, and no interval.
            known = type(task).scores is not Task.scores
            scores = task.scores(model, held_out.dataset, batch_size) if known else {}
            metrics = task.summary(scores) if known else task.evaluate(model, held_out.dataset, batch_size)
    except (IndexError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{held_out.about}: the data do not fit the model: {reason}") from None
    metrics = {task.metric: metrics[task.metric], **metrics} if task.metric in metrics else metrics
    # Of an image that is predicted to the last bit the ratio of signal to noise is infinite; an error never is.
    worst = -math.inf if task.higher_is_better else math.inf
    bad = next((name for name, value in metrics.items() if math.isnan(value) or value == worst), None)
    if bad is not None:
        raise UserError(
            f"{held_out.about}: {bad} is not a finite number: the weights predict values too large, or these data "
            "leave it undefined"
        )
    intervals: dict[str, Interval | None] = dict.fromkeys(metrics)
    method = f"the task {task.name} gives no score of single examples, and so no interval"
    if scores:
        with progress.bar("intervals", DRAWS) as advance:
            intervals, method = resampled(scores, task.summary, overlap=held_out.overlap, draws=DRAWS, advance=advance)
    confusion = _confusion(scores, len((meta or {}).get("classes", []))) if LABEL in scores else None
    classes = list((meta or {}).get("classes", []))
    classes += [f"class {index}" for index in range(len(classes), 0 if confusion is None else len(confusion))]
    by_class = task.class_scores(scores, classes) if scores else None
    face = face_of(task.name)
    draw = None if face.evaluation is None else partial(face.resolve(face.evaluation), model, held_out.dataset, scores)
    return Evaluation(
        title,
        held_out.about,
        count,
        metrics,
        intervals,
        method,
        published or {},
        classes,
        confusion,
        by_class,
        draw,
    )


def _confusion(scores: Scores, classes: int) -> Int[np.ndarray, "classes classes"]:
    size = max(classes, int(scores[LABEL].max()) + 1, int(scores[PREDICTED].max()) + 1)
    # A pair of classes as one number: a count of each is the matrix, row by row, without a loop.
    flat = scores[LABEL].astype(np.int64) * size + scores[PREDICTED].astype(np.int64)
    return np.bincount(flat, minlength=size * size).reshape(size, size)


def published_of(card: Card, preset: Preset) -> dict[str, list[str]]:
    """What the paper says of a preset's metrics: at experiments that name the data, and at the preset."""
    said: dict[str, list[str]] = {}
    for experiment in card.experiments:
        how = experiment.at_paper
        if how is not None and how.preset == preset.name and how.against is None and experiment.published is not None:
            said.setdefault(how.metric, []).append(f"{experiment.published} on {', '.join(how.sets)}")
    for figure in preset.published:
        name = PUBLISHED.get(figure.what)
        if name is not None and not any(text.startswith(f"{figure.value:,.15g} ") for text in said.get(name, [])):
            said.setdefault(name, []).append(str(figure))
    return said


def _as_csv(table: Table) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([["" if cell is None else cell for cell in row] for row in table.rows])
    return text.getvalue()

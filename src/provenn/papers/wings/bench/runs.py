"""The forgetting report of trained weights, as the points of `provenn bench wings --original … --tuned …`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from provenn import catalog
from provenn.core.errors import UserError
from provenn.evidence.measurement import Table
from provenn.evidence.sweep import Point, Row
from provenn.papers.wings.bench.forgetting import ForgettingReport, ModelScores, measure_model
from provenn.tasks import datasets, get_task
from provenn.tasks.multimodal_chat import MultimodalChat, Talks
from provenn.training import weights
from provenn.training.weights import Label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 8  # conversations of each kind in a smoke run


@dataclass(frozen=True)
class Asked:
    """What a report is asked for.

    Args:
        data: conversations, a path or an embedded name, read in the tokens that each model knows.
        texts: conversations whose texts count in place of those in `data`; "" for none.
        task: whose metrics are taken; "" for that of the original's weights.
        device: where the models compute.
        smoke: a few conversations of each kind.
        curves: as in `measure_model`.
        read: options of the task's `held_out`, for `data`.
    """

    data: str
    texts: str
    task: str
    device: str
    smoke: bool
    curves: int
    read: Mapping[str, Any]


def report_points(original: Path, tuned: Sequence[Path], asked: Asked) -> list[Point]:
    """A point for each model: what `measure_model` gives of its weights.

    Args:
        original: a run's folder, or a weight file of ours: the language model before it saw images.
        tuned: of those that were tuned from it, in the order of the report.
        asked: what is asked for.

    Raises:
        UserError: weights without a label, or a task without conversations.
    """
    labels = [label_of(path) for path in (original, *tuned)]
    asked = replace(asked, task=asked.task or labels[0].task)
    if not isinstance(get_task(asked.task), MultimodalChat):
        raise UserError(f"--task {asked.task} has no conversations with images: take multimodal-chat")
    names = ["original", *(path.stem for path in tuned)]
    if len(set(names)) < len(names):
        names = ["original", *map(str, tuned)]
    points = []
    for name, path in zip(names, (original, *tuned)):
        # A run that was trained again is another one.
        written = weights.locate(path).stat().st_mtime_ns
        facts = {"model": name, "weights": str(path), "written": written, **asdict(asked)}
        facts |= facts.pop("read")
        points.append(Point(facts, partial(_measure, name, path, asked), name))
    return points


def label_of(path: Path) -> Label:
    """What a weight file of ours says of itself.

    Raises:
        UserError: it says nothing, or was trained for a task without conversations.
    """
    label = weights.label_of(path)
    if label is None:
        raise UserError(f"{path} names no paper: give a run's folder, or use forgetting_report in Python")
    if not isinstance(get_task(label.task), MultimodalChat):
        raise UserError(f"{path} was trained for {label.task}, which has no conversations with images")
    return label


def load_model(path: Path) -> nn.Module:
    """The model in a weight file of ours, of whichever paper, in eval mode."""
    label = label_of(path)
    card = catalog.card(label.paper)
    facts = card.preset(label.preset)
    model: nn.Module = card.resolve(facts.build)(**{**facts.options, **label.options})
    weights.load_into(model, weights.read(path)[0], str(path))
    return model.eval()


def _measure(name: str, path: Path, asked: Asked) -> dict[str, Any]:
    label = label_of(path)
    chosen: Any = get_task(asked.task)
    seed = label.trained_on.get("seed", 0)

    def talks(source: str, **options: Any) -> Talks:
        held: Talks = chosen.held_out(datasets.resolve(source).data, label.meta, seed=seed, **options).dataset
        return held

    shown = talks(asked.data, **asked.read)
    said = talks(asked.texts, whole=True) if asked.texts else shown
    if asked.smoke:
        said, shown = _few(said), _few(shown)
    model, sees = load_model(path).to(asked.device), name != "original"
    scores = measure_model(name, model, said, shown, task=asked.task, curves=asked.curves, sees=sees)
    return {"status": "ok", "scores": scores.model_dump()}


def _few(talks: Talks) -> Talks:
    """The first conversations of each kind."""
    kept = [
        [talk for talk, encoded in zip(talks.conversations, talks.encoded) if bool(encoded.images) is seen][:FEW]
        for seen in (False, True)
    ]
    return Talks([*kept[0], *kept[1]], talks.meta, talks.pictures)


def report_tables(rows: Sequence[Row]) -> list[Table]:
    """The report's tables."""
    return _report(rows).tables()


def draw_report(rows: Sequence[Row]) -> "Figure | None":
    """The report's picture."""
    return _report(rows).picture()


def _report(rows: Sequence[Row]) -> ForgettingReport:
    original, *tuned = (ModelScores.model_validate(row["scores"]) for row in rows)
    return ForgettingReport(original=original, tuned=tuned)

"""The forgetting report: texts, images and attention of a language model and of what was tuned from it."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.files import atomic_write, save_figure
from provenn.evidence.measurement import Part, Table
from provenn.nn.decoder import Decoder
from provenn.nn.vision_language import ImageChat, VisionLanguageModel, spread_placeholders
from provenn.papers.wings.adapter import wings_blocks
from provenn.papers.wings.laws import Laws, attention_laws, laws_with_learners, learner_weights, shift_of
from provenn.tasks import Task, get_task
from provenn.tasks.base import device_of
from provenn.tasks.multimodal_chat import Talks, stack_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = 64  # conversations with an image of which the attention is read
FILES = ("forgetting.csv", "attention.png")
COLOURS = {"before": "#1a5fb4", "image": "#777777", "after": "#e01b24"}
Cell = str | float | int | None


class Curves(Part):
    """Shares of attention by layer, mean over conversations (MLLM-Laws, equation 1).

    Args:
        before, image, after: of the text before the first image, of images, and of the text after the first image.
        r: Pearson's r over layers of before and after, mean over conversations. The attention shift is 1 − r.
    """

    before: list[float]
    image: list[float]
    after: list[float]
    r: float


class ModelScores(Part):
    """What a report has of one model.

    Args:
        name: what the report calls it.
        texts: metrics on conversations without an image.
        pictures: on those with one; empty where the model is not asked about images.
        counts: conversations without an image, with one, and of the curves.
        main: curves of the main attention; None without images.
        with_learners: of the main attention and the learners together; None where there are no learners.
        router: of each layer the mean weights of the visual and the textual learner, over tokens and conversations;
            None for a layer without learners. Empty where there are none.
    """

    name: str
    texts: dict[str, float]
    pictures: dict[str, float]
    counts: tuple[int, int, int]
    main: Curves | None = None
    with_learners: Curves | None = None
    router: list[tuple[float, float] | None]


class ForgettingReport(Part):
    """Scores and attention of a language model, and of what was tuned from it on images.

    Args:
        original: the language model, on texts alone.
        tuned: each way of tuning, on texts and on images.
    """

    original: ModelScores
    tuned: list[ModelScores]

    def __str__(self) -> str:
        return "\n".join(table.markdown() for table in self.tables())

    def tables(self) -> list[Table]:
        """Texts, images, the correlations, and the attention of each model by layer."""
        models = [self.original, *self.tuned]
        columns = ["metric", self.original.name]
        for model in self.tuned:
            columns += [model.name, f"{model.name} − {self.original.name}"]
        rows: list[list[Cell]] = []
        for metric, score in self.original.texts.items():
            row: list[Cell] = [metric, _short(score)]
            for model in self.tuned:
                if metric in model.texts:
                    row += [_short(model.texts[metric]), _short(model.texts[metric] - score)]
                else:
                    row += ["", ""]
            rows.append(row)
        tables = [Table(caption=f"{models[0].counts[0]:,} conversations without an image", columns=columns, rows=rows)]
        seeing = [model for model in self.tuned if model.pictures]
        if not seeing:
            return tables
        metrics = list(dict.fromkeys(metric for model in seeing for metric in model.pictures))
        rows = [[m, *(_short(model.pictures[m]) if m in model.pictures else "" for model in seeing)] for m in metrics]
        names = [model.name for model in seeing]
        tables.append(
            Table(caption=f"{seeing[0].counts[1]:,} conversations with images", columns=["metric", *names], rows=rows)
        )
        rows = [
            [model.name, _short(model.main.r), "" if model.with_learners is None else _short(model.with_learners.r)]
            for model in seeing
            if model.main is not None
        ]
        caption = (
            f"Pearson's r of attention before and after the image, over layers, {seeing[0].counts[2]} conversations"
        )
        tables.append(Table(caption=caption, columns=["model", "main attention", "with the learners"], rows=rows))
        return [*tables, *(_by_layer(model) for model in seeing if model.main is not None)]

    def picture(self) -> "Figure | None":
        """Shares of attention over layers, a panel for each model and each way to read it; None without images."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        panels = []
        for model in self.tuned:
            if model.main is not None:
                panels.append((model.name, model.main))
            if model.with_learners is not None:
                panels.append((f"{model.name}, with the learners", model.with_learners))
        if not panels:
            return None
        figure = Figure(figsize=(3.4 * max(2, len(panels)), 3.4), layout="constrained")
        for axes, (title, curves) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
            layers = range(1, len(curves.before) + 1)
            for name, colour in COLOURS.items():
                axes.plot(layers, getattr(curves, name), ".-", color=colour, label=name)
            axes.set_title(f"{title}\nr = {curves.r:.3f}", fontsize=9)
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.axes[0].set(ylabel="share of attention", ylim=(0, 1))
        figure.axes[0].legend(fontsize=8)
        return figure

    def save(self, folder: str | Path) -> list[Path]:
        """Write forgetting.csv, a line for each number, and attention.png where there are images; returns both."""
        files = [Path(folder) / name for name in FILES]
        files[0].parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(files[0]) as temporary, temporary.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(["model", "part", "layer", "quantity", "value"])
            for model in (self.original, *self.tuned):
                writer.writerows([model.name, *row] for row in _lines(model))
        figure = self.picture()
        if figure is None:
            return files[:1]
        save_figure(figure, files[1])
        return files


def forgetting_report(
    original: nn.Module,
    tuned: Mapping[str, nn.Module],
    texts: Talks,
    pictures: Talks | None = None,
    *,
    task: str | Task = "multimodal-chat",
    curves: int = CURVES,
) -> ForgettingReport:
    """What tuning on images cost a language model, and where attention went.

    Args:
        original: the language model before it saw images: a `Decoder`, or an `ImageChat`, of which the text is asked.
        tuned: models that read images, by the name that the report has for each, such as plain tuning and Wings.
        texts: conversations as the task reads them; those without an image count. `task.held_out(path, meta).dataset`
            and the splits of `task.load(path)` are such.
        pictures: conversations of which those with an image count. Default: those among `texts`.
        task: whose metrics are taken: multimodal-chat or visual-question-answering.
        curves: how many conversations with an image have their attention read, the first ones.

    Raises:
        UserError: no conversation without an image, or a tuned model that reads none.
    """
    first = measure_model("original", original, texts, task=task, sees=False)
    others = [measure_model(name, model, texts, pictures, task=task, curves=curves) for name, model in tuned.items()]
    return ForgettingReport(original=first, tuned=others)


def measure_model(
    name: str,
    model: nn.Module,
    texts: Talks,
    pictures: Talks | None = None,
    *,
    task: str | Task = "multimodal-chat",
    curves: int = CURVES,
    sees: bool = True,
) -> ModelScores:
    """One model's part of a report. Models of different tokenizers have data of their own each.

    Args:
        name: what the report calls it.
        model, texts, pictures, task, curves: as in `forgetting_report`.
        sees: whether it is asked about images.

    Raises:
        UserError: as in `forgetting_report`.
    """
    if curves < 1:
        raise ValueError(f"curves must be at least 1, got {curves}")
    chosen = get_task(task) if isinstance(task, str) else task
    said, shown = divide_talks(texts)
    if pictures is not None:
        shown = divide_talks(pictures)[1]
    if not len(said):
        raise UserError("the data has no conversation without an image, which is what forgetting is measured on")
    if isinstance(model, Decoder):
        model = ImageChat(VisionLanguageModel(model, image_token=said.chat_tokens.image))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            scores = chosen.evaluate(model, said)
            if not sees or not len(shown):
                return ModelScores(name=name, texts=scores, pictures={}, counts=(len(said), 0, 0), router=[])
            if not isinstance(model, ImageChat):
                raise UserError(f"{name}: curves of attention need an ImageChat, got {type(model).__name__}")
            seen = chosen.evaluate(model, shown)
            main, added, router = read_attention(model, [shown[row] for row in range(min(curves, len(shown)))])
    finally:
        model.train(training)
    counts = (len(said), len(shown), min(curves, len(shown)))
    return ModelScores(
        name=name, texts=scores, pictures=seen, counts=counts, main=main, with_learners=added, router=router
    )


def divide_talks(talks: Talks) -> tuple[Talks, Talks]:
    """Conversations in which no image is read, and those in which one is."""
    parts = [
        [talk for talk, encoded in zip(talks.conversations, talks.encoded) if bool(encoded.images) is seen]
        for seen in (False, True)
    ]
    said, shown = (Talks(part, talks.meta, talks.pictures) for part in parts)
    return said, shown


def read_attention(
    model: ImageChat, examples: Sequence[tuple[list[Tensor], Tensor, Tensor]]
) -> tuple[Curves, Curves | None, list[tuple[float, float] | None]]:
    """Curves of the main attention, those with the learners, and the mean weights of the learners by layer.

    Args:
        model: in eval mode.
        examples: images, tokens and targets of each conversation, each with an image.

    Raises:
        UserError: a conversation whose images have several sizes.
    """
    inner, here = model.model, device_of(model)
    learned = bool(wings_blocks(inner))
    mains: list[Laws] = []
    wholes: list[Laws] = []
    routers: list[list[Tensor | None]] = []
    for images, tokens, _ in examples:
        given = stack_images([image.to(here) for image in images])
        if not isinstance(given, Tensor):
            raise UserError("curves of attention need the images of a conversation in one size: read them with fit=pad")
        _, sizes = inner.features(given)
        spread, _, _ = spread_placeholders(tokens[None].to(here), inner.image_token, sizes)
        mains.append(attention_laws(inner, spread, given))
        if learned:
            wholes.append(laws_with_learners(inner, spread, given))
            reading = inner.read(spread, given, layers=True)
            found = [learner_weights(inner, reading, layer) for layer in range(len(inner.decoder.blocks))]
            routers.append([None if each is None else each.router[0].mean(dim=0).double() for each in found])
    router: list[tuple[float, float] | None] = []
    for weights in zip(*routers):
        there = [each for each in weights if each is not None]
        mean = torch.stack(there).mean(dim=0).tolist() if there else None
        router.append(None if mean is None else (mean[0], mean[1]))
    return _averaged(mains), _averaged(wholes) if learned else None, router


def _averaged(laws: Sequence[Laws]) -> Curves:
    """The mean over conversations, one in each of these."""
    before, image, after = (torch.cat(part, dim=1).double().mean(dim=1).tolist() for part in zip(*laws))
    r = torch.cat([1 - shift_of(each).double() for each in laws]).mean().item()
    return Curves(before=before, image=image, after=after, r=r)


def _by_layer(model: ModelScores) -> Table:
    """Shares of attention and the learners' mean weights, a row a layer."""
    columns = ["layer", *COLOURS]
    parts = [model.main]
    if model.with_learners is not None:
        columns += [f"{name}, with the learners" for name in COLOURS] + ["visual weight", "textual weight"]
        parts.append(model.with_learners)
    rows: list[list[Cell]] = []
    for layer in range(len(model.main.before) if model.main is not None else 0):
        row: list[Cell] = [layer + 1]
        row += [_short(getattr(curves, name)[layer]) for curves in parts if curves is not None for name in COLOURS]
        if model.with_learners is not None:
            weights = model.router[layer]
            row += ["", ""] if weights is None else [_short(weight) for weight in weights]
        rows.append(row)
    return Table(caption=f"{model.name}: shares of attention", columns=columns, rows=rows)


def _lines(model: ModelScores) -> list[list[Cell]]:
    """Part, layer, quantity and value of each number."""
    lines: list[list[Cell]] = [["texts", "", metric, score] for metric, score in model.texts.items()]
    lines += [["pictures", "", metric, score] for metric, score in model.pictures.items()]
    for part, curves in (("main attention", model.main), ("with the learners", model.with_learners)):
        if curves is not None:
            lines.append([part, "", "r", curves.r])
            lines += [[part, k + 1, name, v] for name in COLOURS for k, v in enumerate(getattr(curves, name))]
    for layer, weights in enumerate(model.router):
        if weights is not None:
            lines += [["router", layer + 1, name, v] for name, v in zip(("visual weight", "textual weight"), weights)]
    return lines


def _short(value: float) -> str:
    return f"{value:.4g}"

"""What every kind of work offers: data in, loss, metric, picture, prediction."""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from provenn.core.errors import UserError
from provenn.data.tables import check_table, write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IGNORED = -100  # the target of a token that nothing is asked of; the loss is the mean over all others
Scores = dict[str, Shaped[np.ndarray, "examples ..."]]  # of each example, by name
# Columns of a classifier's scores: the true and the predicted class of each example.
LABEL, PREDICTED = "label", "told"


@dataclass(frozen=True)
class TaskData:
    """A data set, split, with what models and predictions need to know of it.

    Args:
        name: the embedded name, or the path that was read.
        train, val, test: map-style data sets of whatever the task's loss takes, before batching.
        fingerprint: a checksum of the content.
        options: keyword arguments that a preset needs to fit the data, such as `num_classes`.
        meta: plain JSON that prediction needs, such as class names; saved with the weights.
        collate: joins examples to a batch; torch's own by default.
        about: one sentence for the report: what the data is and what it is not.
    """

    name: str
    train: Dataset
    val: Dataset
    test: Dataset
    fingerprint: str
    options: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    collate: Callable | None = None
    about: str = ""

    def __digest__(self) -> tuple[Any, ...]:
        """What stands for the data in a digest: the checksum of its content, not every number again."""
        return self.fingerprint, self.options, self.meta, self.collate


@dataclass(frozen=True)
class HeldOut:
    """Examples to test a trained model on.

    Args:
        dataset: map-style, as the splits of `TaskData`.
        about: what they are, in a few words.
        overlap: how many examples in a row may share what they are judged by, as windows of one series do.
    """

    dataset: Dataset
    about: str
    overlap: int = 1


@dataclass(frozen=True)
class Portable:
    """A system to be written as an ONNX file, and what the file is compared with.

    Args:
        system: what runs, in eval mode, from what a user has to what a user wants.
        example: its inputs by name, as keyword arguments; a batch has two examples.
        outputs: names of what it returns, in its order.
        open_sizes: of each input the dimensions whose size stays open, each by a name, such as {"image": {0: "batch"}}.
        least: the smallest size of a name, where it is not 1.
        traced: sizes by name to trace the system at, once for each; by default those of the example. None of them is 1
            anywhere on the way through the network: a tracer takes a size of 1 for a rule.
        predict: what `Task.predict` computes of the same inputs; by default the system itself. For an output of
            indices it gives the scores, with one dimension more: an index is right where its score is the highest.
    """

    system: nn.Module
    example: dict[str, Tensor]
    outputs: list[str]
    open_sizes: dict[str, dict[int, str]] = field(default_factory=dict)
    least: dict[str, int] = field(default_factory=dict)
    traced: Sequence[Mapping[str, int]] = ()
    predict: Callable[..., Tensor | Sequence[Tensor]] | None = None


FACES = {"predict", "portable", "calibration", "class_scores", "picture", "embedded", "reads", "made_by"}


class Task(ABC):
    """One kind of work. A module in `provenn.tasks`, or a paper's `task.py`, defines one and calls it `TASK`.

    What a system is given is a tensor, or has several parts: a tuple of positional or a dict of keyword arguments;
    `call` hands them to the model. Batches may nest tensors as they like.
    """

    name: str
    metric: str
    higher_is_better: bool
    embedded: dict[str, str]  # name of each embedded data set, and a sentence about it
    reads: str  # what a path may hold, in one phrase
    takes_words: bool = False  # whether `predict` takes words besides files
    meta_schema: type[BaseModel] | None = None  # what the meta of its data must be
    augments: bool = False  # whether its batches are images and their classes, which a recipe may augment and mix
    overrules: bool = False  # whether its loss is taken even where a system brings its own
    smooths: bool = False  # whether `loss` takes the share of label smoothing as a third argument
    divides_tokens: bool = False  # whether its batches are tokens and targets, each token's loss by itself: see IGNORED
    needs_inputs: bool = True  # whether `predict` has nothing to do without any
    into_folders: bool = False  # whether `predict` writes a file for each input, to a folder where one is given
    made_by: str = ""  # what makes the embedded data, where that takes a minute and more than reading

    def __digest__(self) -> tuple[Any, ...]:
        """The whole task but what faces its users: what it writes, draws and says decides no value of a training."""
        kind = type(self)
        names = (name for name in dir(kind) if name not in FACES and not (name.startswith("__") or name == "_abc_impl"))
        return *((name, inspect.getattr_static(kind, name)) for name in sorted(names)), sorted(vars(self).items())

    @abstractmethod
    def load(self, source: str | Path, *, seed: int = 0, **options: Any) -> TaskData:
        """The embedded data set of that name, or the user's data at that path.

        Raises:
            UserError: neither; or data that cannot be read, in one line that says what was wrong and where.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, for training."""

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """What the metrics follow from, a row an example. The model is in eval mode, without gradients.

        Where examples have classes, the columns include `LABEL` and `PREDICTED`.
        """
        raise TypeError(f"the task {self.name} defines neither scores nor evaluate")

    def summary(self, scores: Scores) -> dict[str, float]:
        """Metrics of the examples with these scores, `self.metric` among them: by default the mean of each column."""
        return {name: float(column.mean()) for name, column in scores.items() if name not in (LABEL, PREDICTED)}

    def class_scores(self, scores: Scores, classes: Sequence[str]) -> tuple[list[str], list[list[Any]]] | None:
        """Columns and rows of a table of classes, the worst first. None: it follows from `LABEL` and `PREDICTED`."""
        return None

    def evaluate(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> dict[str, float]:
        """Metrics of the whole data set, `self.metric` among them. The model is in eval mode, without gradients."""
        return self.summary(self.scores(model, dataset, batch_size))

    def held_out(
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, whole: bool = True, **options: Any
    ) -> HeldOut:
        """Examples to test a trained model on, read as its meta says: in its classes, its scale, its tokens.

        Args:
            source: as in `load`.
            meta: what was saved with the weights, or `default_meta`.
            seed: of the split.
            whole: take all of the user's data where they come without a split of their own. Without it, take the part
                that `load` holds out for the test: a model that was trained on the same data has not seen it.
            options: as in `load`.

        Raises:
            UserError: data that cannot be read, or that the model does not fit.
        """
        data = self.load(source, seed=seed, **options)
        return HeldOut(data.test, f"the test split of {data.name}")

    @abstractmethod
    def dummy_baseline(self, data: TaskData) -> float:
        """`self.metric` on the test split, of the simplest rule that is fitted by counting.

        It is fitted on the training split: the commonest class, counts of pairs of tokens, the last value. A model
        that does no better is below the dummy baseline, and nothing is concluded from it.
        """

    def seen(self, data: TaskData, examples: int, seed: int) -> TaskData:
        """The data whose training split has as many examples as a training sees, for a dummy baseline that gets better
        with more; by default all of them.

        Args:
            data: of the training.
            examples: steps times the size of a batch.
            seed: of the choice.
        """
        return data

    # Any: words, of a task that takes them.
    def predict(self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Any], output: Path | None) -> str:
        """Apply a trained model to files; write `output` where one is given; return text for the terminal.

        Raises:
            UserError: the task has no prediction, or the files cannot be read.
        """
        raise UserError(
            f"{self.name} predicts nothing: `provenn train` and `provenn evaluate` report how well a model does"
        )

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """The model as `provenn export` writes it, where the task can say.

        Raises:
            UserError: it cannot.
        """
        raise UserError(
            "only systems that take images, sounds or stacks of layers can be exported; these weights are for "
            f"{self.name}"
        )

    def calibration(
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, options: dict[str, Any] | None = None
    ) -> TaskData:
        """Data whose training examples say which range each activation of an int8 file has.

        The first entry of an example is an image, standardised as `meta` says: what `portable` calls `image`.

        Args:
            source, seed, options: as in `load`.
            meta: what was saved with the weights.

        Raises:
            UserError: no file of this task can be quantised, or data that the model does not fit.
        """
        raise UserError(f"--int8 is for classifiers and segmenters of images; these weights are for {self.name}")

    def example(self, file: Path, meta: dict[str, Any]) -> Any:
        """What a model sees of one file, as a batch of one, where the task can say.

        Raises:
            UserError: it cannot, or the file cannot be read.
        """
        raise UserError(f"{self.name} makes no input of a single file that could be inspected")

    def check_meta(self, meta: dict[str, Any], source: str) -> None:
        """Hold the meta of a weight file to `meta_schema`.

        Raises:
            UserError: a key or a value does not fit. The message names it and `source`.
        """
        if self.meta_schema is None:
            return
        try:
            self.meta_schema.model_validate(meta)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(["meta", *(str(part) for part in first["loc"])])
            raise UserError(f"{source}: its label cannot be read: {key}: {first['msg']}") from None

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        """What prediction assumes of weights that carry no meta of their own (an author's checkpoint)."""
        return {}

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """A picture of what the model does, where the task has one."""
        return None

    def _named(self, source: str | Path) -> str | Path:
        """An embedded name as it is, anything else as a path. A path that does not exist is an error."""
        if isinstance(source, str) and source in self.embedded:
            return source
        path = Path(source)
        if not path.exists():
            raise UserError(
                f"no data at {str(source)!r}: give a path to {self.reads}, "
                f"or an embedded data set: {', '.join(self.embedded)}"
            )
        return path


def fingerprint(*parts: np.ndarray | Tensor | bytes | str) -> str:
    """A short checksum of data.

    >>> fingerprint("a") == fingerprint("a"), fingerprint("a") == fingerprint("b")
    (True, False)
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().numpy()
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            part = np.ascontiguousarray(part).tobytes()
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


CUT = 0.15  # of the training examples, for each split that the user's own data lack


def check_share(share: float) -> None:
    """Can this share of the training examples be cut off?

    Raises:
        UserError: it is none, or leaves less than half to train on where two splits are cut off.
    """
    if not 0 < share <= 0.25:
        raise UserError(f"val_share must be more than 0 and at most 0.25, got {share}")


def split_indices(count: int, shares: Sequence[float], seed: int = 0) -> list[list[int]]:
    """Shuffle `range(count)` and cut it by shares that sum to one.

    >>> [len(part) for part in split_indices(10, (0.6, 0.2, 0.2))]
    [6, 2, 2]
    """
    order = np.random.default_rng(seed).permutation(count)
    cuts = np.round(np.cumsum(shares)[:-1] * count).astype(int)
    return [part.tolist() for part in np.split(order, cuts)]


def blind_accuracy(train: Int[Tensor, " examples"], test: Int[Tensor, " others"]) -> float:
    """The share of test labels that are predicted right without any input.

    The better of two predictors: one always says the commonest label of training, the other guesses evenly. In a small
    test split of a balanced set the first may be below the second. Then the second is the dummy baseline.

    >>> blind_accuracy(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1, 1]))
    0.75
    >>> blind_accuracy(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0, 0]))
    0.5
    """
    commonest = (test == train.bincount().argmax()).double().mean().item()
    return max(commonest, 1 / len(train.unique()))


SHOWN = 20  # lines of predictions in the terminal


def report_classes(
    predictions: Iterable[tuple[str, Sequence[float]]],
    classes: Sequence[str],
    inputs: Iterable[Path],
    output: Path | None,
) -> str:
    """The likeliest classes of each prediction, a line each; a table gets the probability of every class.

    Args:
        predictions: the name of each input, and the probability of each class.
        classes: what they are called.
        inputs: what was given, which the table must not overwrite.
        output: of the table, a .csv.
    """
    check_table(output, inputs)
    rows = list(predictions)
    if output is not None:
        table: list[Sequence[str | float]] = [[name, classes[int(np.argmax(row))], *row] for name, row in rows]
        write_table(output, ["file", "label", *classes], table)
    lines = []
    for name, row in rows[:SHOWN]:
        best = np.argsort(row)[::-1][:5]
        lines.append(f"{name}: " + ", ".join(f"{classes[i]} {row[i]:.1%}" for i in best))
    if len(rows) > SHOWN:
        lines.append(f"and {len(rows) - SHOWN} more{'' if output else '; -o FILE.csv writes them all'}")
    return "\n".join([*lines, *([f"wrote {output}"] if output else [])])


def count_examples(dataset: Dataset) -> int:
    """How many examples a map-style data set has."""
    return len(dataset)  # type: ignore[arg-type]  # it has a length, torch's type of data sets does not say so


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights lie."""
    return next(model.parameters(), torch.empty(0)).device


def join_scores(names: Sequence[str], rows: Sequence[Sequence[Tensor]]) -> Scores:
    """The scores of a data set from those of its batches, each a column a name.

    >>> join_scores(["right"], [[torch.tensor([1.0])], [torch.tensor([0.0, 1.0])]])
    {'right': array([1., 0., 1.], dtype=float32)}
    """
    columns = [torch.cat(column).detach().cpu().numpy() for column in zip(*rows)]
    return dict(zip(names, columns, strict=True))


def batches(dataset: Dataset, batch_size: int, device: torch.device, collate: Callable | None = None) -> Iterator[Any]:
    """A data set in order, as batches on the device: lists of tensors, or whatever the examples nest.

    Args:
        collate: joins examples to a batch; torch's own by default.
    """
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collate):
        yield tree_map_only(Tensor, lambda part: part.to(device), batch)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model of what it is given: a tensor, a tuple of positional or a dict of keyword arguments.

    >>> call(nn.Bilinear(2, 3, 1), (torch.zeros(4, 2), torch.zeros(4, 3))).shape
    torch.Size([4, 1])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)

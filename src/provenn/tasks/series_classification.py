"""Series in, a class out: UCR and UEA sets, and the user's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from provenn.core.errors import UserError
from provenn.data.frames import ENGINES
from provenn.data.sequences import Corpus, Sequences, read_corpus
from provenn.data.series import FORMATS, Collection, bundled, read_series
from provenn.data.tables import Reading, check_reading, check_table, write_table
from provenn.tasks.base import (
    LABEL,
    PREDICTED,
    HeldOut,
    Scores,
    Task,
    TaskData,
    batches,
    blind_accuracy,
    device_of,
    fingerprint,
    join_scores,
    split_indices,
)
from provenn.tasks.meta import LabelledSeries

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARCHIVE = {
    "japanese-vowels": ("JapaneseVowels", "who of 9 speakers says a vowel: 12 cepstral channels, 7 to 29 steps"),
    "basic-motions": ("BasicMotions", "4 activities from a watch: 6 channels, 100 steps"),
    "arrow-head": ("ArrowHead", "3 kinds of arrow heads by their outline: 251 steps"),
    "italy-power-demand": ("ItalyPowerDemand", "a day's electricity demand, October to March or April on: 24 steps"),
    "gun-point": ("GunPoint", "a hand that draws a gun or points: 150 steps"),
    "osu-leaf": ("OSULeaf", "6 kinds of leaves by their outline: 427 steps"),
    "acsf1": ("ACSF1", "10 kinds of household appliances by their power: 1460 steps"),
}
CUT = (0.6, 0.2, 0.2)  # of the user's series, for training, validation and test
SHOWN = 20  # lines of predictions in the terminal


class Tokens(Dataset):
    """Sequences of tokens as series: a channel for each kind of token, which is 1 where the token is of that kind.

    An item is (values (tokens, channels), length, class); of pairs ((2, tokens, channels), (2,), class).

    Args:
        sequences: of one split.
        classes: what labels are called.
        length: tokens of the longest.
        alphabet: kinds of tokens.
    """

    def __init__(self, sequences: Sequences, classes: Sequence[str], length: int, alphabet: int):
        self.sequences, self.others = sequences.tokens, sequences.others
        self.length, self.alphabet = length, alphabet
        self.labels = torch.tensor([classes.index(label) for label in sequences.labels])

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "*pair tokens channels"], Tensor, Tensor]:
        x, count = self._padded(self.sequences[index])
        if self.others:
            other, other_count = self._padded(self.others[index])
            x, count = torch.stack([x, other]), torch.stack([count, other_count])
        return x, count, self.labels[index]

    def _padded(self, sequence: UInt8[np.ndarray, " _"]) -> tuple[Float[Tensor, "tokens channels"], Tensor]:
        tokens = torch.from_numpy(sequence.astype(np.int64))
        x = F.pad(F.one_hot(tokens, self.alphabet).float(), (0, 0, 0, self.length - len(tokens)))
        return x, torch.tensor(len(tokens))


class SeriesClassification(Task):
    """A dataset's items are (values (tokens, channels) padded with zeros, count of valid tokens, class).

    Where a class is of two sequences, values are (2, tokens, channels) and counts (2,), and a system is built with
    `pairs=True`.
    """

    name = "series-classification"
    meta_schema = LabelledSeries
    metric = "accuracy"
    higher_is_better = True
    embedded = {name: about for name, (_, about) in ARCHIVE.items()}  # noqa: RUF012
    reads = (
        f"{FORMATS}; a folder with one NAME_TRAIN and one NAME_TEST file of these; or a folder of sequences of tokens, "
        "with train/CLASS/*.txt and test/CLASS/*.txt, of ListOps, of Pathfinder or of Retrieval"
    )

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        validation: float | int = 0.2,
        longest: int | None = None,
        **reading: Unpack[Reading],
    ) -> TaskData:
        """The archive's own split where there is one, else 60 % train, 20 % validation, 20 % test, class by class.

        Args:
            source: an embedded name or a path.
            seed: of the split.
            validation: share of the archive's training split to hold out; 0 leaves all of it for training.
            longest: of sequences of tokens, cut them after so many.
            reading: options of a file, where it does not show them itself.

        Raises:
            UserError: no such data, or data without labels, with one class, or with too few series.
        """
        check_reading(self.name, reading, "validation", "longest")
        if longest is not None and longest < 1:
            raise UserError(f"longest must be at least 1 token, got {longest}")
        location = self._named(source)
        corpus = read_corpus(location, longest) if isinstance(location, Path) and location.is_dir() else None
        if corpus is not None:
            return _of_tokens(str(source), corpus, validation, seed)
        if longest is not None:
            raise UserError(f"longest is of sequences of tokens; {source} holds series: leave it out")
        read = [_labelled(file, reading) for file in self._files(source)]
        if len(read) == 2:
            train_all, test = read
            fit, validate = _stratified(train_all.labels or [], (1.0 - validation, float(validation)), seed)
            train, val = _pick(train_all, fit), _pick(train_all, validate)
        else:
            parts = _stratified(read[0].labels or [], CUT, seed)
            train, val, test = (_pick(read[0], part) for part in parts)
        if not test.series or (validation and not val.series):
            raise UserError(f"{source} holds {len(read[0].series)} series: too few for a split; expected 5 a class")
        return _prepare(str(source), train, val, test, self.embedded.get(str(source), "the user's own series"))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the classes, in nats."""
        x, lengths, classes = batch
        return F.cross_entropy(_logits(model, x, lengths), classes)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Whether each series is classified right, and the cross-entropy in nats."""
        rows = []
        for x, lengths, classes in batches(dataset, batch_size, device_of(model)):
            logits = _logits(model, x, lengths).float()
            predicted = logits.argmax(-1)
            entropy = F.cross_entropy(logits, classes, reduction="none")
            rows.append([(predicted == classes).double(), entropy.double(), classes, predicted])
        names = ("accuracy", "cross_entropy", LABEL, PREDICTED)
        return join_scores(names, rows)

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        **reading: Unpack[Reading],
    ) -> HeldOut:
        """As in `Task`; of an archive's pair of files the test file."""
        location = self._named(source)
        corpus = read_corpus(location, meta["length"]) if isinstance(location, Path) and location.is_dir() else None
        if corpus is not None:
            return _held_out_tokens(str(source), corpus, meta)
        files = self._files(source)
        test = _labelled(files[-1], reading)
        which = f"the test split of {source}" if len(files) == 2 else f"all of {source}"
        if len(files) == 1 and not whole:
            test = _pick(test, _stratified(test.labels or [], CUT, seed)[2])
            which = f"the test split of {source}"
        _check_fits(files[-1], test, meta)
        unknown = set(test.labels or []) - set(meta["classes"])
        if unknown:
            raise UserError(
                f"{files[-1]}: the model knows no label {min(unknown)!r}; it knows: {', '.join(meta['classes'])}"
            )
        labels = torch.tensor([meta["classes"].index(label) for label in test.labels or []]).long()
        return HeldOut(TensorDataset(*_padded(test, meta), labels), which)

    def _files(self, source: str | Path) -> list[Path]:
        """One file, or those of training and of the test."""
        location = self._named(source)
        if location == source and isinstance(source, str) and source in ARCHIVE:
            stem = ARCHIVE[source][0]
            return [bundled(f"{stem}/{stem}_{split}.ts") for split in ("TRAIN", "TEST")]
        return _files(Path(location))

    def dummy_baseline(self, data: TaskData) -> float:
        """Accuracy without a look at the series: the commonest class, or a guess."""
        cpu = torch.device("cpu")
        labels = (
            part.labels if isinstance(part, Tokens) else torch.cat([classes for *_, classes in batches(part, 256, cpu)])
            for part in (data.train, data.test)
        )
        return blind_accuracy(*labels)

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        channels = options["channels"]
        return {
            "classes": [str(i) for i in range(options["num_classes"])],
            "length": options["length"],
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
        }

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        **reading: Unpack[Reading],
    ) -> str:
        """Label every series of the files, with the probability of each class."""
        check_table(output, inputs)
        rows: list[list[str | float]] = []
        for file in inputs:
            collection = read_series(file, **reading)
            _check_fits(file, collection, meta)
            x, lengths = _padded(collection, meta)
            dataset = TensorDataset(x, lengths)
            with torch.no_grad():
                parts = [_logits(model, *batch).softmax(-1).cpu() for batch in batches(dataset, 256, device_of(model))]
            for name, shares in zip(collection.names, torch.cat(parts).tolist()):
                best = int(np.argmax(shares))
                rows.append([str(file), name, meta["classes"][best], shares[best], *shares])
        if output is not None:
            write_table(output, ["file", "series", "label", "probability", *meta["classes"]], rows)
        lines = [f"{name}  series {series}  {label}  {share:.3f}" for name, series, label, share, *_ in rows[:SHOWN]]
        if len(rows) > SHOWN:
            lines.append(f"and {len(rows) - SHOWN} more{'' if output else '; -o FILE.csv writes them all'}")
        return "\n".join([*lines, *([f"wrote {output}"] if output else [])])

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """Which classes are confused, and how much of a series must be seen before its class is known."""
        from matplotlib.figure import Figure

        device, names = device_of(model), data.meta["classes"]
        shares = np.linspace(0.1, 1, 10)
        seen = [0] * len(shares)
        confused = np.zeros((len(names), len(names)))
        with torch.no_grad():
            for x, lengths, classes in batches(data.test, 256, device):
                for i, share in enumerate(shares):
                    predicted = _logits(model, x, (lengths * share).ceil().long()).argmax(-1)
                    seen[i] += int((predicted == classes).sum())
                np.add.at(confused, (classes.cpu().numpy(), predicted.cpu().numpy()), 1)
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        image = left.imshow(confused / np.maximum(confused.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, ax=left, label="share of the true class")
        for row, column in np.argwhere(confused > 0):
            dark = confused[row, column] > confused[row].sum() / 2
            text = f"{confused[row, column]:.0f}"
            left.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
        turn = 60 if max(map(len, names)) > 3 else 0
        left.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="predicted", ylabel="true")
        left.set_xticklabels(names, rotation=turn, ha="right" if turn else "center")
        left.set_yticklabels(names)
        left.set_title(f"{data.name}: {np.trace(confused):.0f} of {confused.sum():.0f} right")
        right.plot(shares * 100, np.asarray(seen) / confused.sum(), marker="o")
        right.axhline(confused.sum(1).max() / confused.sum(), color="gray", linestyle="--", label="the commonest class")
        right.set(xlabel="part of the series seen, %", ylabel="test accuracy", ylim=(0, 1.02), xlim=(0, 103))
        right.set_title("How early is the class known?")
        right.grid(alpha=0.3)
        right.legend(loc="lower right")
        return figure


TASK = SeriesClassification()


def _logits(
    model: nn.Module, x: Float[Tensor, "batch *pair tokens channels"], lengths: Int[Tensor, " batch *pair"]
) -> Float[Tensor, "batch classes"]:
    longest = int(lengths.max())
    mask: Bool[Tensor, "batch *pair tokens"] = torch.arange(longest, device=x.device) < lengths[..., None]
    return model(x[..., :longest, :], mask)


def _of_tokens(name: str, corpus: Corpus, validation: float | int, seed: int) -> TaskData:
    """Sequences in their own splits; what is validated with is held out of the training where the data bring none."""
    splits = dict(corpus.splits)
    if "val" not in splits:
        train = splits["train"]
        parts = _stratified(train.labels, (1.0 - validation, float(validation)), seed)
        splits["train"], splits["val"] = (train.pick(part) for part in parts)
    classes = sorted(set(splits["train"].labels))
    unknown = {label for part in splits.values() for label in part.labels} - set(classes)
    if unknown or len(classes) < 2:
        what = f"the label {min(unknown)!r} occurs in no training sequence" if unknown else "there is one class alone"
        raise UserError(f"{name}: {what}: expected every class, two or more, in training")
    length = max(len(tokens) for part in splits.values() for tokens in (*part.tokens, *part.others))
    sets = {split: Tokens(part, classes, length, corpus.alphabet) for split, part in splits.items()}
    meta = {
        "classes": classes,
        "length": length,
        "mean": [0.0] * corpus.alphabet,
        "std": [1.0] * corpus.alphabet,
        **({"pairs": True} if corpus.paired else {}),
    }
    parts_of: list[Any] = [part for split in sets.values() for part in (*split.sequences, *split.others, split.labels)]
    options = {"channels": corpus.alphabet, "num_classes": len(classes), "length": length}
    if corpus.paired:
        options["pairs"] = True
    sizes = ", ".join(f"{len(part):,} {split}" for split, part in sets.items())
    about = f"sequences of up to {length:,} {corpus.about}: {sizes}"
    return TaskData(name, sets["train"], sets["val"], sets["test"], fingerprint(*parts_of), options, meta, about=about)


def _held_out_tokens(name: str, corpus: Corpus, meta: dict[str, Any]) -> HeldOut:
    test = corpus.splits["test"]
    if corpus.alphabet != len(meta["mean"]):
        raise UserError(f"{name} has {corpus.alphabet} kinds of tokens, the model was trained on {len(meta['mean'])}")
    if corpus.paired != meta.get("pairs", False):
        one, two = ("pairs of sequences", "single ones") if corpus.paired else ("single sequences", "pairs")
        raise UserError(f"{name} holds {one}, the model was trained on {two}")
    unknown = set(test.labels) - set(meta["classes"])
    if unknown:
        raise UserError(f"{name}: the model knows no label {min(unknown)!r}; it knows: {', '.join(meta['classes'])}")
    return HeldOut(Tokens(test, meta["classes"], meta["length"], corpus.alphabet), f"the test split of {name}")


def _files(path: Path) -> list[Path]:
    """The one file, or the archive's pair in a folder."""
    if not path.is_dir():
        return [path]
    by_split = [sorted(f for f in path.iterdir() if f.stem.upper().endswith(end)) for end in ("_TRAIN", "_TEST")]
    # The UCR archive ships each set in several formats: the first that there is a pair of is read.
    for suffix in (".ts", ".tsv", ".csv", *ENGINES):
        pairs = [[f for f in files if f.suffix == suffix] for files in by_split]
        if [len(files) for files in pairs] == [1, 1]:
            return [files[0] for files in pairs]
    raise UserError(
        f"{path} holds no pair of NAME_TRAIN and NAME_TEST as .ts, .tsv, .csv, .xlsx or .parquet: "
        "give a file, or one pair"
    )


def _labelled(file: Path, reading: Reading) -> Collection:
    collection = read_series(file, **reading)
    if collection.labels is None:
        raise UserError(f"{file} has no labels: training needs them; expected {FORMATS}")
    return collection


def _pick(collection: Collection, indices: Sequence[int]) -> Collection:
    labels = collection.labels or []
    return Collection(
        [collection.series[i] for i in indices], [collection.names[i] for i in indices], [labels[i] for i in indices]
    )


def _stratified(labels: Sequence[str], shares: Sequence[float], seed: int) -> list[list[int]]:
    """Indices of each part, every class cut by the same shares, in the file's order."""
    parts: list[list[int]] = [[] for _ in shares]
    for number, label in enumerate(sorted(set(labels))):
        members = [i for i, other in enumerate(labels) if other == label]
        for part, chosen in zip(parts, split_indices(len(members), shares, seed + 1000 * number)):
            part.extend(members[i] for i in chosen)
    return [sorted(part) for part in parts]


def _prepare(name: str, train: Collection, val: Collection, test: Collection, about: str) -> TaskData:
    train_labels = set(train.labels or [])
    classes = sorted(
        train_labels, key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label)
    )
    if len(classes) < 2:
        raise UserError(f"every training series of {name} has the label {classes[0]!r}: expected two classes or more")
    for part in (val, test):
        unknown = set(part.labels or []) - train_labels
        if unknown:
            raise UserError(
                f"{name}: the label {min(unknown)!r} occurs in no training series: expected it in both splits"
            )
    channels = train.series[0].shape[1]
    other = next((s.shape[1] for s in test.series if s.shape[1] != channels), channels)
    if other != channels:
        raise UserError(f"{name}: test series have {other} channels where training series have {channels}")
    steps = np.concatenate(train.series).astype(np.float64)
    std = steps.std(0)
    meta = {
        "classes": classes,
        "length": max(len(s) for part in (train, val, test) for s in part.series),
        "mean": steps.mean(0).tolist(),
        "std": np.where(std > 1e-8, std, 1.0).tolist(),
    }
    sets = []
    for part in (train, val, test):
        x, lengths = _padded(part, meta)
        sets.append(
            TensorDataset(x, lengths, torch.tensor([classes.index(label) for label in part.labels or []]).long())
        )
    options = {"channels": channels, "num_classes": len(classes), "length": meta["length"]}
    marks = [tensor for dataset in sets for tensor in dataset.tensors]
    return TaskData(name, sets[0], sets[1], sets[2], fingerprint(*marks), options, meta, about=about)


def _padded(
    collection: Collection, meta: dict[str, Any]
) -> tuple[Float[Tensor, "batch tokens channels"], Int[Tensor, " batch"]]:
    """Standardised by the training split's mean and deviation, then padded with zeros."""
    x = np.zeros((len(collection.series), meta["length"], len(meta["mean"])), dtype=np.float32)
    for row, values in zip(x, collection.series):
        row[: len(values)] = (values - np.asarray(meta["mean"])) / np.asarray(meta["std"])
    return torch.from_numpy(x), torch.tensor([len(values) for values in collection.series]).long()


def _check_fits(file: Path, collection: Collection, meta: dict[str, Any]) -> None:
    if meta.get("pairs"):
        raise UserError(f"{file}: the model was trained on pairs of sequences, and files of series hold single ones")
    channels = collection.series[0].shape[1]
    if channels != len(meta["mean"]):
        raise UserError(f"{file}: series of {channels} channels, the model was trained on {len(meta['mean'])}")
    for name, values in zip(collection.names, collection.series):
        if len(values) > meta["length"]:
            raise UserError(
                f"{file}: series {name} has {len(values)} steps, the model was trained on up to {meta['length']}: "
                "cut or resample it"
            )

"""Stacks of pooled layers to classes: what the paper's decoders are trained on."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

from provenn import progress
from provenn.errors import UserError
from provenn.papers.gaam.model import StackEncoder
from provenn.papers.gaam.probe import (
    StackFile,
    fingerprint_of_weights,
    load_encoder,
    load_tokenizer,
    pooled_layers,
    read_stacks,
    write_stacks,
)
from provenn.tasks import (
    Task,
    TaskData,
    batches,
    count_examples,
    device_of,
    fingerprint,
    get_task,
    join_scores,
    split_indices,
)
from provenn.tasks.base import LABEL, TOLD, HeldOut, Portable, blind_accuracy, tell_classes
from provenn.tasks.meta import Finite, Meta, Names, Positive
from provenn.training import Recipe, fit

CUT = (0.7, 0.15, 0.15)  # of the user's stacks
HIDDEN = 0.4  # share of frames that an encoder has to rebuild
PATCH = 8  # pixels of a side
READ, BYTES = 256, 12  # of a text, and of a cut from it
PRETRAINING = Recipe(epochs=1000, max_steps=300, batch_size=32, lr=2e-3, schedule="onecycle", clip=1.0)
SIZES = {"train": 1500, "val": 400, "test": 800}


class Sequences(NamedTuple):
    """Frames of one split, how many of each are real, and classes."""

    frames: Float[Tensor, "examples tokens channels"]
    lengths: Int[Tensor, " examples"]
    labels: Int[Tensor, " examples"]


class RebuiltFrames(Task):
    """A `StackEncoder` rebuilds frames that are hidden from it: items are (frames, count of frames).

    Args:
        discrete: whether a frame is one of so many, as a byte is; it is told by cross-entropy then, else in squares.
    """

    name = "rebuilt-frames"
    metric = "error"
    higher_is_better = False
    embedded: dict[str, str] = {}  # noqa: RUF012
    reads = "nothing: it is handed frames"

    def __init__(self, discrete: bool = False):
        self.discrete = discrete

    def load(self, source: str | Path, *, seed: int = 0, **options: Any) -> TaskData:
        raise UserError(f"{self.name} reads nothing")

    def _errors(self, model: Any, batch: Any, hide: Tensor) -> tuple[Tensor, Tensor]:
        x, lengths = batch
        mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        told, hide = model.rebuild(x, mask, hide & mask), hide & mask
        if self.discrete:
            error = F.cross_entropy(told.flatten(0, 1), x.argmax(-1).flatten(), reduction="none").view(hide.shape)
        else:
            error = (told - x).square().mean(dim=-1)
        return torch.where(hide, error, 0).sum(dim=1), hide.sum(dim=1)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean error over frames that are hidden at random."""
        x, _ = batch
        error, count = self._errors(model, batch, torch.rand(x.shape[:2], device=x.device) < HIDDEN)
        return error.sum() / count.sum().clamp(min=1)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Any:
        """The error over every third frame, which is hidden."""
        rows = []
        for x, lengths in batches(dataset, batch_size, device_of(model)):
            hide = (torch.arange(x.shape[1], device=x.device) % 3 == 1).expand(x.shape[:2])
            error, count = self._errors(model, (x, lengths), hide)
            rows.append([error / count.clamp(min=1)])
        return join_scores(["error"], rows)

    def trivial(self, data: TaskData) -> float:
        """The mean square of standardised frames; of bytes the evenest guess."""
        frames = data.test.tensors[0]  # type: ignore[attr-defined]  # a TensorDataset
        return float(torch.tensor(float(frames.shape[-1])).log() if self.discrete else frames.square().mean())


# What encoders are pre-trained on: each gives the sequences of its three splits, and what classes are called.


def vowel_frames(seed: int, smoke: bool) -> tuple[list[Sequences], list[str]]:
    sizes = {"examples": 40, "test_examples": 20} if smoke else {"examples": 1500, "test_examples": 800}
    data = get_task("audio-classification").load("vowels", seed=seed, **sizes)
    parts = [Sequences(*part.tensors) for part in (data.train, data.val, data.test)]  # type: ignore[attr-defined]
    return parts, data.meta["classes"]


def patch_frames(seed: int, smoke: bool) -> tuple[list[Sequences], list[str]]:
    data = get_task("image-classification").load("patches", seed=seed, size=32)
    parts = []
    for split in SIZES:
        images, labels = _few(getattr(data, split), 40 if smoke else SIZES[split], seed).tensors
        rows = F.unfold(images, PATCH, stride=PATCH).mT.contiguous()
        parts.append(Sequences(rows, torch.full((len(rows),), rows.shape[1]), labels))
    return parts, data.meta["classes"]


def text_frames(seed: int, smoke: bool) -> tuple[list[Sequences], list[str]]:
    """Twelve bytes from anywhere in the head of a function, or in the first line of a docstring."""
    data = get_task("text-classification").load("stdlib-docstrings", seed=seed, length=READ)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for split in SIZES:
        tokens, which, counts, _ = _few(getattr(data, split), 20 if smoke else SIZES[split] // 2, seed).tensors
        cuts, labels = [], []
        for row, of, count in zip(tokens, which, counts.tolist()):
            for label in (0, 1):
                text = row[:count][of[:count] == label]
                if len(text) >= BYTES:
                    start = int(torch.randint(len(text) - BYTES + 1, (), generator=generator))
                    cuts.append(text[start : start + BYTES])
                    labels.append(label)
        frames = F.one_hot(torch.stack(cuts), 256).float()
        parts.append(Sequences(frames, torch.full((len(cuts),), BYTES), torch.tensor(labels)))
    return parts, ["head", "docstring"]


def _few(dataset: Dataset, count: int, seed: int) -> TensorDataset:
    """Some of the examples, drawn from the seed, as whole tensors."""
    size = count_examples(dataset)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: min(count, size)]
    columns = zip(*(dataset[i] for i in order.tolist()))
    return TensorDataset(*(torch.stack([torch.as_tensor(value) for value in column]) for column in columns))


SOURCES: dict[str, tuple[Callable[[int, bool], tuple[list[Sequences], list[str]]], bool]] = {
    "vowels": (vowel_frames, False),
    "patches": (patch_frames, False),
    "docstrings": (text_frames, True),
}


@lru_cache(maxsize=8)  # every arm of a study asks for the same
def pretrained_stacks(source: str, seed: int, smoke: bool = False) -> TaskData:
    """Stacks of a small Transformer that learned to rebuild the training sequences' frames, and then is frozen.

    It sees no class. Stacks are standardised, feature by feature, by those of training.
    """
    make, discrete = SOURCES[source]
    parts, classes = make(seed, smoke)
    train, val, test = (TensorDataset(part.frames, part.lengths) for part in parts)
    recipe = Recipe(epochs=1, max_steps=2) if smoke else PRETRAINING
    channels = parts[0].frames.shape[-1]
    data = TaskData(source, train, val, test, fingerprint=fingerprint(*(part.lengths for part in parts)))
    done = fit(
        lambda: StackEncoder(channels), RebuiltFrames(discrete), data, recipe, seed=seed, title=f"encoder of {source}"
    )
    stacks = [(encode(done.model, part), part.labels) for part in parts]
    about = f"six layers of a small Transformer, pre-trained on {source} and frozen"
    return stack_data(source, stacks, classes, about)


@torch.no_grad()
def encode(encoder: nn.Module, part: Sequences) -> Float[Tensor, "examples layers dim"]:
    """The stack of every sequence."""
    rows = []
    for x, lengths in batches(TensorDataset(part.frames, part.lengths), 256, torch.device("cpu")):
        rows.append(encoder(x, torch.arange(x.shape[1]) < lengths[:, None]))
    return torch.cat(rows)


def stack_data(name: str, parts: Sequence[tuple[Tensor, Tensor]], classes: Sequence[str], about: str) -> TaskData:
    """Stacks of three splits with their classes, standardised by those of training."""
    known = parts[0][0]
    mean, std = known.mean(dim=0), known.std(dim=0, correction=0)
    std = torch.where(std > 1e-6, std, 1.0)
    train, val, test = (TensorDataset((stacks - mean) / std, labels) for stacks, labels in parts)
    meta = {"classes": list(classes), "mean": mean.tolist(), "std": std.tolist()}
    options = {"num_classes": len(classes), "layers": known.shape[1], "dim": known.shape[2]}
    marks = [tensor for part in (train, val, test) for tensor in part.tensors]
    return TaskData(name, train, val, test, fingerprint(*marks), options, meta, about=about)


# What a frozen encoder of the user's reads: sounds, images or texts, each in the splits that its own task makes.

BATCH = 16  # examples that an encoder sees at once
CACHE = "PROVENN_CACHE"


Pairs = Any  # Sequence[tuple[Any, int]], or a data set of such: what is read, and its class


class Readings(NamedTuple):
    """Examples of the three splits, each with its class, and how some of them become what an encoder takes."""

    classes: list[str]
    parts: Sequence[Pairs]
    inputs: Callable[[list[Any]], dict[str, Tensor]]


class Reading(NamedTuple):
    """How data are read for an encoder: see `LayerStacks.load`."""

    seconds: float | int | None = 5
    length: int = 512
    siblings: bool = False
    examples: int | None = None

    def check(self) -> None:
        """Raises UserError: a number out of its range."""
        if self.seconds is not None and not 0 < self.seconds < 3600:
            raise UserError(f"seconds must be more than 0 and less than an hour, got {self.seconds}")
        for name, value in (("length", self.length), ("examples", self.examples)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")


class UserEncoder:
    """A frozen encoder from a folder of Hugging Face, and how it takes files of its kind.

    Args:
        folder: with config.json and weights, and what was saved with them: the tokenizer of a language model, and
            preprocessor_config.json of others, by which sounds and images are standardised.

    Raises:
        UserError: no such folder, or an encoder that takes other things.
    """

    def __init__(self, folder: Path):
        self.folder, self.model = folder, load_encoder(folder)
        self.takes = str(getattr(self.model, "main_input_name", ""))
        kinds = {"input_values": self._sounds, "pixel_values": self._images, "input_ids": self._texts}
        if self.takes not in kinds:
            raise UserError(f"{folder} takes {self.takes or 'nothing'!r}: expected an encoder of {', '.join(kinds)}")
        self.read = kinds[self.takes]
        file = folder / "preprocessor_config.json"
        try:
            self.settings: dict[str, Any] = dict(json.loads(file.read_text("utf-8"))) if file.is_file() else {}
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _sounds(self, source: Path, seed: int, how: Reading) -> Readings:
        classes, parts = _audio().files(source, seed=seed, siblings=how.siblings)
        return Readings(classes, parts, lambda files: self._heard(files, how))

    def _heard(self, files: list[Path], how: Reading) -> dict[str, Tensor]:
        rate = int(self.settings.get("sampling_rate", 16_000))
        waves = [_audio().waveform(file, rate, how.seconds) for file in files]
        if self.settings.get("do_normalize", True):
            waves = [(wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt() for wave in waves]
        return {"input_values": nn.utils.rnn.pad_sequence(waves, batch_first=True), "attention_mask": _real(waves)}

    def _images(self, source: Path, seed: int, how: Reading) -> Readings:
        config: Any = self.model.config
        data = get_task("image-classification").load(source, seed=seed, size=int(config.image_size))
        for part in (data.train, data.val, data.test):
            part.meta, part.augment = self._seen(data.meta), False  # type: ignore[attr-defined]  # of files or CIFAR's
        return Readings(data.meta["classes"], [data.train, data.val, data.test], _pixels)

    def _seen(self, meta: dict[str, Any]) -> dict[str, Any]:
        config: Any = self.model.config
        half = [0.5] * 3
        scale = {"mean": self.settings.get("image_mean") or half, "std": self.settings.get("image_std") or half}
        return {**meta, **scale, "size": int(config.image_size), "channels": 3}

    def _texts(self, source: Path, seed: int, how: Reading) -> Readings:
        content = get_task("text-classification").sentences(source)  # type: ignore[attr-defined]  # that task's own
        if content.scored:
            raise UserError(f"{source} tells scores: expected classes")
        classes = sorted({str(example.label) for example in (*content.train, *content.test)})
        rows = [
            [("\n".join(filter(None, (e.first, e.second))), classes.index(str(e.label))) for e in part]
            for part in (content.train, content.test)
        ]
        kept, held = split_indices(len(rows[0]), (1 - CUT[1], CUT[1]), seed)
        parts: list[Pairs] = [[rows[0][i] for i in kept], [rows[0][i] for i in held], rows[1]]
        return Readings(classes, parts, self._tokens(how.length))

    def _tokens(self, length: int) -> Callable[[list[str]], dict[str, Tensor]]:
        tokenizer = load_tokenizer(self.folder)

        def inputs(texts: list[str]) -> dict[str, Tensor]:
            rows = [torch.tensor(tokenizer(text, truncation=True, max_length=length)["input_ids"]) for text in texts]
            return {"input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True), "attention_mask": _real(rows)}

        return inputs

    def stacks(self, items: Sequence[Any], inputs: Callable[[list[Any]], dict[str, Tensor]]) -> Tensor:
        """The pooled layers of all items."""
        self.model.to(self.device)
        rows = []
        starts = range(0, len(items), BATCH)
        for start in progress.track(starts, "reading layers", total=len(starts)):
            part = [items[place] for place in range(start, min(start + BATCH, len(items)))]
            given = {name: value.to(self.device) for name, value in inputs(part).items()}
            try:
                rows.append(pooled_layers(self.model, **given).cpu())
            except (RuntimeError, ValueError, IndexError) as error:
                line = str(error).strip().splitlines()[0][:160]
                raise UserError(f"{self.folder} cannot read item {start + 1} of the data: {line}") from None
        return torch.cat(rows)

    def stack_of(self, file: Path, how: Reading) -> Float[Tensor, "1 layers dim"]:
        """The pooled layers of one file: a sound, an image or a text."""
        if self.takes == "input_values":
            return self.stacks([file], lambda files: self._heard(files, how))
        if self.takes == "pixel_values":
            return self.stacks([get_task("image-classification").example(file, self._seen({}))[0]], _pixels)
        try:
            return self.stacks([file.read_text("utf-8")], self._tokens(how.length))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as a text: {error}") from None


def _audio() -> Any:  # whose `files` and `waveform` other tasks have not
    return get_task("audio-classification")


def _real(rows: Sequence[Tensor]) -> Int[Tensor, "rows longest"]:
    """1 where a padded row is real."""
    return nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)


def _pixels(images: list[Tensor]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack(images)}


@lru_cache(maxsize=2)  # gigabytes are not loaded again for each file
def user_encoder(folder: Path) -> UserEncoder:
    """The encoder of a folder."""
    return UserEncoder(folder)


def extracted(source: Path, folder: Path, how: Reading) -> StackFile:
    """The stacks of the user's files, from where they were kept when the same encoder read the same files alike.

    Where they have no splits of their own, these are drawn once, whatever the seed of a training. Stacks are kept in
    the folder of the environment variable PROVENN_CACHE, or in ~/.cache/provenn.

    Raises:
        UserError: an encoder or data that cannot be read, or data of another kind than the encoder's.
    """
    how.check()
    encoder = user_encoder(folder.resolve())
    mark = fingerprint_of_weights(encoder.model)
    sizes = [f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in sorted(_files_of(source, how)) if f.is_file()]
    asked = [mark, str(source.resolve()), repr(how), json.dumps(encoder.settings, sort_keys=True), *sizes]
    name = hashlib.sha256("\0".join(asked).encode()).hexdigest()[:24]
    root = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "provenn")
    file = root / "stacks" / f"{name}.safetensors"
    if file.is_file():
        return read_stacks(file)
    readings = encoder.read(source, 0, how)
    features, labels, splits = [], [], []
    for number, part in enumerate(readings.parts):
        order = np.arange(len(part))
        if how.examples is not None:
            order = np.random.default_rng(0).permutation(len(part))[: how.examples]
        pairs = _Picked(part, order.tolist())
        features.append(encoder.stacks(pairs, readings.inputs))
        labels.append(torch.tensor(pairs.labels))
        splits.append(torch.full((len(pairs),), number))
    content = StackFile(torch.cat(features), torch.cat(labels).long(), readings.classes, torch.cat(splits), mark)
    write_stacks(file, content)
    progress.say(f"the layers of {source} are kept in {file}")
    return content


def _files_of(source: Path, how: Reading) -> list[Path]:
    place = source.resolve().parent if how.siblings else source
    return [place] if place.is_file() else [*place.rglob("*")]


class _Picked(Sequence):
    """What is read of some examples; their classes are noted as they pass, so that none is read twice."""

    def __init__(self, part: Pairs, order: list[int]):
        self.part, self.order, self.labels = part, order, [0] * len(order)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: Any) -> Any:
        what, self.labels[place] = self.part[self.order[place]]
        return what


class Stacks(Meta):
    """What is kept beside weights: mean and deviation of every layer and feature, and whose layers they are."""

    classes: Names
    mean: list[list[Finite]]
    std: list[list[Positive]]
    encoder: str | None = None
    encoder_mark: str | None = None
    seconds: float | int | None = None
    length: int | None = None


class StandardClassifier(nn.Module):
    """A decoder with what its stacks go through before it.

    Shapes: stacks (batch, layers, dim), as the encoder gives them, to probabilities (batch, classes).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, meta: dict[str, Any]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(meta["mean"]))
        self.register_buffer("std", torch.tensor(meta["std"]))

    def forward(self, stacks: Float[Tensor, "batch layers dim"]) -> Float[Tensor, "batch classes"]:
        return self.model((stacks - self.mean) / self.std).softmax(dim=1)


class LayerStacks(Task):
    """Items are (stack (layers, dim), class): of each layer of an encoder the mean over its tokens."""

    name = "layer-stacks"
    meta_schema = Stacks
    metric = "accuracy"
    higher_is_better = True
    embedded = {  # noqa: RUF012
        "vowels": "six layers of a small Transformer that learned to rebuild synthesised vowels: which vowel?",
        "patches": "six layers of one that learned to rebuild patches of photographs: which photograph?",
        "docstrings": "six layers of one that learned to rebuild bytes: head of a function, or docstring?",
    }
    made_by = "a small Transformer that is pre-trained first, a minute of a core"
    reads = (
        "a .safetensors file of stacks, as LayerStackProbe.extract writes it; or, with encoder=FOLDER of Hugging Face, "
        "a folder of WAV files or images a class, or one with train.csv and test.csv of texts"
    )

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        encoder: str | None = None,
        seconds: float | int | None = 5,
        length: int = 512,
        siblings: bool = False,
        validate_on_test: bool = False,
        examples: int | None = None,
    ) -> TaskData:
        """Stacks of an encoder that is pre-trained first, which takes a minute, or the user's own.

        Args:
            source: "vowels", "patches" or "docstrings"; a file of stacks, cut into 70, 15 and 15 % where it tells no
                splits; or what `encoder` reads, in the splits that the task of sounds, images or texts makes.
            seed: of what is drawn, or of a file's split.
            encoder: a folder of Hugging Face: WavLM and its like for sounds, BEiT for images, Llama for texts.
            seconds: of sounds, after which they are cut.
            length: tokens of a text at most.
            siblings: of sounds: the folder is the test, and the folders beside it are trained on.
            validate_on_test: train on what would validate too, and validate on the test, as the authors' scripts do.
            examples: of each split at most.

        Raises:
            UserError: no such data, a file that holds no stacks, one class or too few, or an encoder that cannot be
                read.
        """
        place = self._named(source)
        if isinstance(place, str):
            if encoder is not None:
                raise UserError(f"{place} come with an encoder of their own: leave encoder out, or give files")
            return pretrained_stacks(place, seed)
        how = Reading(seconds, length, siblings, examples)
        content = _content(place, encoder, how)
        stacks, labels, classes = content.stacks, content.labels, content.classes
        if len(classes) < 2:
            raise UserError(f"{place} holds one class, {classes[0]!r}: a classifier needs two or more")
        if len(stacks) < 10:
            raise UserError(f"{place} holds {len(stacks)} stacks: too few for a split, expected at least 10")
        chosen = _splits_of(content, seed)
        if validate_on_test:
            chosen = [[*chosen[0], *chosen[1]], chosen[2], chosen[2]]
        data = stack_data(str(place), [(stacks[part], labels[part]) for part in chosen], classes, "the user's own")
        if encoder is not None:
            whose = {"encoder": str(Path(encoder).resolve()), "encoder_mark": content.encoder}
            data.meta.update(whose, seconds=seconds, length=length)
        return data

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the classes, in nats."""
        stacks, labels = batch
        return F.cross_entropy(model(stacks), labels)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Any:
        """Whether each stack is classified right."""
        rows = []
        for stacks, labels in batches(dataset, batch_size, device_of(model)):
            logits = model(stacks).float()
            told = logits.argmax(-1)
            entropy = F.cross_entropy(logits, labels, reduction="none")
            rows.append([(told == labels).double(), entropy.double(), labels, told])
        return join_scores(("accuracy", "cross_entropy", LABEL, TOLD), rows)

    def held_out(
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, whole: bool = True, **options: Any
    ) -> HeldOut:
        """As in `Task`; stacks are standardised as the weights say, and read of files by the encoder that they name."""
        place = self._named(source)
        if isinstance(place, str):
            return HeldOut(self.load(place, seed=seed).test, f"the test split of {place}")
        content = _content(place, meta.get("encoder") if place.is_dir() else None, _reading(meta, options))
        labels, classes = content.labels, content.classes
        known = meta.get("classes", classes)
        unknown = next((name for name in classes if name not in known), None)
        if unknown is not None:
            raise UserError(f"{place}: the model knows no class {unknown!r}; it knows: {', '.join(known[:12])}")
        stacks = _standard(content.stacks, meta, place)
        numbers = torch.tensor([known.index(name) for name in classes])[labels]
        if whole and (content.splits is None or (place.is_dir() and not _comes_in_splits(place))):
            return HeldOut(TensorDataset(stacks, numbers), f"all of {place}")
        part = _splits_of(content, seed)[2]
        return HeldOut(TensorDataset(stacks[part], numbers[part]), f"the test split of {place}")

    def example(self, file: Path, meta: dict[str, Any]) -> Float[Tensor, "stacks layers dim"]:
        """All stacks of a file, standardised as the weights say, or the one of a sound, an image or a text."""
        if file.suffix == ".safetensors" or not meta.get("encoder"):
            return _standard(read_stacks(file).stacks, meta, file)
        if not file.is_file():
            raise UserError(f"nothing to read at {str(file)!r}")
        return _standard(_encoder_of(meta).stack_of(file, _reading(meta, {})), meta, file)

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        layers, dim = options.get("layers", 24), options.get("dim", 1024)
        classes = [f"class {number}" for number in range(options.get("num_classes", 2))]
        return {"classes": classes, "mean": [[0.0] * dim] * layers, "std": [[1.0] * dim] * layers}

    def predict(self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Path], output: Path | None) -> str:
        """The likeliest classes of each stack of a file, or of each sound, image or text that the encoder reads.

        `output` (.csv) gets the probability of every class.
        """

        def shares() -> Iterator[tuple[str, list[float]]]:
            for file in inputs:
                with torch.no_grad():
                    rows = model(self.example(file, meta).to(device_of(model))).softmax(-1).tolist()
                several = len(rows) > 1
                yield from ((f"{file} {number}" if several else str(file), row) for number, row in enumerate(rows, 1))

        return tell_classes(shares(), meta["classes"], inputs, output)

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From `stacks`, as the encoder gives them, to `probabilities`; the batch stays open."""
        system = StandardClassifier(model, meta).eval()
        example = {"stacks": torch.randn(2, *system.mean.shape)}
        return Portable(system, example, ["probabilities"], {"stacks": {0: "batch"}})

    def trivial(self, data: TaskData) -> float:
        """Accuracy of the commonest class, or of a guess."""
        return blind_accuracy(*(_labels(part) for part in (data.train, data.test)))


def _content(place: Path, encoder: str | None, how: Reading) -> StackFile:
    """The stacks of a file, or of what an encoder reads."""
    if encoder is None:
        if place.is_dir():
            raise UserError(f"{place} is a folder: say whose layers are to be read of it, with encoder=FOLDER")
        return read_stacks(place)
    if place.suffix == ".safetensors":
        raise UserError(f"{place} holds stacks already: leave encoder out")
    return extracted(place, Path(encoder), how)


def _reading(meta: dict[str, Any], options: dict[str, Any]) -> Reading:
    """How the data of these weights were read."""
    known = {name: meta[name] for name in ("seconds", "length") if name in meta}
    return Reading()._replace(**known, **{name: options[name] for name in options if name in Reading._fields})


def _encoder_of(meta: dict[str, Any]) -> UserEncoder:
    """The encoder that weights name, as it was."""
    encoder = user_encoder(Path(meta["encoder"]))
    if meta.get("encoder_mark") not in (None, fingerprint_of_weights(encoder.model)):
        raise UserError(f"{meta['encoder']} holds another encoder than the one that the decoder was trained on")
    return encoder


def _comes_in_splits(folder: Path) -> bool:
    """Whether the user, or who published the data, set examples aside."""
    own = ("train", "val", "valid", "validation", "test", "train.csv", "train.tsv", "test.bin", "test_batch.bin")
    return any((folder / name).exists() for name in own)


def _splits_of(content: StackFile, seed: int) -> list[list[int]]:
    """Places of training, validation and test: as the file tells them, or drawn."""
    if content.splits is None:
        return split_indices(len(content.stacks), CUT, seed)
    return [(content.splits == number).nonzero()[:, 0].tolist() for number in range(3)]


def _standard(stacks: Tensor, meta: dict[str, Any], place: Path) -> Tensor:
    mean, std = torch.tensor(meta["mean"]), torch.tensor(meta["std"])
    if mean.shape != stacks.shape[1:]:
        raise UserError(f"{place} has stacks of {tuple(stacks.shape[1:])}, the weights are of {tuple(mean.shape)}")
    return (stacks - mean) / std


def _labels(dataset: Any) -> Tensor:
    if isinstance(dataset, Subset):
        return _labels(dataset.dataset)[list(dataset.indices)]
    return dataset.tensors[1]


TASK = LayerStacks()

"""Sounds to classes: WAV files of one's own, or vowels that are synthesised, seen as log-mel frames."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.audio import (
    FORMANTS,
    RATES,
    VOWEL_RATE,
    Frames,
    LogMel,
    draw_vowel,
    log_mel,
    read_sound,
    resample,
    sounds_in,
)
from provenn.data.class_folders import SPLITS, Splits, check_splits, given_splits, sibling_splits
from provenn.tasks.base import (
    CUT,
    LABEL,
    PREDICTED,
    HeldOut,
    Portable,
    Scores,
    Task,
    TaskData,
    batches,
    blind_accuracy,
    device_of,
    fingerprint,
    join_scores,
    report_classes,
    split_indices,
)
from provenn.tasks.meta import Recordings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATE, MELS = 16_000, 40  # of a folder
VOWEL_MELS = 32


class AudioClassification(Task):
    """A dataset's items are (log-mel frames (frames, mels) padded with zeros, count of frames, class).

    Systems are given (frames (batch, frames, mels), mask (batch, frames)), True where there is a frame.
    """

    name = "audio-classification"
    meta_schema = Recordings
    metric = "accuracy"
    higher_is_better = True
    embedded = {  # noqa: RUF012
        "vowels": "ten vowels, synthesised by source and filter at the formants that Peterson and Barney measured in "
        "1952, of speakers of many sizes; labels are exact, real speech it is not",
    }
    reads = "a folder with one sub-folder of WAV files for each class (or train/, val/ and test/ folders of such)"

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        rate: int | None = None,
        mels: int | None = None,
        seconds: float | int | None = None,
        siblings: bool = False,
        examples: int = 1500,
        test_examples: int = 600,
    ) -> TaskData:
        """Vowels drawn from the seed, or the user's own: what is missing of val and test is cut from train.

        Args:
            source: "vowels", or a folder.
            seed: of what is drawn, or of the split.
            rate: of a folder, samples a second that all files are resampled to; by default 16,000.
            mels: bands of a frame; by default 40, and 32 of vowels.
            seconds: of a folder, after which a sound is cut; by default as long as the longest.
            siblings: the folder is the test, and the folders beside it, with the same classes, are trained on: one of
                several sessions is left out.
            examples, test_examples: vowels to train on, and to validate and to test on.

        Raises:
            UserError: no such data, or files that cannot be read, with their paths.
        """
        location = self._named(source)
        for name, value in (("rate", rate), ("mels", mels), ("examples", examples), ("test_examples", test_examples)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if seconds is not None and not 0 < seconds < 3600:
            raise UserError(f"seconds must be more than 0 and less than an hour, got {seconds}")
        if isinstance(location, str):
            if rate not in (None, VOWEL_RATE) or seconds is not None:
                raise UserError(f"vowels have {VOWEL_RATE:,} samples a second and their own length: leave both out")
            frames = Frames.of(VOWEL_RATE, mels or VOWEL_MELS)
            parts = _drawn(seed, examples, test_examples, frames)
            return _prepare(location, list(FORMANTS), parts, frames, self.embedded[location])
        frames = Frames.of(rate or RATE, mels or MELS)
        if not RATES[0] <= frames.rate <= RATES[1]:
            raise UserError(f"rate must be from {RATES[0]:,} to {RATES[1]:,} samples a second, got {rate}")
        classes, listed = self.files(location, seed=seed, siblings=siblings)
        parts = [_read(pairs, frames, seconds) for pairs in listed]
        sizes = sum(len(part[0]) for part in parts)
        return _prepare(
            str(location), classes, parts, frames, f"{sizes} sounds of {len(classes)} classes, the user's own"
        )

    def files(
        self, source: str | Path, *, seed: int = 0, siblings: bool = False
    ) -> tuple[list[str], list[list[tuple[Path, int]]]]:
        """The classes of a folder, and of training, validation and test each file with its class.

        Raises:
            UserError: as `load`.
        """
        folder = Path(source)
        given = (sibling_splits if siblings else given_splits)(folder, sounds_in, "WAV files")
        splits = _with_splits(folder, given, seed)
        classes = list(splits["train"])
        return classes, [_numbered(splits[split], classes) for split in SPLITS]

    def waveform(self, file: Path, rate: int, seconds: float | None = None) -> Float[Tensor, " samples"]:
        """The samples of one file at a rate, cut after so many seconds.

        Raises:
            UserError: a file that cannot be read.
        """
        samples, own = read_sound(file)
        samples = resample(samples, own, rate)
        return torch.from_numpy(samples if seconds is None else samples[: max(2, round(seconds * rate))])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the classes, in nats."""
        x, lengths, classes = batch
        return F.cross_entropy(_logits(model, x, lengths), classes)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Whether each sound is classified right, and the cross-entropy in nats."""
        rows = []
        for x, lengths, classes in batches(dataset, batch_size, device_of(model)):
            logits = _logits(model, x, lengths).float()
            predicted = logits.argmax(-1)
            entropy = F.cross_entropy(logits, classes, reduction="none")
            rows.append([(predicted == classes).double(), entropy.double(), classes, predicted])
        return join_scores(("accuracy", "cross_entropy", LABEL, PREDICTED), rows)

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        siblings: bool = False,
        examples: int = 1500,
        test_examples: int = 600,
    ) -> HeldOut:
        """As in `Task`; sounds are resampled to the rate that the model was trained at, and cut to its length.

        Args:
            siblings: as in `load`: nothing of the folder was trained on, so all of it is tested on.
        """
        location, frames = self._named(source), _frames(meta)
        if isinstance(location, str):
            names = list(FORMANTS)
            part = _drawn(seed, examples, test_examples, frames)[2]
            which = f"the test split of {location}"
        else:
            splits = given_splits(location, sounds_in, "WAV files")
            if not (whole or siblings):
                splits = _with_splits(location, splits, seed)
            split = next(name for name in ("test", "val", "train") if name in splits)
            names = list(splits[split])
            part = _read(_numbered(splits[split], names), frames, None)
            which = f"all of {location}" if split == "train" else f"the {split} split of {location}"
        unknown = sorted(set(names) - set(meta["classes"]))
        if unknown:
            raise UserError(
                f"{location}: the model knows no class {unknown[0]!r}; it knows: {', '.join(meta['classes'][:12])}"
            )
        numbers = torch.tensor([meta["classes"].index(name) for name in names])
        x, lengths = _padded(part[0], meta)
        return HeldOut(TensorDataset(x, lengths, numbers[part[1]]), which)

    def dummy_baseline(self, data: TaskData) -> float:
        """Accuracy without listening: the commonest class, or a guess."""
        train, test = (part.tensors[2] for part in (data.train, data.test))  # type: ignore[attr-defined]  # TensorDatasets
        return blind_accuracy(train, test)

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        mels = options.get("channels", MELS)
        return {
            "classes": [f"class {i}" for i in range(options.get("num_classes", 2))],
            "rate": RATE,
            "mels": mels,
            "length": options.get("length", 500),
            "mean": [0.0] * mels,
            "std": [1.0] * mels,
        }

    def example(self, file: Path, meta: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The frames of one file, standardised, and that all of them are there."""
        return _seen(self.waveform(file, _frames(meta).rate, None), meta)

    def predict(self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Path], output: Path | None) -> str:
        """The likeliest classes of each sound; `output` (.csv) gets the probability of every class.

        A folder among the inputs stands for the sounds in it.
        """
        files = [file for given in inputs for file in (sounds_in(given) if given.is_dir() else [given])]
        listened = (
            (str(f), self.class_probabilities(model, meta, f))
            for f in progress.track(files, "listening", total=len(files))
        )
        return report_classes(listened, meta["classes"], inputs, output)

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From one sound's `samples`, at the rate that was trained at, to `probabilities`.

        Frames and their standardisation are inside the file. A sound may have any length from most of a frame on, and
        is cut to the longest that was trained on.
        """
        system = Listener(model, meta).eval()
        samples = torch.randn(1, round(0.3 * meta["rate"]), generator=torch.Generator().manual_seed(0)) / 8
        least = {"length": system.frames.window - system.frames.hop + 1}
        return Portable(
            system,
            {"samples": samples},
            ["probabilities"],
            {"samples": {1: "length"}},
            least,
            predict=lambda samples: _shares(model, *_seen(samples[0], meta)),
        )

    def class_probabilities(self, model: nn.Module, meta: dict[str, Any], file: Path) -> list[float]:
        """The probability of each class of one file."""
        x, mask = self.example(file, meta)
        device = device_of(model)
        with torch.no_grad():
            return _shares(model, x.to(device), mask.to(device))[0].tolist()

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """Which classes are taken for which, and the mean frame of each class."""
        from matplotlib.figure import Figure

        names = data.meta["classes"]
        confused = np.zeros((len(names), len(names)))
        spectra = np.zeros((len(names), data.meta["mels"]))
        with torch.no_grad():
            for x, lengths, classes in batches(data.test, 256, device_of(model)):
                predicted = _logits(model, x, lengths).argmax(-1)
                np.add.at(confused, (classes.cpu().numpy(), predicted.cpu().numpy()), 1)
                means = (x.sum(1) / lengths[:, None]).cpu().numpy()
                np.add.at(spectra, classes.cpu().numpy(), means)
        count = np.maximum(confused.sum(1, keepdims=True), 1)
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        figure.colorbar(
            left.imshow(confused / count, cmap="Blues", vmin=0, vmax=1), ax=left, label="share of the class"
        )
        left.set(xticks=range(len(names)), yticks=range(len(names)), xlabel="predicted", ylabel="true")
        left.set_xticklabels(names, rotation=60, ha="right")
        left.set_yticklabels(names)
        left.set_title(f"{data.name}: {np.trace(confused):.0f} of {confused.sum():.0f} right")
        image = right.imshow((spectra / count).T, origin="lower", aspect="auto", cmap="magma")
        figure.colorbar(image, ax=right, label="standardised log power")
        right.set(xticks=range(len(names)), ylabel="mel band")
        right.set_xticklabels(names, rotation=60, ha="right")
        right.set_title("The mean frame of each class")
        return figure


class Listener(nn.Module):
    """A classifier with what sounds go through before it.

    Shapes: samples (1, length) at the rate of `meta`, all of them real, to probabilities (1, classes).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, meta: dict[str, Any]):
        super().__init__()
        self.model, self.frames, self.length = model, _frames(meta), meta["length"]
        self.log_mel = LogMel(self.frames)
        self.register_buffer("mean", torch.tensor(meta["mean"]))
        self.register_buffer("std", torch.tensor(meta["std"]))

    def forward(self, samples: Float[Tensor, "sounds length"]) -> Float[Tensor, "sounds classes"]:
        x = self.log_mel(samples)[:, : self.length]
        return _shares(self.model, (x - self.mean) / self.std)


TASK = AudioClassification()

Part = tuple[list[Float[Tensor, "_ _"]], Int[Tensor, " _"]]  # frames of each sound, and its class


def _shares(model: nn.Module, *frames: Tensor) -> Float[Tensor, "sounds classes"]:
    """The probability of each class; of frames without a mask all are there."""
    return model(*frames).softmax(dim=-1)


def _seen(samples: Float[Tensor, " length"], meta: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The frames of one sound as the model sees them, and that all of them are there."""
    x, lengths = _padded([log_mel(samples.numpy(), _frames(meta))], meta)
    x = x[:, : int(lengths)]
    return x, torch.ones(x.shape[:2], dtype=torch.bool)


def _logits(
    model: nn.Module, x: Float[Tensor, "batch tokens mels"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "batch classes"]:
    longest = int(lengths.max())
    mask: Bool[Tensor, "batch tokens"] = torch.arange(longest, device=x.device) < lengths[:, None]
    return model(x[:, :longest], mask)


def _frames(meta: dict[str, Any]) -> Frames:
    return Frames.of(meta["rate"], meta["mels"])


@lru_cache(maxsize=4)  # a study asks for them once a trial
def _drawn(seed: int, examples: int, test_examples: int, frames: Frames) -> list[Part]:
    """Vowels at their own rate, brought to that of the frames."""
    rng, words = np.random.default_rng(seed), list(FORMANTS)
    parts = []
    for count in (examples, test_examples, test_examples):
        labels = np.arange(count) % len(words)
        sounds = (resample(draw_vowel(rng, words[label]), VOWEL_RATE, frames.rate) for label in labels)
        parts.append(([log_mel(sound, frames) for sound in sounds], torch.from_numpy(labels)))
    return parts


def _listen(file: Path, frames: Frames, seconds: float | None) -> Float[Tensor, "tokens mels"]:
    return log_mel(TASK.waveform(file, frames.rate, seconds).numpy(), frames)


def _numbered(files: dict[str, list[Path]], classes: list[str]) -> list[tuple[Path, int]]:
    return [(file, label) for label, name in enumerate(classes) for file in files[name]]


def _read(pairs: list[tuple[Path, int]], frames: Frames, seconds: float | None) -> Part:
    with progress.bar("listening", len(pairs)) as advance:
        sounds = []
        for file, _ in pairs:
            sounds.append(_listen(file, frames, seconds))
            advance()
    return sounds, torch.tensor([label for _, label in pairs])


def _prepare(name: str, classes: list[str], parts: Sequence[Part], frames: Frames, about: str) -> TaskData:
    every = torch.cat(parts[0][0]).double()
    std = every.std(dim=0, correction=0)
    meta = {
        "classes": classes,
        "rate": frames.rate,
        "mels": frames.mels,
        "length": max(len(sound) for sounds, _ in parts for sound in sounds),
        "mean": every.mean(dim=0).tolist(),
        "std": torch.where(std > 1e-6, std, 1.0).tolist(),
    }
    train, val, test = (TensorDataset(*_padded(sounds, meta), labels) for sounds, labels in parts)
    marks = [tensor for part in (train, val, test) for tensor in part.tensors]
    options = {"num_classes": len(classes), "channels": frames.mels}
    return TaskData(name, train, val, test, fingerprint(*marks), options, meta, about=about)


def _padded(
    sounds: Sequence[Float[Tensor, "_ mels"]], meta: dict[str, Any]
) -> tuple[Float[Tensor, "sounds tokens mels"], Int[Tensor, " sounds"]]:
    """Standardised by the training split, cut to the longest that was trained on, padded with zeros."""
    mean, std = torch.tensor(meta["mean"]), torch.tensor(meta["std"])
    x = torch.zeros(len(sounds), meta["length"], meta["mels"])
    for row, sound in zip(x, sounds):
        sound = sound[: meta["length"]]
        row[: len(sound)] = (sound - mean) / std
    return x, torch.tensor([min(len(sound), meta["length"]) for sound in sounds])


def _with_splits(root: Path, parts: Splits, seed: int) -> Splits:
    """The same, and what of train, val and test is missing cut from `train`, class by class."""
    check_splits(root, parts)
    missing = [split for split in SPLITS if split not in parts]
    parts = {**parts, "train": dict(parts["train"]), **{split: {} for split in missing}}
    for name, files in parts["train"].items() if missing else ():
        if len(files) <= len(missing):
            raise UserError(
                f"the class {name!r} has {len(files)} sound{'s' * (len(files) != 1)}; "
                f"cutting {' and '.join(missing)} from train needs {len(missing) + 1} or more"
            )
        order = split_indices(len(files), (1.0,), seed)[0]
        count = min(max(1, round(CUT * len(files))), (len(files) - 1) // len(missing))
        for split in missing:
            parts[split][name] = [files[order.pop()] for _ in range(count)]
        parts["train"][name] = [files[index] for index in sorted(order)]
    return parts

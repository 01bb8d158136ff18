"""Stacks of a small Transformer that is pre-trained on data that the library has: sounds, patches and texts."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from provenn.core.errors import UserError
from provenn.papers.gaam.model import StackEncoder
from provenn.tasks import Task, TaskData, batches, count_examples, device_of, fingerprint, get_task, join_scores
from provenn.training import Recipe, fit

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
        discrete: whether a frame is one of so many, as a byte is. The error is a cross-entropy then, else a square.
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
        rebuilt, hide = model.rebuild(x, mask, hide & mask), hide & mask
        if self.discrete:
            error = F.cross_entropy(rebuilt.flatten(0, 1), x.argmax(-1).flatten(), reduction="none").view(hide.shape)
        else:
            error = (rebuilt - x).square().mean(dim=-1)
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

    def dummy_baseline(self, data: TaskData) -> float:
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


@lru_cache(maxsize=8)  # every variant of a study asks for the same
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

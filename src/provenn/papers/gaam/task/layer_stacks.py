"""Stacks of pooled layers to classes: what the paper's decoders are trained on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

from provenn.core.errors import UserError
from provenn.papers.gaam.probe import StackFile, fingerprint_of_weights, read_stacks
from provenn.papers.gaam.task.encoders import CUT, Reading, UserEncoder, extracted, user_encoder
from provenn.papers.gaam.task.pretraining import pretrained_stacks, stack_data
from provenn.tasks import Task, TaskData, batches, device_of, join_scores, split_indices
from provenn.tasks.base import LABEL, PREDICTED, HeldOut, Portable, blind_accuracy, report_classes
from provenn.tasks.meta import Finite, Meta, Names, Positive


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
            source: "vowels", "patches" or "docstrings"; a file of stacks, cut into 70, 15 and 15 % where it has no
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
        origin = self._named(source)
        if isinstance(origin, str):
            if encoder is not None:
                raise UserError(f"{origin} come with an encoder of their own: leave encoder out, or give files")
            return pretrained_stacks(origin, seed)
        how = Reading(seconds, length, siblings, examples)
        content = _content(origin, encoder, how)
        stacks, labels, classes = content.stacks, content.labels, content.classes
        if len(classes) < 2:
            raise UserError(f"{origin} holds one class, {classes[0]!r}: a classifier needs two or more")
        if len(stacks) < 10:
            raise UserError(f"{origin} holds {len(stacks)} stacks: too few for a split, expected at least 10")
        chosen = _splits_of(content, seed)
        if validate_on_test:
            chosen = [[*chosen[0], *chosen[1]], chosen[2], chosen[2]]
        data = stack_data(str(origin), [(stacks[part], labels[part]) for part in chosen], classes, "the user's own")
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
            predicted = logits.argmax(-1)
            entropy = F.cross_entropy(logits, labels, reduction="none")
            rows.append([(predicted == labels).double(), entropy.double(), labels, predicted])
        return join_scores(("accuracy", "cross_entropy", LABEL, PREDICTED), rows)

    def held_out(
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, whole: bool = True, **options: Any
    ) -> HeldOut:
        """As in `Task`; stacks are standardised as the weights say, and read of files by the encoder that they name."""
        origin = self._named(source)
        if isinstance(origin, str):
            return HeldOut(self.load(origin, seed=seed).test, f"the test split of {origin}")
        how = _reading(meta, options)
        content = _content(origin, meta.get("encoder") if origin.is_dir() else None, how)
        labels, classes = content.labels, content.classes
        known = meta.get("classes", classes)
        unknown = next((name for name in classes if name not in known), None)
        if unknown is not None:
            raise UserError(f"{origin}: the model knows no class {unknown!r}; it knows: {', '.join(known[:12])}")
        stacks = _standard(content.stacks, meta, origin)
        numbers = torch.tensor([known.index(name) for name in classes])[labels]
        apart = how.siblings or _comes_in_splits(origin)  # of several folders one is the test
        if whole and (content.splits is None or (origin.is_dir() and not apart)):
            return HeldOut(TensorDataset(stacks, numbers), f"all of {origin}")
        part = _splits_of(content, seed)[2]
        return HeldOut(TensorDataset(stacks[part], numbers[part]), f"the test split of {origin}")

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

        return report_classes(shares(), meta["classes"], inputs, output)

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From `stacks`, as the encoder gives them, to `probabilities`; the batch stays open."""
        system = StandardClassifier(model, meta).eval()
        example = {"stacks": torch.randn(2, *system.mean.shape)}
        return Portable(system, example, ["probabilities"], {"stacks": {0: "batch"}})

    def dummy_baseline(self, data: TaskData) -> float:
        """Accuracy of the commonest class, or of a guess."""
        return blind_accuracy(*(_labels(part) for part in (data.train, data.test)))


def _content(path: Path, encoder: str | None, how: Reading) -> StackFile:
    """The stacks of a file, or of what an encoder reads."""
    if encoder is None:
        if path.is_dir():
            raise UserError(f"{path} is a folder: say whose layers are to be read of it, with encoder=FOLDER")
        return read_stacks(path)
    if path.suffix == ".safetensors":
        raise UserError(f"{path} holds stacks already: leave encoder out")
    return extracted(path, Path(encoder), how)


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
    """Indices of training, validation and test: as the file has them, or drawn."""
    if content.splits is None:
        return split_indices(len(content.stacks), CUT, seed)
    return [(content.splits == number).nonzero()[:, 0].tolist() for number in range(3)]


def _standard(stacks: Tensor, meta: dict[str, Any], path: Path) -> Tensor:
    mean, std = torch.tensor(meta["mean"]), torch.tensor(meta["std"])
    if mean.shape != stacks.shape[1:]:
        raise UserError(f"{path} has stacks of {tuple(stacks.shape[1:])}, the weights are of {tuple(mean.shape)}")
    return (stacks - mean) / std


def _labels(dataset: Any) -> Tensor:
    if isinstance(dataset, Subset):
        return _labels(dataset.dataset)[list(dataset.indices)]
    return dataset.tensors[1]


TASK = LayerStacks()

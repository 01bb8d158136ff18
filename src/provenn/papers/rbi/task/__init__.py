"""Recognition in batches: image classification by systems whose images see each other, in three protocols at once."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.images import images_in
from provenn.papers.rbi.model import BATCH, loss
from provenn.tasks.base import (
    LABEL,
    PREDICTED,
    HeldOut,
    Scores,
    TaskData,
    count_examples,
    device_of,
    join_scores,
    report_classes,
)
from provenn.tasks.fine_grained import FineGrained
from provenn.tasks.image_classification import IMAGENET_SIZE, ImageClassification

PROTOCOLS = ("single", "random", "ordered")
SHUFFLES = 3  # of the protocol `random`, seeds 0, 1 and 2
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # of the batches of a sweep


class BatchRecognition(FineGrained):
    """As fine-grained recognition. Accuracy is always given in three protocols, since a batch may give a class away.

    - `single`: every image alone. A user's picture comes so.
    - `random`: batches of the training's size from a shuffled list, the mean of three shuffles.
    - `ordered`: batches from the list as it is. Lists of the field are sorted by class, so an image stands beside its
      class: this says more of the list than of the network.

    `accuracy` is that of what `predict` says: every image alone, with the bank of training images where a network has
    one. A last batch that is not full is filled up from the front of the list. Networks that do not mix images have one
    accuracy, given each time.

    Args:
        protocol: what `accuracy` is instead, "single" or "random", where networks are compared by it.
    """

    name = "batch-recognition"
    embedded = {  # noqa: RUF012
        **FineGrained.embedded,
        "digits": ImageClassification.embedded["digits"],
    }

    def __init__(self, protocol: str | None = None):
        if protocol not in (None, "single", "random"):
            raise ValueError(f"protocol must be single or random, got {protocol!r}")
        self.protocol = protocol

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        size: int | None = None,
        largest: int = IMAGENET_SIZE,
        skip_broken: bool = False,
    ) -> TaskData:
        """As fine-grained recognition, and "digits"; options for the network are mean and deviation of its images."""
        of = ImageClassification if source == "digits" else FineGrained
        data = of.load(self, source, seed=seed, size=size, largest=largest, skip_broken=skip_broken)
        return replace(data, options={**data.options, "mean": data.meta["mean"], "std": data.meta["std"]})

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        size: int | None = None,
        skip_broken: bool = False,
    ) -> HeldOut:
        """As fine-grained recognition, and "digits"."""
        of = ImageClassification if source == "digits" else FineGrained
        return of.held_out(self, source, meta, seed=seed, whole=whole, size=size, skip_broken=skip_broken)

    def loss(self, model: nn.Module, batch: Any, smoothing: float = 0.0) -> Tensor:
        """Cross-entropy, of a batch whose images see each other.

        Raises:
            UserError: mixed images, whose pixels say nothing of a relation.
        """
        images, labels = batch
        return loss(model, images, labels, smoothing)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each image whether it is right in each protocol; loss, top-5 and the predicted class are `predict`'s."""
        if not mixes(model):
            plain = super().scores(model, dataset, batch_size)
            plain_accuracy = plain["accuracy"]
            return {"accuracy": plain.pop("accuracy"), **dict.fromkeys(PROTOCOLS, plain_accuracy), **plain}
        system, rows, features = Mixing(model), [], []
        for images, labels in DataLoader(dataset, batch_size=batch_size):
            images, labels = images.to(system.device), labels.to(system.device)
            vectors = system.embed(images)
            features.append(vectors)
            logits = system.decide(vectors, images, None)
            likeliest = logits.topk(min(5, logits.shape[1]), 1).indices
            wrong = F.cross_entropy(logits, labels, reduction="none")
            alone = system.decide(vectors, images, "single").argmax(1) == labels
            right = likeliest == labels[:, None]
            columns = [alone.double(), right[:, 0].double(), wrong.double(), right.any(1).double(), labels]
            rows.append([*columns, likeliest[:, 0]])
        first = join_scores(("single", "accuracy", "loss", "top5", LABEL, PREDICTED), rows)
        system.features, system.labels = torch.cat(features), torch.from_numpy(first[LABEL])
        shuffled = system.shuffled(dataset, system.batch)
        ordered = system.in_batches(dataset, torch.arange(len(system.features)), system.batch)
        scores = {"accuracy": first.pop("accuracy"), "single": first.pop("single"), "random": shuffled}
        if self.protocol is not None:
            scores["accuracy"] = scores[self.protocol]
        if logits.shape[1] <= 5:
            del first["top5"]
        return {**scores, "ordered": ordered, **first}

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        together: bool = False,
    ) -> str:
        """As image classification: each picture by itself, or with the bank of the weights.

        Args:
            together: let the pictures of this call attend to each other, in batches of the training's size. What is
                said of one then depends on which others were given.
        """
        if not together:
            return super().predict(model, meta, inputs, output)
        if not mixes(model):
            raise UserError("these weights look at each picture alone: leave --together out")
        files = [file for given in inputs for file in (images_in(given) if given.is_dir() else [given])]
        system = Mixing(model)

        def shares() -> Iterator[tuple[str, list[float]]]:
            for first in progress.track(range(0, len(files), system.batch), "predicting"):
                group = files[first : first + system.batch]
                images = torch.cat([self.example(file, meta) for file in group]).to(system.device)
                with torch.no_grad():
                    rows = system.decide(system.embed(images), images, "batch").softmax(1).tolist()
                yield from zip(map(str, group), rows, strict=True)

        return report_classes(shares(), meta["classes"], inputs, output)


def mixes(model: nn.Module) -> bool:
    """Whether images of a batch see each other in this network."""
    return hasattr(model, "decide") and not getattr(model, "plain", False)


class Mixing:
    """A network whose images see each other, and the features of a list of images, which nothing else changes.

    Args:
        model: with `embed` and `decide`, as `RBI` has.
    """

    def __init__(self, model: Any):
        self.model, self.batch = model, getattr(model, "batch", BATCH)
        self.device = device_of(model)
        self.features, self.labels = torch.empty(0), torch.empty(0, dtype=torch.long)

    def embed(self, images: Tensor) -> Tensor:
        """N."""
        return self.model.embed(images)

    def decide(self, features: Tensor, images: Tensor, protocol: str | None) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.model.decide(features, images, protocol).float()

    def read(self, dataset: Dataset) -> "Mixing":
        """With the features of these images."""
        features, labels = [], []
        for images, those in DataLoader(dataset, batch_size=256):
            features.append(self.embed(images.to(self.device)))
            labels.append(those.long())
        self.features, self.labels = torch.cat(features), torch.cat(labels)
        return self

    def in_batches(self, dataset: Dataset, order: Int64[Tensor, " images"], size: int) -> np.ndarray:
        """Whether each image is right where the list is cut into batches in that order; by its place in the list."""
        count = len(order)
        size = min(size, count)
        # The last batch is filled up from the front, which is not scored again.
        order = torch.cat([order, order[: -count % size]])
        right = np.zeros(count)
        loader = DataLoader(dataset, batch_size=size, sampler=order.tolist())
        for at, (images, _) in enumerate(loader):
            places = order[at * size : (at + 1) * size]
            logits = self.decide(self.features[places], images.to(self.device), "batch")
            scored = places[: count - at * size]
            hits = logits[: len(scored)].argmax(1).cpu() == self.labels[scored]
            right[scored.numpy()] = hits.double().numpy()
        return right

    def shuffled(self, dataset: Dataset, size: int) -> np.ndarray:
        """The share of three shuffles in which each image is right."""
        count = len(self.features)
        orders = (torch.randperm(count, generator=torch.Generator().manual_seed(seed)) for seed in range(SHUFFLES))
        return np.mean([self.in_batches(dataset, order, size) for order in orders], 0)


def sweep(model: nn.Module, dataset: Dataset, sizes: Sequence[int] = SIZES) -> dict[int, float]:
    """Accuracy in the protocol `random` by the size of the batches, of the sizes that the list can fill.

    Args:
        model: in eval mode; of one that does not mix images all sizes give the same.
        dataset: images and labels.
        sizes: of the batches.

    Raises:
        UserError: a size below 1.
    """
    if min(sizes) < 1:
        raise UserError(f"sizes of batches must be at least 1, got {list(sizes)}")
    with torch.no_grad():
        if not mixes(model):
            accuracy = float(TASK.scores(model, dataset)["single"].mean())
            return dict.fromkeys(sizes, accuracy)
        system = Mixing(model).read(dataset)
        fitting = [size for size in sizes if size <= count_examples(dataset)]
        return {size: float(system.shuffled(dataset, size).mean()) for size in fitting}


TASK = BatchRecognition()

"""Data, networks and probes of RBI's experiments: three small backbones, and what stands before their classifier."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from provenn.papers.rbi.backbones import ConvNeXt, DenseNet, SmallCNN
from provenn.papers.rbi.model import RBI, RelationLayer, View
from provenn.papers.rbi.task import BatchRecognition, Mixing, mixes, sweep
from provenn.papers.rbi.task.hosts import MixedNetwork, PerImage, Smoothing
from provenn.tasks import TaskData, fingerprint
from provenn.tasks.base import device_of
from provenn.tasks.fine_grained import Regions
from provenn.training import Recipe

TASK = BatchRecognition("random")  # rates are chosen and networks compared by it
DIM = 128
DIGITS = 300  # to train on. In a pilot plain networks told 0.98 of the others, and pixels alone 0.97; of 150 too few
MATES, OTHERS = 4, 31  # of an image's own class in a batch that holds it, and of all in one
REGIONS_RECIPE = Recipe(epochs=24, batch_size=32, weight_decay=0.05, schedule="onecycle", clip=5.0, label_smoothing=0.1)
DIGITS_RECIPE = replace(REGIONS_RECIPE, epochs=60)


class Part(NamedTuple):
    """What a variant is.

    Args:
        kind: what stands before the classifier.
        backbone: a key of `BACKBONES`.
    """

    kind: str
    backbone: str = "cnn"


class Shuffled(RelationLayer):
    """RBI whose S is that of other pairs: a control that keeps its values, and is trained so."""

    def view(self, features: Tensor, images: Tensor | None, protocol: str | None = None) -> View:
        given = protocol or ("batch" if self.training else "single")
        if given != "batch" or images is None:
            return super().view(features, images, protocol)
        relations = shuffled_pairs(self.encode(images))
        return View(relations, self.attend.relate(features, relations))


def shuffled_pairs(scores: Float[Tensor, "batch batch"]) -> Float[Tensor, "batch batch"]:
    """The same scores at other pairs: symmetric, and the diagonal stays."""
    rows, columns = torch.triu_indices(len(scores), len(scores), offset=1, device=scores.device)
    order = torch.randperm(len(rows), device=scores.device)
    mixed = scores.clone()
    mixed[rows, columns] = scores[rows[order], columns[order]]
    mixed[columns, rows] = mixed[rows, columns]
    return mixed


BACKBONES: dict[str, Callable[[int], nn.Module]] = {
    "cnn": lambda channels: SmallCNN((32, 64, DIM), in_channels=channels),
    "densenet": lambda channels: Projected(
        DenseNet((3, 3, 3), growth=12, stem=16, num_classes=0, in_channels=channels, small=True)
    ),
    "convnext": lambda channels: Projected(
        ConvNeXt((2, 2, 2), (32, 64, 96), num_classes=0, in_channels=channels, patch=1 if channels == 1 else 2)
    ),
}


class Projected(nn.Module):
    """A backbone whose mean features become as many as the others' by a linear layer."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.backbone = backbone
        self.project = nn.Linear(backbone.dim if hasattr(backbone, "dim") else backbone.widths[-1], DIM)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        return self.project(self.backbone(x))


ENCODINGS = {"rra": {"rpe": "none"}, "features": {"rpe": "features"}, "minmax": {"rpe_norm": "minmax"}, "rbi": {}}


def network(part: Part, num_classes: int, in_channels: int, mean: list[float], std: list[float]) -> nn.Module:
    """The network of a variant."""
    backbone = BACKBONES[part.backbone](in_channels)
    if part.kind in ("per-image", "smoothing"):
        mixer = (PerImage if part.kind == "per-image" else Smoothing)(DIM)
        return MixedNetwork(backbone, mixer, DIM, num_classes)
    options: dict[str, Any] = {"feat_dim": DIM, "mean": mean, "std": std, "plain": part.kind == "plain"}
    model = RBI(backbone, num_classes, **{**options, **ENCODINGS.get(part.kind, {})})
    if part.kind == "shuffled":
        layer: Any = model.relation
        layer.__class__ = Shuffled
    return model


def regions(seed: int, smoke: bool) -> TaskData:
    """Views of 64 regions, another drawing for each seed."""
    data = _drawn(seed)
    return replace(data, train=_few(data.train), val=_few(data.val), test=_few(data.test)) if smoke else data


@lru_cache(maxsize=2)  # drawn once for all variants of a seed
def _drawn(seed: int) -> TaskData:
    return TASK.load("regions", seed=seed)


def _few(views: Any) -> Regions:
    """Two views of each class."""
    step = len(views) // 128
    return Regions(views.images[::step], views.labels[::step], views.meta)


def distinct(seed: int, smoke: bool) -> TaskData:
    """The same views, the photograph as the class: 16 classes that no neighbour is confused with."""
    data = regions(seed, smoke)
    names = [name.partition(",")[0] for name in data.meta["classes"][::4]]
    meta = {**data.meta, "classes": names}
    train, val, test = (_by_photograph(views, meta) for views in (data.train, data.val, data.test))
    options, stamp = {**data.options, "num_classes": len(names)}, fingerprint(data.fingerprint, "photographs")
    return replace(data, train=train, val=val, test=test, options=options, meta=meta, fingerprint=stamp)


def _by_photograph(views: Any, meta: dict[str, Any]) -> Regions:
    return Regions(views.images, views.labels // 4, meta)


def digits(seed: int, smoke: bool) -> TaskData:
    """Digits of 8×8 pixels, 300 to train on; the other training images are tested on, too."""
    data: Any = TASK.load("digits", seed=seed)
    (images, labels), (more, those) = data.train.tensors, data.test.tensors
    count = 64 if smoke else DIGITS
    train = TensorDataset(images[:count], labels[:count])
    test = TensorDataset(torch.cat([more, images[DIGITS:]]), torch.cat([those, labels[DIGITS:]]))
    return replace(data, train=train, test=test, fingerprint=fingerprint(data.fingerprint, str(count)))


def alone(model: nn.Module, data: TaskData) -> float:
    """Accuracy of each image by itself: what a user gets."""
    return float(TASK.scores(model, data.test)["single"].mean())


def ordered(model: nn.Module, data: TaskData) -> float:
    """Accuracy in batches in the order of the list, which is sorted by class."""
    return float(TASK.scores(model, data.test)["ordered"].mean())


def gate(model: nn.Module, data: TaskData) -> float:
    """The mean β over the test images in shuffled batches; 1 of a network without a gate."""
    relation = getattr(model, "relation", None)
    if relation is None or relation.attend.gate is None:
        return 1.0
    system: Any = model
    values = [float(g) for images in _batches(data.test) for g in system.view(images.to(device_of(model))).related.gate]
    return float(np.mean(values))


def sizes(model: nn.Module, data: TaskData) -> float:
    """Accuracy in shuffled batches of 128 minus that in batches of 2."""
    by_size = sweep(model, data.test, (2, 128 if len(data.test) >= 128 else 2))  # type: ignore[arg-type]  # it has one
    return by_size[max(by_size)] - by_size[2]


def company(model: nn.Module, data: TaskData) -> float:
    """Accuracy of an image among four of its class, minus that among none of them; 28 and 31 others fill the batch."""
    if not mixes(model):
        return 0.0
    system, rng = Mixing(model).read(data.test), np.random.default_rng(0)
    labels = system.labels.numpy()
    pictures = torch.stack([data.test[index][0] for index in range(len(labels))])
    right: dict[bool, list[bool]] = {True: [], False: []}
    for index in range(len(labels)):
        inside = np.setdiff1d(np.flatnonzero(labels == labels[index]), [index])
        outside = np.flatnonzero(labels != labels[index])
        others = rng.permutation(outside)[:OTHERS]
        for holds in (True, False):
            mates = rng.permutation(inside)[:MATES] if holds else inside[:0]
            places = torch.from_numpy(np.concatenate([[index], mates, others[: OTHERS - len(mates)]]))
            logits = system.decide(system.features[places], pictures[places].to(system.device), "batch")
            right[holds].append(int(logits[0].argmax()) == labels[index])
    return float(np.mean(right[True]) - np.mean(right[False]))


def same_class(model: nn.Module, data: TaskData) -> float:
    """Rank correlation of S with being of one class, over the pairs of shuffled test batches; it needs no training."""
    from scipy import stats

    relation = getattr(model, "relation", None)
    if relation is None or relation.attend.relation != "given":
        return 0.0
    scores, alike = [], []
    for images, labels in _batches(data.test, labelled=True):
        upper = torch.triu_indices(len(labels), len(labels), offset=1)
        scores.append(relation.encode(images.to(device_of(model))).cpu()[upper[0], upper[1]])
        alike.append(labels[upper[0]] == labels[upper[1]])
    return float(stats.spearmanr(torch.cat(scores).numpy(), torch.cat(alike).double().numpy()).statistic)


def _batches(dataset: Dataset, labelled: bool = False) -> Any:
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]  # as above
    for places in order.split(32):
        rows = [dataset[int(place)] for place in places]
        images, labels = torch.stack([row[0] for row in rows]), torch.tensor([int(row[1]) for row in rows])
        yield (images, labels) if labelled else images


PROBES = {
    "alone": alone,
    "ordered": ordered,
    "mean gate": gate,
    "batches of 128 over 2": sizes,
    "gain of class-mates": company,
    "rank correlation": same_class,
}
LABELS = {
    "plain": "plain",
    "per-image": "per-image layer",
    "smoothing": "smoothing without weights",
    "rra": "RRA",
    "rbi": "RBI",
    "minmax": "RBI, min-max",
    "shuffled": "RBI, S shuffled",
    "features": "RRA, S of features",
}


def variants(kinds: tuple[str, ...], backbone: str = "cnn") -> dict[str, tuple[str, Part]]:
    """A variant for each kind, named by it."""
    return {kind: (LABELS[kind], Part(kind, backbone)) for kind in kinds}


def same_class_shares(labels: np.ndarray, size: int, orders: list[np.ndarray]) -> list[float]:
    """The share of batch mates that are of one's own class, where a list is cut into batches in each of the orders."""
    shares = []
    for order in orders:
        mates = [labels[order[i : i + size]] for i in range(0, len(order), size)]
        pairs = sum(len(batch) * (len(batch) - 1) for batch in mates)
        alike = sum(int((batch[:, None] == batch[None]).sum()) - len(batch) for batch in mates)
        shares.append(alike / pairs)
    return shares

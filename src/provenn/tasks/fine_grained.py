"""Fine-grained recognition: image classification where classes differ by detail, such as species of birds."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.listed_images import listed_splits
from provenn.data.regions import OF_CLASS, SIDE, class_names, region_classes
from provenn.tasks.base import LABEL, PREDICTED, HeldOut, Scores, TaskData, fingerprint
from provenn.tasks.descriptors import pixel_accuracy, small_pixels
from provenn.tasks.image_classification import (
    IMAGENET_MEAN,
    IMAGENET_SIZE,
    IMAGENET_STD,
    LARGEST_CHECKED,
    ImageClassification,
    ImageFiles,
    class_numbers,
    usual_side,
    with_splits,
)
from provenn.tasks.portable import standardise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Measured on the embedded test views of seed 0, by single pixels alone; a test measures them again.
FLOORS = {"nearest neighbour": 0.459, "support vector machine": 0.628}
WORST, PAIRS = 20, 6  # classes and pairs in the picture of an evaluation


class Regions(Dataset):
    """Views of regions in memory, as a network sees them, and their classes.

    Args:
        images: of 8 bits.
        labels: one each.
        meta: see `provenn.tasks.meta.Images`.
    """

    def __init__(
        self, images: UInt8[Tensor, "views 3 side side"], labels: Int64[Tensor, " views"], meta: dict[str, Any]
    ):
        self.images, self.labels, self.meta = images, labels, meta

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 side side"], int]:
        return standardise(self.images[index].float() / 255, self.meta), int(self.labels[index])


class FineGrained(ImageClassification):
    """As image classification, with the data of the field and its lists, and a stronger dummy baseline."""

    name = "fine-grained"
    embedded = {  # noqa: RUF012
        "regions": "3,072 views of 32×32 pixels of 64 regions in 16 photographs (scikit-image, scikit-learn), four "
        "overlapping ones of each: which region is it?",
    }
    reads = (
        "a folder of CUB-200-2011, NABirds, Stanford Dogs or Tiny-ImageNet, or one with one sub-folder of images for "
        "each class (or train/, val/ and test/ folders of such)"
    )

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        size: int | None = None,
        largest: int = IMAGENET_SIZE,
        skip_broken: bool = False,
    ) -> TaskData:
        """The embedded regions, a folder with the lists of `provenn.data.listed_images`, or a folder of classes.

        Args:
            source: "regions", or a folder. The split of the lists is honoured; what is missing is cut from the training
                images, class by class.
            seed: of the split, or of the views.
            size: of files, side of the square that the model sees; by default `largest`, or less where the images are
                smaller.
            largest: of files, pixels.
            skip_broken: of a folder without lists, name the images that cannot be read and go on without them.
        """
        named = self._named(source)
        for name, side in (("size", size), ("largest", largest)):
            if side is not None and side < 1:
                raise UserError(f"{name} must be at least 1 pixel, got {side}")
        if isinstance(named, str):
            if size not in (None, SIDE):
                raise UserError(f"regions are images of {SIDE}×{SIDE} pixels: leave size out, got {size}")
            return _regions(seed)
        parts = listed_splits(named) if named.is_dir() else None
        if parts is None:
            return super().load(source, seed=seed, size=size, largest=largest, skip_broken=skip_broken)
        return _listed(named, with_splits(named, parts, seed), size, largest)

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
        """As in image classification; of lists their test."""
        named = self._named(source)
        if size is not None and size < 1:
            raise UserError(f"size must be at least 1 pixel, got {size}")
        meta = {**meta, "size": size or meta["size"]}
        if isinstance(named, str):
            if (meta["channels"], meta["size"], meta["classes"]) != (3, SIDE, class_names()):
                raise UserError(
                    f"regions are {SIDE}×{SIDE} pixels in colour of {len(class_names())} classes; these weights take "
                    f"{meta['channels']} channel(s) of {meta['size']}×{meta['size']} and know {len(meta['classes'])} "
                    f"classes, such as {meta['classes'][0]!r}"
                )
            return HeldOut(Regions(*region_classes("test", seed=seed), meta), "the test split of regions")
        parts = listed_splits(named) if named.is_dir() else None
        if parts is None:
            return super().held_out(source, meta, seed=seed, whole=whole, size=size, skip_broken=skip_broken)
        split = next(name for name in ("test", "val", "train") if name in parts)
        numbers = class_numbers(named, list(parts[split]), meta["classes"])
        files = [(file, numbers[name]) for name, listed in parts[split].items() for file in listed]
        return HeldOut(
            ImageFiles(files, meta), f"the {split} split of {named}, at {meta['size']}×{meta['size']} pixels"
        )

    def dummy_baseline(self, data: TaskData) -> float:
        """Accuracy without learned features: the commonest class, a guess, or `pixel_accuracy` of small pixels."""
        return max(super().dummy_baseline(data), *floors(data).values())


TASK = FineGrained()


def floors(data: TaskData) -> dict[str, float]:
    """How often pixels of the picture at 16×16 give the class away, fitted to `train` and judged on `test`."""
    return pixel_accuracy(_pixels_of(data.train), _pixels_of(data.test))


def _pixels_of(dataset: Dataset) -> tuple[Float[Tensor, "images values"], Int64[Tensor, " images"]]:
    if isinstance(dataset, ImageFiles):
        whole = copy.copy(dataset)
        whole.augment = False
        dataset = whole
    loader = DataLoader(dataset, batch_size=256)
    parts = [(small_pixels(images), labels.long()) for images, labels in progress.track(loader, "reading pixels")]
    pixels, labels = zip(*parts)
    return torch.cat(pixels), torch.cat(labels)


def _regions(seed: int) -> TaskData:
    parts = {split: region_classes(split, seed=seed) for split in OF_CLASS}
    pixels = parts["train"][0].float() / 255
    meta = {
        "classes": class_names(),
        "size": SIDE,
        "channels": 3,
        "mean": pixels.mean((0, 2, 3)).tolist(),
        "std": pixels.std((0, 2, 3)).tolist(),
    }
    sets = {split: Regions(*part, meta) for split, part in parts.items()}
    return TaskData(
        "regions",
        sets["train"],
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*(tensor for part in parts.values() for tensor in part)),
        options={"num_classes": len(class_names()), "in_channels": 3},
        meta=meta,
        about=f"Views of {SIDE}×{SIDE} pixels of 64 regions in 16 photographs, four of each that lie 16 pixels apart "
        f"and overlap: {OF_CLASS['train']} to train on, {OF_CLASS['test']} to test, moved, turned, scaled, relit and "
        "partly hidden. Half of the photographs are grey. Splits are of views: they show the same regions.",
    )


def _listed(root: Path, parts: dict[str, dict[str, list[Path]]], size: int | None, largest: int) -> TaskData:
    """As a folder of classes is read, from lists."""
    classes = list(parts["train"])
    files = {s: [(file, i) for i, name in enumerate(classes) for file in found[name]] for s, found in parts.items()}
    everything = sorted(file for listed in files.values() for file, _ in listed)
    size = size or usual_side(everything, largest)
    meta = {"classes": classes, "size": size, "channels": 3, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    sets = {split: ImageFiles(files[split], meta, augment=split == "train") for split in ("train", "val", "test")}
    if len(everything) <= LARGEST_CHECKED:
        for images in sets.values():
            for index in progress.track(range(len(images)), "reading images"):
                images[index]  # names a damaged file now, not in the middle of training
    sizes = (f"{file.relative_to(root)} {file.stat().st_size}" for file in everything)
    chosen = (f"{split} {file.relative_to(root)} {label}" for split, listed in files.items() for file, label in listed)
    return TaskData(
        str(root),
        sets["train"],
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*sizes, *chosen),
        options={"num_classes": len(classes), "in_channels": 3},
        meta=meta,
        about=f"{len(files['train']):,} images to train, {len(files['val']):,} to validate, {len(files['test']):,} to "
        f"test, of {len(classes)} classes, at {size}×{size} pixels; the split is that of the data's lists.",
    )


def evaluated(model: nn.Module, dataset: Dataset, scores: Scores) -> "Figure":
    """The accuracy of the worst classes, and the pairs that are most often mistaken, each with an example.

    Args:
        model: not asked again.
        dataset: the pictures, in the order of the scores.
        scores: whose true and predicted classes count.
    """
    from matplotlib.figure import Figure

    labels, predicted = (scores[name].astype(np.int64) for name in (LABEL, PREDICTED))
    meta = getattr(dataset, "meta", {})
    size = int(max(labels.max(), predicted.max())) + 1
    classes = [*meta.get("classes", []), *(f"class {k}" for k in range(len(meta.get("classes", [])), size))]
    counts = np.bincount(labels, minlength=size)
    right = np.bincount(labels[labels == predicted], minlength=size)
    there = np.flatnonzero(counts)
    worst = there[np.argsort(right[there] / counts[there], kind="stable")][:WORST]
    pairs = most_confused(labels, predicted)
    figure = Figure(figsize=(12, 1.2 + max(0.3 * len(worst), 1.9 * len(pairs), 2.0)), layout="constrained")
    grid = figure.add_gridspec(max(1, len(pairs)), 3, width_ratios=[3, 1, 1])
    bars = figure.add_subplot(grid[:, 0])
    bars.barh(range(len(worst)), (right[worst] / counts[worst])[::-1], color="#4363d8")
    bars.set(yticks=range(len(worst)), xlim=(0, 1), xlabel="accuracy", title="the worst classes")
    bars.set_yticklabels([f"{classes[k]} ({counts[k]})" for k in worst[::-1]], fontsize=8)
    for row, (true, taken, times) in enumerate(pairs):
        mistaken = int(np.flatnonzero((labels == true) & (predicted == taken))[0])
        others = np.flatnonzero(labels == taken)
        shown = [(mistaken, f"{classes[true]},\ntaken {times}× for")]
        shown += [(int(others[0]), classes[taken])] if len(others) else []
        for column, (index, title) in enumerate(shown, 1):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(_shown(dataset[index][0], meta))
            axes.set_title(title, fontsize=8)
            axes.set_axis_off()
    return figure


def most_confused(labels: np.ndarray, predicted: np.ndarray, most: int = PAIRS) -> list[tuple[int, int, int]]:
    """True class, predicted class and how often, of the mistakes that are made most often.

    >>> most_confused(np.array([0, 0, 0, 1, 2]), np.array([1, 1, 2, 1, 0]))
    [(0, 1, 2), (0, 2, 1), (2, 0, 1)]
    """
    wrong = np.stack([labels, predicted], 1)[labels != predicted]
    if not len(wrong):
        return []
    pairs, times = np.unique(wrong, axis=0, return_counts=True)
    order = np.argsort(-times, kind="stable")[:most]
    return [(int(pair[0]), int(pair[1]), int(count)) for pair, count in zip(pairs[order], times[order])]


def _shown(image: Float[Tensor, "channels height width"], meta: dict[str, Any]) -> np.ndarray:
    """The pixels of a standardised picture, as matplotlib takes them."""
    if "mean" in meta:
        mean, std = (torch.tensor(meta[key])[:, None, None] for key in ("mean", "std"))
        image = image * std + mean
    pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()
    return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels

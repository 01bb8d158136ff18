"""Images to classes: one label for each image."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.cifar import SIDE, files_in, read_cifar
from provenn.data.class_folders import Splits, check_splits, given_splits
from provenn.data.images import images_in, read_pixels, resize_pixels, size_of
from provenn.data.patches import NARROW as NARROW  # for studies
from provenn.data.patches import SOURCES, photo_patches
from provenn.data.patches import wide_patches as wide_patches
from provenn.tasks.base import (
    LABEL,
    PREDICTED,
    HeldOut,
    Portable,
    Scores,
    Task,
    TaskData,
    blind_accuracy,
    count_examples,
    device_of,
    fingerprint,
    join_scores,
    report_classes,
    split_indices,
)
from provenn.tasks.meta import Images
from provenn.tasks.portable import Standardising, calibration_images, portable_images, standardise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Mean and deviation of ImageNet's red, green and blue, which published weights expect.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_SIZE = 224
EMBEDDED = {
    "digits": "1,797 handwritten digits of 8×8 pixels (scikit-learn, from the UCI repository); 10 classes",
    "patches": "6,720 grey patches of 32×32 pixels from 16 photographs (scikit-image, scikit-learn): which one is it?",
}
PATCHES = {"train": 280, "val": 40, "test": 100}  # of each photograph
LARGEST_CHECKED = 20_000  # images; a larger folder is read as training goes, for a first look at all would take hours
MEMORY = 2**30  # bytes of decoded images that are kept


class ImageClassification(Task):
    """Cross-entropy on labels; accuracy, and top-5 accuracy where there are more than five classes."""

    name = "image-classification"
    meta_schema = Images
    metric = "accuracy"
    higher_is_better = True
    augments = smooths = True
    embedded = EMBEDDED
    reads = (
        "a folder with one sub-folder of images for each class (or train/, val/ and test/ folders of such), "
        "or CIFAR's binary files"
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
        """The embedded data set of that name, or a folder of images per class.

        Args:
            source: "digits", "patches", or a folder. `train`, `val` (or `valid`) and `test` in it are honoured; what is
                missing is cut from `train`, class by class. Where there is `val` but no `test`, `val` is the test.
            seed: of the split.
            size: of a folder, side of the square that the model sees; by default `largest`, or less where the images
                are smaller, and 32 for CIFAR; of patches their side, 8 to 40.
            largest: of a folder, pixels.
            skip_broken: of a folder, name the images that cannot be read and go on without them.
        """
        named = self._named(source)
        for name, side in (("size", size), ("largest", largest)):
            if side is not None and side < 1:
                raise UserError(f"{name} must be at least 1 pixel, got {side}")
        if named == "digits":
            if size not in (None, 8):
                raise UserError(f"digits are images of 8×8 pixels: leave size out, got {size}")
            return _digits(seed)
        if named == "patches":
            return _patches(seed, size or 32)
        if files_in(Path(named)) is not None:
            return _cifar(Path(named), seed, size or SIDE)
        return _folder(Path(named), seed, size, largest, skip_broken)

    def loss(self, model: nn.Module, batch: Any, smoothing: float = 0.0) -> Tensor:
        """Of labels, or of a row of shares of the classes each, as mixing gives them."""
        images, labels = batch
        return F.cross_entropy(model(images), labels, label_smoothing=smoothing)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Whether the likeliest class of each image is right, and one of the five likeliest; nats of the right one."""
        device, rows = device_of(model), []
        for images, labels in DataLoader(dataset, batch_size=batch_size):
            logits, labels = model(images.to(device)).float(), labels.to(device)
            likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices
            right = likeliest == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="none")
            rows.append([right[:, 0].double(), loss.double(), right.any(1).double(), labels, likeliest[:, 0]])
        names = ("accuracy", "loss", "top5", LABEL, PREDICTED)
        scores = join_scores(names, rows)
        return scores if logits.shape[1] > 5 else {name: scores[name] for name in names if name != "top5"}

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
        """As in `Task`; `size`: side of the square that the model sees, by default what its weights say."""
        named = self._named(source)
        if size is not None and size < 1:
            raise UserError(f"size must be at least 1 pixel, got {size}")
        meta = {**meta, "size": size or meta["size"]}
        if named == "digits":
            return _test_digits(meta, seed)
        if named == "patches":
            return _test_patches(meta, seed)
        root = Path(named)
        if files_in(root) is not None:
            content = read_cifar(root)
            numbers = class_numbers(root, content.classes, meta["classes"])
            labels = np.array([numbers[content.classes[label]] for label in content.test_labels])
            images = CifarImages(content.test, labels, meta)
            return HeldOut(images, f"the test split of {root}, at {meta['size']}×{meta['size']} pixels")
        parts = _given(root, skip_broken)
        if not whole:
            parts = with_splits(root, parts, seed)
        split = next(name for name in ("test", "val", "train") if name in parts)
        numbers = class_numbers(root, list(parts[split]), meta["classes"])
        files = [(file, numbers[name]) for name, listed in parts[split].items() for file in listed]
        which = "all" if split == "train" else f"the {split} split"
        return HeldOut(ImageFiles(files, meta), f"{which} of {root}, at {meta['size']}×{meta['size']} pixels")

    def dummy_baseline(self, data: TaskData) -> float:
        """Accuracy without a look at the image: the commonest class, or a guess."""
        return blind_accuracy(_labels(data.train), _labels(data.test))

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        channels = options.get("in_channels", 3)
        return {
            "classes": [f"class {index}" for index in range(options.get("num_classes", 1000))],
            "size": options.get("image_size", IMAGENET_SIZE),
            "channels": channels,
            "mean": list(IMAGENET_MEAN) if channels == 3 else [0.0] * channels,
            "std": list(IMAGENET_STD) if channels == 3 else [1.0] * channels,
        }

    def example(self, file: Path, meta: dict[str, Any]) -> Float[Tensor, "1 channels size size"]:
        return _standard(_see(read_pixels(file, meta["channels"]), meta["size"]), meta)[None]

    def predict(self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Path], output: Path | None) -> str:
        """The most likely classes of each image; `output` (.csv) gets the probability of every class.

        A folder among the inputs stands for the images in it.
        """
        files = [file for given in inputs for file in (images_in(given) if given.is_dir() else [given])]
        device = device_of(model)

        def shares() -> Iterator[tuple[str, list[float]]]:
            for file in progress.track(files, "predicting", total=len(files)):
                image = _as_bright_as_known(file, self.example(file, meta), meta)
                with torch.no_grad():
                    row = _shares(model, image.to(device))[0].tolist()
                yield str(file), row

        return report_classes(shares(), meta["classes"], inputs, output)

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From `image` in 0…1 to `probabilities` (batch, classes)."""
        system = Classifier(model, meta["mean"], meta["std"])
        strides = getattr(model, "strides", None)
        return portable_images(
            system, ["probabilities"], meta, strides, lambda image: _shares(model, standardise(image, meta))
        )

    def calibration(
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, options: dict[str, Any] | None = None
    ) -> TaskData:
        return calibration_images(self, source, meta, seed=seed, options=options, of_one_size=("digits",))

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """Test images with what the model says, mistakes first."""
        from matplotlib.figure import Figure

        classes, mean, std = data.meta["classes"], _column(data.meta["mean"]), _column(data.meta["std"])
        count = min(96, count_examples(data.test))
        pairs = [data.test[index] for index in range(count)]
        images, labels = torch.stack([image for image, _ in pairs]), torch.tensor([int(label) for _, label in pairs])
        with torch.no_grad():
            chance, guess = model(images.to(device_of(model))).softmax(1).cpu().max(1)
        order = (guess == labels).long().argsort(stable=True)[:24]
        figure = Figure(figsize=(12, 1.9 * math.ceil(len(order) / 8)), layout="constrained")
        for cell, index in enumerate(order.tolist()):
            axes = figure.add_subplot(math.ceil(len(order) / 8), 8, cell + 1)
            axes.imshow((images[index] * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(2).numpy(), cmap="gray")
            right = guess[index] == labels[index]
            said = f"{classes[int(guess[index])]} {chance[index]:.0%}"
            axes.set_title(said if right else f"✗ {said}\nis {classes[int(labels[index])]}", fontsize=9)
            axes.title.set_color("black" if right else "#b00020")
            axes.set_axis_off()
        return figure


class Classifier(Standardising):
    """A classifier, its model giving logits.

    Shapes: image (batch, channels, height, width) in 0…1 to probabilities (batch, classes).
    """

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return _shares(self.model, self.standard(image))


def _shares(model: nn.Module, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
    """The probability of each class, of standardised images."""
    return model(images).softmax(1)


def _labels(dataset: Dataset) -> Int[Tensor, " images"]:
    if isinstance(dataset, CifarImages):
        return dataset.labels
    if isinstance(dataset, ImageFiles):  # no need to decode the images
        return torch.tensor([label for _, label in dataset.files])
    count = count_examples(dataset)
    return torch.tensor([int(dataset[index][1]) for index in range(count)])


def _as_bright_as_known(file: Path, image: Float[Tensor, "1 channels size size"], meta: dict[str, Any]) -> Tensor:
    """The image; a grey one far from the brightness of those learned from, as ink on paper is, is said to be so."""
    deviation = image.mean().item()
    if meta["channels"] == 1 and abs(deviation) > 1:
        mean, std = meta["mean"][0], meta["std"][0]
        than = f"{'brighter' if deviation > 0 else 'darker'} than what was learned from"
        progress.say(
            f"{file} is {than}: {mean + std * deviation:.2f} on average, beside {mean:.2f}; "
            "dark on light is not light on dark: invert it if they differ in that"
        )
    return image


def _column(values: Sequence[float]) -> Float[Tensor, "channels 1 1"]:
    return torch.tensor(values)[:, None, None]


def _digits(seed: int) -> TaskData:
    from sklearn.datasets import load_digits

    content = load_digits()
    images = torch.from_numpy(content.images.astype(np.float32))[:, None] / 16
    labels = torch.from_numpy(content.target.astype(np.int64))
    train, val, test = split_indices(len(images), (0.7, 0.1, 0.2), seed)
    mean, std = images[train].mean().item(), images[train].std().item()
    standard = (images - mean) / std
    parts = [TensorDataset(standard[part], labels[part]) for part in (train, val, test)]
    return TaskData(
        "digits",
        train=parts[0],
        val=parts[1],
        test=parts[2],
        fingerprint=fingerprint(images, labels, str(seed)),
        options={"num_classes": 10, "in_channels": 1},
        meta={"classes": [str(i) for i in range(10)], "size": 8, "channels": 1, "mean": [mean], "std": [std]},
        about="Handwritten digits of 8×8 pixels, grey. Real, but small and easy: 99 % is common.",
    )


def _test_digits(meta: dict[str, Any], seed: int) -> HeldOut:
    """The digits' test split on the scale of weights that may have been trained on others."""
    if (meta["channels"], meta["size"]) != (1, 8) or len(meta["classes"]) < 10:
        raise UserError(
            f"digits are grey images of 8×8 pixels in 10 classes; these weights take {meta['channels']} channel(s) "
            f"of {meta['size']}×{meta['size']} in {len(meta['classes'])}"
        )
    data = _digits(seed)
    images, labels = data.test.tensors  # type: ignore[attr-defined]  # a TensorDataset
    (mean,), (std,) = data.meta["mean"], data.meta["std"]
    numbers = class_numbers(Path("digits"), data.meta["classes"], meta["classes"])
    labels = torch.tensor([numbers[str(int(label))] for label in labels])
    scaled = (images * std + mean - meta["mean"][0]) / meta["std"][0]
    return HeldOut(TensorDataset(scaled, labels), "the test split of digits")


@lru_cache(maxsize=4)  # a study asks for them once a trial
def _drawn_patches(seed: int, side: int, counts: tuple[tuple[str, int], ...]) -> dict[str, tuple[Tensor, Tensor]]:
    return {split: photo_patches(split, count, side=side, seed=seed) for split, count in counts}


def _patches(seed: int, side: int) -> TaskData:
    if not 8 <= side <= 40:
        raise UserError(f"patches are squares of 8 to 40 pixels, got size {side}")
    parts = _drawn_patches(seed, side, tuple(PATCHES.items()))
    train, val, test = (TensorDataset(*part) for part in parts.values())
    return TaskData(
        "patches",
        train,
        val,
        test,
        fingerprint=fingerprint(*(tensor for part in parts.values() for tensor in part)),
        options={"num_classes": len(SOURCES), "in_channels": 1},
        meta={"classes": list(SOURCES), "size": side, "channels": 1, "mean": [0.5], "std": [0.2]},
        about=f"Grey patches of {side}×{side} pixels from 16 photographs, of equal brightness and contrast, turned and "
        "scaled: the class is the photograph. Training, validation and test are other parts of each.",
    )


def _test_patches(meta: dict[str, Any], seed: int) -> HeldOut:
    if meta["channels"] != 1 or meta["classes"] != list(SOURCES):
        raise UserError(
            f"patches are grey images of 16 photographs; these weights take {meta['channels']} channel(s) and know "
            f"{len(meta['classes'])} classes, such as {meta['classes'][0]!r}"
        )
    return HeldOut(_patches(seed, meta["size"]).test, "the test split of patches")


class CifarImages(Dataset):
    """CIFAR's images as the model sees them; for training padded by 4, cropped and mirrored (He et al., 2016).

    Args:
        images: as they were read.
        labels: one each.
        meta: mean and standard deviation of each channel, and the side of the square that the model sees.
        augment: for training.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "images 3 32 32"],
        labels: Int[np.ndarray, " images"],
        meta: dict[str, Any],
        augment: bool = False,
    ):
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        self.meta, self.augment = meta, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 size size"], int]:
        image, size = self.images[index], self.meta["size"]
        if size != image.shape[-1]:
            image = resize_pixels(image, size, size)
        if self.augment:
            top, left, mirrored = (int(torch.randint(count, ())) for count in (9, 9, 2))
            image = F.pad(image, (4, 4, 4, 4))[:, top : top + size, left : left + size]
            image = image.flip(2) if mirrored else image
        return _standard(image, self.meta), int(self.labels[index])


def _cifar(root: Path, seed: int, size: int = SIDE) -> TaskData:
    """A tenth of the training images is held out to validate with, as He et al. have it."""
    content = read_cifar(root)
    train, val = split_indices(len(content.train), (0.9, 0.1), seed)
    pixels = content.train[train].astype(np.float32) / 255
    meta = {
        "classes": content.classes,
        "size": size,
        "channels": 3,
        "mean": pixels.mean((0, 2, 3), dtype=np.float64).tolist(),
        "std": pixels.std((0, 2, 3), dtype=np.float64).tolist(),
    }
    return TaskData(
        str(root),
        CifarImages(content.train[train], content.train_labels[train], meta, augment=True),
        CifarImages(content.train[val], content.train_labels[val], meta),
        CifarImages(content.test, content.test_labels, meta),
        fingerprint=fingerprint(*content[:4]),
        options={"num_classes": len(content.classes), "in_channels": 3},
        meta=meta,
        about=f"CIFAR-{len(content.classes)}: {len(train):,} images to train, {len(val):,} to validate, "
        f"{len(content.test):,} to test",
    )


class ImageFiles(Dataset):
    """Images read from files: as the model sees them, or cropped and mirrored at random for training.

    Decoded images are kept in memory as far as `MEMORY` reaches.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], meta: dict[str, Any], augment: bool = False):
        self.files, self.meta, self.augment = list(files), meta, augment
        self.kept: dict[int, Tensor] = {}
        self.room = MEMORY
        self.least_area = 0.25  # of random crops

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "channels size size"], int]:
        file, label = self.files[index]
        image = self.kept.get(index)
        if image is None:
            image = shrink(read_pixels(file, self.meta["channels"]), _short_side(self.meta["size"]))
            if image.nbytes <= self.room:
                self.kept[index] = image
                self.room -= image.nbytes
        size = self.meta["size"]
        seen = random_crop(image, size, self.least_area) if self.augment else _see(image, size)
        return _standard(seen, self.meta), label


def _short_side(size: int) -> int:
    """The images are tested on the middle of a slightly larger one: 256 for 224."""
    return round(size * 256 / 224)


def shrink(image: UInt8[Tensor, "channels height width"], short: int) -> UInt8[Tensor, "channels height2 width2"]:
    """Scale, antialiased, so that the shorter side is `short`."""
    height, width = image.shape[1:]
    if min(height, width) == short:
        return image
    scale = short / min(height, width)
    return resize_pixels(image, max(short, round(height * scale)), max(short, round(width * scale)))


def _see(image: UInt8[Tensor, "channels height width"], size: int) -> UInt8[Tensor, "channels size size"]:
    """What the model sees of an image: the middle square of the shrunk one; all of one that has its size already."""
    if image.shape[1:] == (size, size):
        return image
    image = shrink(image, _short_side(size))
    top, left = ((length - size) // 2 for length in image.shape[1:])
    return image[:, top : top + size, left : left + size]


def random_crop(
    image: UInt8[Tensor, "channels height width"], size: int, least: float | int = 0.25
) -> UInt8[Tensor, "channels size size"]:
    """A random rectangle of `least` (a quarter) to all of the area, scaled to a square, mirrored one time in two.

    Its sides are as 3:4 to 4:3. Draws from torch's global generator, which the training loop seeds for each epoch.
    """
    height, width = image.shape[1:]
    draw = torch.rand(5).tolist()
    area = height * width * (least + (1 - least) * draw[0])
    ratio = math.exp((2 * draw[1] - 1) * math.log(4 / 3))
    tall = min(height, max(1, round(math.sqrt(area / ratio))))
    wide = min(width, max(1, round(math.sqrt(area * ratio))))
    top, left = int(draw[2] * (height - tall + 1)), int(draw[3] * (width - wide + 1))
    crop = resize_pixels(image[:, top : top + tall, left : left + wide], size, size)
    return crop.flip(2) if draw[4] < 0.5 else crop


def _standard(image: UInt8[Tensor, "channels h w"], meta: dict[str, Any]) -> Float[Tensor, "channels h w"]:
    return standardise(image.float() / 255, meta)


def _given(root: Path, skip_broken: bool = False) -> Splits:
    return given_splits(root, partial(images_in, skip_broken=skip_broken), "images")


def with_splits(root: Path, parts: Splits, seed: int) -> Splits:
    """The same, and what of train, val and test is missing cut from `train`."""
    check_splits(root, parts)
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
    missing = [split for split in ("val", "test") if split not in parts]
    return _cut(parts, missing, seed) if missing else parts


def class_numbers(root: Path, names: list[str], classes: list[str]) -> dict[str, int]:
    """The model's number of each class of a folder: by name, or in order where the weights know no names."""
    if set(names) <= set(classes):
        return {name: classes.index(name) for name in names}
    nameless = classes == [f"class {index}" for index in range(len(classes))]
    if nameless and len(names) == len(classes):
        return {name: index for index, name in enumerate(names)}
    if nameless:
        raise UserError(
            f"{root} has {len(names)} classes; these weights know {len(classes)}, which have no names: give a "
            f"folder for each, sorted as they were trained, or call yours 'class 0' to 'class {len(classes) - 1}'"
        )
    odd = next(name for name in names if name not in classes)
    some = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
    raise UserError(f"{root}: the model knows no class {odd!r}; it knows: {some}")


def _folder(root: Path, seed: int, size: int | None, largest: int, skip_broken: bool) -> TaskData:
    parts = with_splits(root, _given(root, skip_broken), seed)
    classes = list(parts["train"])
    files = {s: [(file, i) for i, name in enumerate(classes) for file in found[name]] for s, found in parts.items()}
    everything = sorted(file for listed in files.values() for file, _ in listed)
    size = size or usual_side(everything, largest)
    meta = {"classes": classes, "size": size, "channels": 3, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    sets = {split: ImageFiles(files[split], meta, augment=split == "train") for split in ("train", "val", "test")}
    if len(everything) <= LARGEST_CHECKED:
        with progress.bar("reading images", len(everything)) as advance:
            for images in sets.values():
                for index in range(len(images)):
                    images[index]  # names a damaged file now, not in the middle of training; keeps what was decoded
                    advance()
        checksum = fingerprint(*(part for f in everything for part in (str(f.relative_to(root)), f.read_bytes())))
    else:
        checksum = fingerprint(*(f"{f.relative_to(root)} {f.stat().st_size}" for f in everything))
    return TaskData(
        str(root),
        sets["train"],
        sets["val"],
        sets["test"],
        fingerprint=checksum,
        options={"num_classes": len(classes), "in_channels": 3},
        meta=meta,
        about=f"{len(everything)} images of {len(classes)} classes, seen at {size}×{size} pixels.",
    )


def _cut(parts: dict[str, dict[str, list[Path]]], missing: list[str], seed: int) -> dict[str, dict[str, list[Path]]]:
    """Cut the missing splits from `train`, 15 % each and at least one image of every class."""
    parts = {**parts, "train": dict(parts["train"]), **{split: {} for split in missing}}
    for name, files in parts["train"].items():
        if len(files) <= len(missing):
            raise UserError(
                f"the class {name!r} has {len(files)} image{'s' * (len(files) != 1)}; "
                f"cutting {' and '.join(missing)} from train needs {len(missing) + 1} or more"
            )
        order = split_indices(len(files), (1.0,), seed)[0]
        count = max(1, round(0.15 * len(files)))
        count = min(count, (len(files) - 1) // len(missing))
        for split in missing:
            parts[split][name] = [files[order.pop()] for _ in range(count)]
        parts["train"][name] = [files[index] for index in sorted(order)]
    return parts


def usual_side(files: Sequence[Path], largest: int) -> int:
    """So many pixels, or what the smaller half of the images allows; from a sample, without decoding."""
    return min(largest, int(np.median([min(size_of(file)) for file in files[:: max(1, len(files) // 200)]])))


TASK = ImageClassification()

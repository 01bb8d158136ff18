"""Volume segmentation: a volume in, a label volume in its own header out. Not a medical device."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import check_no_input, is_stream
from provenn.core.inputs import machine_memory
from provenn.data.images import SUFFIXES, Picture, images_in, read_pixels, write_image
from provenn.data.masks import IGNORED, palette
from provenn.nn.segmentation import full_logits
from provenn.papers.ms_guided_attention.task.brains import SIDE, TISSUES, draw_subjects
from provenn.papers.ms_guided_attention.task.measures import Agreement, agreement, dice
from provenn.papers.ms_guided_attention.task.subjects import (
    Labelled,
    Source,
    find_subjects,
    labelled,
    read_classes,
    read_subject,
    with_splits,
)
from provenn.papers.ms_guided_attention.task.volumes import (
    NIFTI,
    Volume,
    is_nifti,
    pictures_of,
    read_volume,
    stem_of,
    write_labels,
)
from provenn.tasks import Task, TaskData, count_examples, device_of, fingerprint
from provenn.tasks.base import CUT, HeldOut, Portable, Scores, check_share
from provenn.tasks.demos import Trial, save_shown
from provenn.tasks.meta import Masks
from provenn.tasks.portable import Standardising, portable_images, standardise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNTS = {"train": 16, "val": 4, "test": 16}  # of drawn subjects
FRAME = 256  # pixels of a slice in training, as in the paper
ANGLE = 30.0  # degrees
AUGMENTATIONS = ("released", "mirror", "none")
BATCH = 8  # slices at a time in prediction
SMALLEST = 16  # pixels a side that every network takes
MEASURES = ("dice", "volume_similarity", "mean_distance", "surface_distance", "hausdorff_95")
NOTICE = "Not a medical device: no use in diagnosis."
PIXELS, BLURS = 60_000, (1.0, 2.0, 4.0)  # of the dummy baseline: voxels it is fitted to, and widths in pixels


class VolumeMeta(Masks):
    """Of volume segmentation; `size` is the frame of training, `values` what the classes are called in files."""

    values: list[int] = Field(min_length=2)


class VolumeSegmentation(Task):
    """Cross-entropy of every voxel; the mean Dice of the classes but the first, over subjects."""

    name = "volume-segmentation"
    meta_schema = VolumeMeta
    metric = "dice"
    higher_is_better = True
    embedded = {  # noqa: RUF012
        "brains": "36 subjects drawn from the MNI152 brain: moved, lit and grained anew; one brain (extra medical)",
    }
    reads = "a folder of subjects with labels: NIfTI, DICOM series (CHAOS), or slices as pictures"
    into_folders = True

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        size: int | None = None,
        augmentation: str | None = None,
        val_share: float = CUT,
        test_share: float | None = None,
        channels: int = 1,
    ) -> TaskData:
        """The drawn subjects, or a folder in a layout of `find_subjects`.

        Args:
            source: "brains", or a folder; `train`, `val` and `test` in it are honoured, what is missing is cut from
                `train`, by subject.
            seed: of the split, or of the subjects.
            size: side of the square frame that slices are cropped or filled up to in training (256; of "brains" 64).
            augmentation: "released" mirrors up and down, left and right, and turns to ±30°, each one time in two;
                "mirror" is left and right alone, "none" nothing. Default: "released", of "brains" "mirror".
            val_share: of the subjects of `train`, what is cut from them for each missing split.
            test_share: the same for the test split alone; `val_share` by default.
            channels: images a voxel, such as the 4 sequences of the decathlon's brains.
        """
        named = self._named(source)
        augmentation = ("mirror" if named == "brains" else "released") if augmentation is None else augmentation
        if augmentation not in AUGMENTATIONS:
            raise UserError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {augmentation!r}")
        if size is not None and size < 16:
            raise UserError(f"size must be at least 16 pixels, got {size}")
        if isinstance(named, str):
            if size not in (None, SIDE) or channels != 1:
                raise UserError(f"slices of {named} are {SIDE}×{SIDE} pixels of one image: leave size and channels out")
            if val_share != CUT or test_share is not None:
                raise UserError(f"{named} has splits of its own: leave val_share and test_share out")
            return drawn(seed, COUNTS, augmentation)
        if not 1 <= channels <= 64:
            raise UserError(f"channels must be from 1 to 64, got {channels}")
        return _folder(named, seed, size or FRAME, augmentation, (val_share, test_share), channels)

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """Cross-entropy, and soft Dice times `model.dice` where a model has that; of slices, or of whole subjects."""
        images, masks = (part.flatten(0, 1) if batch[0].ndim == 5 else part for part in batch)
        logits, masks = full_logits(model, images).float(), masks.long()
        total = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
        entropy = total / (masks != IGNORED).sum().clamp_min(1)
        weight = float(getattr(model, "dice", 0.0))
        return entropy + weight * soft_dice(logits, masks) if weight else entropy

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each subject and class but the first: the measures of `agreement`; not a number where neither has it."""
        subjects: Subjects = dataset  # type: ignore[assignment]  # a data set of this task
        rows = []
        for subject in progress.track(subjects.subjects, "predicting"):
            predicted = predict_slices(model, subject.image, subjects.meta, min(batch_size, BATCH))
            rows.append(_of_classes(predicted, subject, len(subjects.meta["classes"])))
        values = np.asarray(rows, np.float64)
        return {name: values[:, :, index] for index, name in enumerate(MEASURES)}

    def summary(self, scores: Scores) -> dict[str, float]:
        """Means over subjects of the mean over classes; `dice_std` is the deviation of Dice over subjects."""
        means = {name: of_subjects(scores[name]) for name in MEASURES}
        return {name: float(mean.mean()) for name, mean in means.items()} | {"dice_std": float(means["dice"].std())}

    def class_scores(self, scores: Scores, classes: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the table of classes, the worst first."""
        rows: list[list[Any]] = []
        for index in range(scores["dice"].shape[1]):
            there = ~np.isnan(scores["dice"][:, index])
            if there.any():
                name = classes[index + 1] if index + 1 < len(classes) else f"class {index + 1}"
                means = [float(scores[measure][there, index].mean()) for measure in MEASURES]
                rows.append([name, int(there.sum()), *means, float(scores["dice"][there, index].std())])
        rows.sort(key=lambda row: row[2])
        columns = ["class", "subjects", "Dice", "volume similarity", "MSD (voxels)", "ASSD (mm)", "HD95 (mm)"]
        return [*columns, "deviation of Dice"], rows

    def dummy_baseline(self, data: TaskData) -> float:
        """Dice of a classifier of single voxels: brightness, the same blurred three times, and place; no network."""
        train: Slices = data.train  # type: ignore[assignment]  # data sets of this task
        test: Subjects = data.test  # type: ignore[assignment]
        return voxel_dice(train.subjects, test.subjects, len(data.meta["classes"]))

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        val_share: float = CUT,
        test_share: float | None = None,
    ) -> HeldOut:
        """As in `Task`; volumes are judged whole, at their own size."""
        named = self._named(source)
        if isinstance(named, str):
            if meta["classes"] != list(TISSUES) or meta["channels"] != 1:
                raise UserError(
                    f"the weights tell {', '.join(meta['classes'])} in {meta['channels']} image(s) a voxel; "
                    f"{named} has {', '.join(TISSUES)} in 1"
                )
            test = _drawn("test", COUNTS["test"], seed)
            return HeldOut(Subjects(test, meta), f"the test split of {named}, whole volumes")
        splits = find_subjects(named)
        splits = splits if whole else with_splits(named, splits, seed, *_shares(val_share, test_share))
        split = next(name for name in ("test", "val", "train") if name in splits)
        which = "all" if split == "train" else f"the {split} split"
        subjects = [
            read_subject(one, meta["values"], meta["channels"])
            for one in progress.track(splits[split], "reading subjects")
        ]
        return HeldOut(Subjects(subjects, meta), f"{which} of {named}, whole volumes")

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        count, channels = int(options.get("num_classes", 5)), int(options.get("in_channels", 1))
        chaos = count == 5
        return {
            "classes": ["background", "liver", "right kidney", "left kidney", "spleen"]
            if chaos
            else [f"class {index}" for index in range(count)],
            "values": [0, 63, 126, 189, 252] if chaos else list(range(count)),
            "size": FRAME,
            "channels": channels,
            "mean": [0.0] * channels,  # the authors' script takes grey levels in 0…1 as they are
            "std": [1.0] * channels,
        }

    def example(self, file: Path, meta: dict[str, Any]) -> Float[Tensor, "1 channels height width"]:
        """A picture, or the middle slice of a volume."""
        if file.is_dir() or file.suffix.lower() not in SUFFIXES:
            slices = read_volume(file, meta["channels"]).slices
            return standardise(torch.from_numpy(slices[len(slices) // 2]), meta)[None]
        return standardise(read_pixels(file, meta["channels"]).float() / 255, meta)[None]

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        overlay: bool = False,
        truth: Path | None = None,
    ) -> str:
        """The label volume of each volume, in its own header, affine and axes.

        Args:
            model, meta, inputs, output: as in `Task.predict`. A NIfTI file or a DICOM series gives .nii or .nii.gz,
                pictures give pictures. An input folder is one volume.
            overlay: write slices with their classes in colour beside each, as `…_overlay.png`.
            truth: labels of the one input, to say how near the prediction is: a NIfTI file, or pictures of slices.
        """
        if truth is not None and len(inputs) != 1:
            raise UserError(f"--truth is the labels of one volume; got {len(inputs)}")
        if overlay and output is None:
            raise UserError("an overlay needs a path: give a file or a folder with -o")
        targets = _targets(inputs, output, overlay)
        lines = []
        for given, target in zip(progress.track(inputs, "predicting"), targets, strict=True):
            volume = read_volume(given, meta["channels"])
            labels = predict_slices(model, volume.slices, meta, BATCH)
            lines.append(f"{given}: {_in_a_line(labels, volume, meta['classes'])}")
            if truth is not None:
                lines += _beside(labels, volume, truth, meta)
            if target is not None:
                write_labels(target, labels, volume, meta["values"])
                if overlay:
                    write_image(_overlay_of(target), Picture(strip(volume.slices, labels, meta)))
        return "\n".join([*lines, *([] if output is None else [f"wrote {output}"]), NOTICE])

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From slices `image` in 0…1 to `probabilities` of the classes (batch, classes, height, width)."""
        system = Probabilities(model, meta["mean"], meta["std"])
        return portable_images(system, ["probabilities"], meta, [getattr(model, "multiple", 1)], system)

    def calibration(
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, options: dict[str, Any] | None = None
    ) -> TaskData:
        size = {} if source in self.embedded else {"size": meta["size"], "channels": meta["channels"]}
        return self.load(source, seed=seed, **{"augmentation": "none", **size, **(options or {})})

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """The middle slice of test subjects, its true classes and the predicted ones."""
        from matplotlib.figure import Figure

        test: Subjects = data.test  # type: ignore[assignment]  # a data set of this task
        count = min(6, count_examples(test))
        figure = Figure(figsize=(1.9 * count, 6), layout="constrained")
        axes = figure.subplots(3, count, squeeze=False)
        top = len(data.meta["classes"]) - 1
        for column, subject in enumerate(test.subjects[:count]):
            middle = len(subject.image) // 2
            part = subject.image[middle : middle + 1]
            axes[0, column].imshow(part[0, 0], cmap="gray", vmin=0, vmax=1)
            shown = np.where(subject.mask[middle] == IGNORED, 0, subject.mask[middle])
            axes[1, column].imshow(shown, cmap="viridis", vmin=0, vmax=top)
            axes[2, column].imshow(predict_slices(model, part, data.meta, 1)[0], cmap="viridis", vmin=0, vmax=top)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        for row, label in enumerate(("image", "true", "predicted")):
            axes[row, 0].set_ylabel(label)
        return figure


TASK = VolumeSegmentation()


class Subjects(Dataset):
    """Whole subjects, for tests: an example is the slices of one and its class numbers.

    Args:
        subjects: in memory.
        meta: as the network sees them.
    """

    def __init__(self, subjects: Sequence[Labelled], meta: dict[str, Any]):
        self.subjects, self.meta = list(subjects), meta

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "slices channels h w"], UInt8[Tensor, "slices h w"]]:
        subject = self.subjects[index]
        return standardise(torch.from_numpy(subject.image).float(), self.meta), torch.from_numpy(subject.mask)


class Slices(Dataset):
    """Single slices of subjects in a frame, augmented, for training.

    Draws from torch's global generator, which the training loop seeds for each epoch.

    Args:
        subjects: in memory.
        meta: as the network sees them.
        augmentation: as in `VolumeSegmentation.load`.
    """

    def __init__(self, subjects: Sequence[Labelled], meta: dict[str, Any], augmentation: str):
        self.subjects, self.meta, self.augmentation = list(subjects), meta, augmentation
        self.places = [(one, level) for one, subject in enumerate(subjects) for level in range(len(subject.image))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "channels size size"], UInt8[Tensor, "size size"]]:
        one, level = self.places[index]
        image = torch.from_numpy(self.subjects[one].image[level]).float()
        mask = torch.from_numpy(self.subjects[one].mask[level])
        image, mask = framed(image, mask, self.meta["size"], jitter=self.augmentation != "none")
        if self.augmentation != "none":
            image, mask = moved(image, mask, self.augmentation)
        return standardise(image, self.meta), mask


def framed(
    image: Float[Tensor, "channels height width"], mask: UInt8[Tensor, "height width"], size: int, *, jitter: bool
) -> tuple[Float[Tensor, "channels size size"], UInt8[Tensor, "size size"]]:
    """A square of a slice: cropped, in the middle or at random; what lies beyond the slice is 0, and not judged."""
    parts = []
    for length in mask.shape:
        spare = length - size
        parts.append(int(torch.randint(spare + 1, ())) if spare > 0 and jitter else max(0, spare // 2))
    image = image[:, parts[0] : parts[0] + size, parts[1] : parts[1] + size]
    mask = mask[parts[0] : parts[0] + size, parts[1] : parts[1] + size]
    rows, columns = size - mask.shape[0], size - mask.shape[1]
    margins = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return F.pad(image, margins), F.pad(mask, margins, value=IGNORED)


def moved(image: Tensor, mask: Tensor, augmentation: str) -> tuple[Tensor, Tensor]:
    """Mirrored and turned as the authors do, each one time in two; masks to the nearest pixel."""
    draw = torch.rand(4).tolist()
    if draw[0] < 0.5:
        image, mask = image.flip(-1), mask.flip(-1)
    if augmentation == "released" and draw[1] < 0.5:
        image, mask = image.flip(-2), mask.flip(-2)
    if augmentation == "released" and draw[2] < 0.5:
        angle = np.deg2rad(ANGLE * (2 * draw[3] - 1))
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        turn = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]])  # of a square frame: no aspect
        grid = F.affine_grid(turn, [1, 1, *mask.shape], align_corners=False)
        image = F.grid_sample(image[None], grid, mode="bilinear", align_corners=False)[0]
        # One more than a class's number, so that what comes from beyond the frame, 0, is told from a class.
        labels = torch.where(mask == IGNORED, 0, mask.float() + 1)[None, None]
        turned = F.grid_sample(labels, grid, mode="nearest", align_corners=False)[0, 0]
        mask = torch.where(turned == 0, IGNORED, turned - 1).to(torch.uint8)
    return image, mask


def soft_dice(logits: Float[Tensor, "batch classes h w"], masks: Tensor) -> Float[Tensor, ""]:
    """1 − the mean over classes of 2Σpq / (Σp + Σq), over the pixels of a batch that are judged."""
    judged = (masks != IGNORED)[:, None]
    true = F.one_hot(torch.where(masks == IGNORED, 0, masks), logits.shape[1]).permute(0, 3, 1, 2) * judged
    likely = logits.softmax(1) * judged
    both, sums = (likely * true).sum((0, 2, 3)), (likely + true).sum((0, 2, 3))
    return 1 - ((2 * both + 1) / (sums + 1)).mean()


@torch.no_grad()
def predict_slices(
    model: nn.Module, slices: Float[np.ndarray, "slices channels h w"], meta: dict[str, Any], batch_size: int
) -> UInt8[np.ndarray, "slices h w"]:
    """The likeliest class of every voxel, slice by slice; small slices are continued by their mirror image."""
    rows, columns = slices.shape[2:]
    missing = [max(0, SMALLEST - side) for side in (rows, columns)]
    if any(missing):
        slices = np.pad(slices, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1])), "symmetric")
    labels = []
    for start in range(0, len(slices), batch_size):
        part = torch.from_numpy(np.ascontiguousarray(slices[start : start + batch_size])).float()
        logits = full_logits(model, standardise(part, meta).to(device_of(model)))
        labels.append(logits.argmax(1)[:, :rows, :columns].to(torch.uint8).cpu().numpy())
    return np.concatenate(labels)


def _of_classes(predicted: np.ndarray, subject: Labelled, classes: int) -> list[list[float]]:
    """The measures of each class but the first; what is not judged counts on neither side."""
    judged = subject.mask != IGNORED
    found: list[list[float]] = []
    for index in range(1, classes):
        one: Agreement | None = agreement((predicted == index) & judged, subject.mask == index, subject.spacing)
        found.append([float("nan")] * len(MEASURES) if one is None else list(one))
    return found


def of_subjects(values: Float[np.ndarray, "subjects classes"]) -> Float[np.ndarray, " judged"]:
    """The mean over the classes that a subject, or its prediction, has; subjects without any are left out."""
    there = ~np.isnan(values)
    counts = there.sum(1)
    return np.where(there, values, 0).sum(1)[counts > 0] / counts[counts > 0]


@lru_cache(maxsize=64)  # a study asks for them once a trial: three splits of each seed
def _drawn(split: str, count: int, seed: int) -> tuple[Labelled, ...]:
    return tuple(
        Labelled(f"{split} {index}", subject.image[:, None], subject.mask, subject.spacing)
        for index, subject in enumerate(draw_subjects(split, count, seed))
    )


def drawn(seed: int, counts: dict[str, int], augmentation: str) -> TaskData:
    """So many drawn subjects to train, validate and test."""
    parts = {split: _drawn(split, count, seed) for split, count in counts.items()}
    images = np.concatenate([subject.image.ravel() for subject in parts["train"]])
    meta = {
        "classes": list(TISSUES),
        "values": list(range(len(TISSUES))),
        "size": SIDE,
        "channels": 1,
        "mean": [float(images.mean())],
        "std": [float(images.std())],
    }
    return TaskData(
        "brains",
        Slices(parts["train"], meta, augmentation),
        Subjects(parts["val"], meta),
        Subjects(parts["test"], meta),
        fingerprint=fingerprint(*(array for part in parts.values() for one in part for array in (one.image, one.mask))),
        options={"num_classes": len(TISSUES), "in_channels": 1},
        meta=meta,
        about=f"{counts['train']} subjects to train on, {counts['test']} to test, each 18 axial slices of "
        f"{SIDE}×{SIDE} pixels at 3 mm. All are the MNI152 template, moved, lit and grained anew: the spread over "
        "subjects is the generator's. They are no patients.",
    )


def _shares(val_share: float, test_share: float | None) -> tuple[float, float | None]:
    check_share(val_share)
    if test_share is not None and not 0 < test_share <= 0.25:
        raise UserError(f"test_share must be more than 0 and at most 0.25, got {test_share}")
    return val_share, test_share


def _folder(
    root: Path, seed: int, size: int, augmentation: str, shares: tuple[float, float | None], channels: int
) -> TaskData:
    splits = with_splits(root, find_subjects(root), seed, *_shares(*shares))
    values, names = read_classes(root, [source for part in splits.values() for source in part])
    read = {split: _in_memory(part, values, channels) for split, part in splits.items()}
    if not any((subject.mask != IGNORED).any() for subject in read["train"]):
        raise UserError(f"{root}: nothing of the training labels is judged")
    # Every 17th voxel is enough for a mean, and keeps memory bounded; 17 divides no usual side.
    flat = np.concatenate([one.image.transpose(1, 0, 2, 3).reshape(channels, -1)[:, ::17] for one in read["train"]], 1)
    meta = {
        "classes": names,
        "values": values,
        "size": size,
        "channels": channels,
        "mean": flat.mean(1).astype(float).tolist(),
        "std": np.maximum(flat.std(1), 1e-6).astype(float).tolist(),
    }
    checksums = [f"{one.name} {fingerprint(one.image, one.mask)}" for part in read.values() for one in part]
    count = sum(map(len, read.values()))
    return TaskData(
        str(root),
        Slices(read["train"], meta, augmentation),
        Subjects(read["val"], meta),
        Subjects(read["test"], meta),
        fingerprint=fingerprint(*sorted(checksums)),
        options={"num_classes": len(values), "in_channels": channels},
        meta=meta,
        about=f"{count} subjects, {len(read['train'])} to train on in a frame of {size} pixels; no subject is in two "
        "splits, and volumes are judged whole.",
    )


def _in_memory(sources: Sequence[Source], values: Sequence[int], channels: int) -> list[Labelled]:
    subjects: list[Labelled] = []
    held = 0
    for source in progress.track(sources, "reading subjects"):
        subjects.append(read_subject(source, values, channels))
        held += subjects[-1].image.nbytes + subjects[-1].mask.nbytes
        needed = held * len(sources) / len(subjects)
        if needed > 0.7 * machine_memory():
            raise UserError(
                f"{len(sources)} subjects like {source.name} take {needed / 1e9:.0f} GB of memory; give fewer"
            )
    return subjects


def voxel_dice(train: Sequence[Labelled], test: Sequence[Labelled], classes: int) -> float:
    """Mean Dice on `test` of a classifier of single voxels, trees over brightness, blurs and place."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    rng = np.random.default_rng(0)
    each = max(1, PIXELS // len(train))
    parts = []
    for subject in train:
        judged = np.flatnonzero(subject.mask.ravel() != IGNORED)
        chosen = rng.choice(judged, min(each, len(judged)), replace=False)
        parts.append((_features(subject)[chosen], subject.mask.ravel()[chosen]))
    model = HistGradientBoostingClassifier(max_iter=40, random_state=0, early_stopping=False)
    model.fit(np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]))
    rows = []
    for subject in test:
        predicted = model.predict(_features(subject)).reshape(subject.mask.shape)
        judged = subject.mask != IGNORED
        rows.append([dice((predicted == k) & judged, subject.mask == k) for k in range(1, classes)])
    return float(of_subjects(np.asarray(rows)).mean())


def _features(subject: Labelled) -> Float[np.ndarray, "voxels features"]:
    from scipy.ndimage import gaussian_filter

    image = subject.image[:, 0]
    parts = [image, *(gaussian_filter(image, (0, blur, blur)) for blur in BLURS)]
    places = np.meshgrid(*(np.linspace(0, 1, n, dtype=np.float32) for n in image.shape), indexing="ij")
    return np.stack([*parts, *places], -1).reshape(image.size, -1)


class Probabilities(Standardising):
    """A network with its standardisation, as it is exported: slices in 0…1 to probabilities of the classes."""

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes h w"]:
        return self.model(self.standard(image)).softmax(1)


def _targets(inputs: Sequence[Path], output: Path | None, overlay: bool) -> list[Path | None]:
    """Where the labels of each volume go, all known before anything is predicted: a file of one, a folder of several.

    A folder of pictures gives a folder of pictures; of one such folder the labels lie in `output` itself.
    """
    if output is None:
        return [None] * len(inputs)
    if is_stream(output):
        raise UserError(f"a label volume is written to a file or a folder, not to {output}")
    ending = NIFTI[1] if is_nifti(output) else output.suffix.lower()
    single = ending in (NIFTI[1], ".png")
    if single and len(inputs) > 1:
        raise UserError(f"{len(inputs)} volumes need a folder with -o, got {output}")
    if not single and ending and not output.is_dir():
        raise UserError(f"labels are written as .nii, .nii.gz or .png, got {output.name}")
    targets: list[Path | None] = []
    for given in inputs:
        slices = pictures_of(given)
        kind = NIFTI[1] if slices is None else ".png"
        if single and ending != kind and kind == ".png":
            raise UserError(f"{given} is of pictures, which do not say where they lie: write to .png or a folder")
        if single and ending != kind:
            raise UserError(f"{given} gives a label volume: write it as .nii or .nii.gz, not {output.name}")
        if single and given.is_dir() and slices is not None:
            raise UserError(f"{given} has {len(slices)} slices: give a folder with -o")
        if single:
            targets.append(output)
        elif slices is None or not given.is_dir():
            targets.append(output / f"{stem_of(given)}{kind}")
        else:
            targets.append(output if len(inputs) == 1 else output / given.name)
    files = [file for given, target in zip(inputs, targets) for file in _written(given, target, overlay)]
    if len(set(files)) < len(files):
        raise UserError("two of the volumes have the same name, and so would their labels: predict them one by one")
    for file in files:
        check_no_input(file, [*inputs, *(slice for given in inputs for slice in pictures_of(given) or ())])
    return targets


def _written(given: Path, target: Path | None, overlay: bool) -> list[Path]:
    """The files that the labels of a volume are written to."""
    if target is None:
        return []
    slices = pictures_of(given) if given.is_dir() else None
    files = [target] if slices is None else [target / f"{file.stem}.png" for file in slices]
    return [*files, *([_overlay_of(target)] if overlay else [])]


def _overlay_of(target: Path) -> Path:
    return target.with_name(f"{stem_of(target)}_overlay.png")


def _in_a_line(labels: np.ndarray, volume: Volume, classes: Sequence[str]) -> str:
    """Voxels of each class, and millilitres where the file says how large a voxel is."""
    millilitres = float(np.prod(volume.spacing)) / 1e3
    parts = []
    for index, name in enumerate(classes):
        voxels = int((labels == index).sum())
        if index and voxels:
            parts.append(f"{name} {voxels * millilitres:.1f} ml" if volume.affine is not None else f"{name} {voxels:,}")
    unit = "" if volume.affine is not None or not parts else " (voxels)"
    return (", ".join(parts) or f"nothing but {classes[0]}") + unit


def _beside(labels: np.ndarray, volume: Volume, truth: Path, meta: dict[str, Any]) -> list[str]:
    """A line for each class: how near the prediction is to labels in a NIfTI file or in pictures."""
    true = labelled(truth.name, volume, images_in(truth) if truth.is_dir() else [truth], meta["values"])
    unit = "mm" if volume.affine is not None else "pixels"
    lines = []
    for name, row in zip(meta["classes"][1:], _of_classes(labels, true, len(meta["classes"]))):
        if not np.isnan(row[0]):
            lines.append(f"  {name}: Dice {row[0]:.3f}, ASSD {row[3]:.2f} {unit}, HD95 {row[4]:.2f} {unit}")
    return lines


def strip(
    slices: Float[np.ndarray, "slices channels h w"], labels: UInt8[np.ndarray, "slices h w"], meta: dict[str, Any]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Up to eight slices side by side, and under them the same with their classes in colour."""
    chosen = np.unique(np.linspace(0, len(slices) - 1, min(8, len(slices))).round().astype(int))
    grey = np.rint(255 * np.concatenate(list(slices[chosen, 0]), 1)).clip(0, 255).astype(np.uint8)
    grey = np.repeat(grey[..., None], 3, 2)
    told = np.concatenate(list(labels[chosen]), 1)
    colours = np.asarray(palette(len(meta["classes"])), np.float32)
    mixed = np.where((told > 0)[..., None], 0.5 * grey + 0.5 * colours[told], grey)
    return np.concatenate([grey, np.rint(mixed).astype(np.uint8)])


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the classes of a slice laid over it, and how much each covers."""
    size, meta = save_shown(trial.file), trial.meta
    slices = read_volume(trial.file, meta["channels"]).slices
    labels = predict_slices(trial.model, slices, meta, 1)
    write_image(Path("overlay.png"), Picture(strip(slices, labels, meta)[slices.shape[2] :]))
    shares = np.bincount(labels.ravel(), minlength=len(meta["classes"])) / labels.size
    colours = palette(len(meta["classes"]))
    found = [(meta["classes"][k], float(shares[k]), list(colours[k])) for k in np.argsort(-shares) if shares[k]]
    return {"kind": "mask", "size": size, "shares": found}

"""Subjects with labels in the layouts that people keep them in, split by subject."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import read_text
from provenn.data.images import SUFFIXES, images_in
from provenn.data.masks import IGNORED, read_mask
from provenn.papers.ms_guided_attention.task.volumes import (
    Volume,
    axial_affine,
    dicom_slices,
    is_nifti,
    natural,
    read_dicom,
    read_nifti,
    read_pictures,
    read_sequences,
    stem_of,
    turned_slices,
)
from provenn.tasks import split_indices

# Folders of images, and of labels, as they are called
IMAGES = ("images", "imagesTr", "Img", "img", "Training dataset")
LABELS = ("labels", "labelsTr", "masks", "GT", "gt", "Ground truth")
PARTS = {"train": ("train", "training"), "val": ("val", "validation"), "test": ("test", "testing")}
SLICE = re.compile(r"(.+?)[_-]?(?:slice)?[_-]?(\d+)$")  # Subj_21slice_22, patient3_007
AROUND = re.compile(r"[-_](label|labels|seg|mask|gt)$", re.IGNORECASE)  # training_axial_crop_pat0-label
SEQUENCES = ("flair", "t1", "t1ce", "t2")  # of BraTS, in the order in which the decathlon has them
OF_BRATS = re.compile(r"(.+)_seg$")
# What public sets call their classes, where their files do not say: by a mark in the path of a subject's image.
KNOWN = (
    (
        re.compile(r"/MR/[^/]+/T[12]"),
        {0: "background", 63: "liver", 126: "right kidney", 189: "left kidney", 252: "spleen"},
    ),
    (re.compile(r"/CT/[^/]+/DICOM_anon"), {0: "background", 255: "liver"}),
    (re.compile(r"axial_?(crop|full)?_pat\d"), {0: "background", 1: "myocardium", 2: "blood pool"}),
    (re.compile(r"Brats\d\d_"), {0: "background", 1: "necrotic core", 2: "oedema", 4: "enhancing tumour"}),
)
Splits = dict[str, list["Source"]]
MOST = 2**24  # what label files hold to the digit in single precision
CLASSES, DESCRIPTION = "classes.txt", "dataset.json"


@dataclass(frozen=True)
class Source:
    """Where a subject's images and labels lie.

    Args:
        name: of the subject.
        image: NIfTI files, one or one for each sequence, a series of DICOM slices, or pictures of slices.
        labels: a NIfTI file, or pictures of slices.
    """

    name: str
    image: tuple[Path, ...]
    labels: tuple[Path, ...]


@dataclass(frozen=True)
class Labelled:
    """A subject in memory.

    Args:
        name: of the subject.
        image: in 0…1.
        mask: class numbers, 255 where nothing is judged.
        spacing: millimetres between slices, rows and columns.
    """

    name: str
    image: Float32[np.ndarray, "slices channels height width"]
    mask: UInt8[np.ndarray, "slices height width"]
    spacing: tuple[float, float, float]


def find_subjects(root: Path) -> Splits:
    """Subjects of a folder, by split where it has some; else all are "train".

    - `images/` and `labels/` (also `imagesTr` and `labelsTr`, `Img` and `GT`) of NIfTI files of the same names, or of
      pictures of slices called by subject and number, such as `Subj_21slice_22.png`.
    - One folder of NIfTI files, of which the labels end in `-label`, or two, `Training dataset` and `Ground truth`
      (HVSMR).
    - A folder a subject with a NIfTI file for each sequence and one of labels, `…_flair`, `…_t1`, `…_t1ce`, `…_t2` and
      `…_seg`, at any depth (BraTS 2018).
    - A folder a subject with `DICOM_anon` and `Ground` somewhere in it (CHAOS; of two phases `InPhase`).

    Raises:
        UserError: none of these; labels without image, or the other way round.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give one with the volumes of the subjects and their labels")
    splits: Splits = {}
    for split, names in PARTS.items():
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is not None:
            splits[split] = _in_folder(folder)
    if not splits:
        splits = {"train": _in_folder(root)}
    seen: dict[str, str] = {}
    for split, subjects in splits.items():
        for subject in subjects:
            if subject.name in seen:
                raise UserError(f"{root}: the subject {subject.name} is in {seen[subject.name]} and in {split}")
            seen[subject.name] = split
    return splits


def _in_folder(folder: Path) -> list[Source]:
    pair = [next((folder / name for name in names if (folder / name).is_dir()), None) for names in (IMAGES, LABELS)]
    if pair[0] is not None and pair[1] is not None:
        found = _paired_folders(pair[0], pair[1])
    else:
        found = _paired_names(folder) or _chaos(folder) or _brats(folder)
    if not found:
        raise UserError(
            f"{folder} holds no subjects: expected images/ and labels/ of NIfTI files or of slices, NIfTI files with "
            "their …-label.nii.gz, folders of subjects with DICOM_anon and Ground, or with …_flair.nii.gz and "
            "…_seg.nii.gz"
        )
    return sorted(found, key=lambda subject: natural(Path(subject.name)))


def _paired_folders(images: Path, labels: Path) -> list[Source]:
    volumes = _niftis(images)
    if volumes:
        truth = {AROUND.sub("", stem_of(file)): file for file in _niftis(labels)}
        sources = []
        for file in volumes:
            name = re.sub(r"_0000$", "", stem_of(file))  # nnU-Net counts the channels of a file's name
            if name not in truth:
                raise UserError(f"{file} has no labels: expected {labels / (name + '.nii.gz')}")
            sources.append(Source(name, (file,), (truth[name],)))
        return sources
    return _stacks(images_in(images), images_in(labels), labels)


def _stacks(images: Sequence[Path], labels: Sequence[Path], folder: Path) -> list[Source]:
    """Pictures of slices by subject; slice numbers may have leading zeros or none."""
    truth = {file.stem: file for file in labels}
    subjects: dict[str, list[Path]] = {}
    for file in images:
        match = SLICE.match(file.stem)
        if match is None:
            raise UserError(f"{file}: expected the subject and the number of the slice, such as Subj_21slice_22.png")
        if file.stem not in truth:
            raise UserError(f"{file} has no labels: expected {folder / file.name}")
        subjects.setdefault(match[1], []).append(file)
    return [
        Source(name, tuple(sorted(files, key=natural)), tuple(truth[f.stem] for f in sorted(files, key=natural)))
        for name, files in subjects.items()
    ]


def _niftis(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, without the hidden ones that archives of the decathlon bring."""
    return [file for file in sorted(folder.iterdir()) if is_nifti(file) and not file.name.startswith(".")]


def _paired_names(folder: Path) -> list[Source]:
    volumes = {stem_of(file): file for file in _niftis(folder)}
    labels = {AROUND.sub("", name): file for name, file in volumes.items() if AROUND.search(name)}
    images = {name: file for name, file in volumes.items() if not AROUND.search(name)}
    alone = next((file for name, file in images.items() if name not in labels), None)
    if alone is not None:
        raise UserError(f"{alone} has no labels: expected {stem_of(alone)}-label.nii.gz beside it")
    return [Source(name, (file,), (labels[name],)) for name, file in images.items()]


def _chaos(folder: Path) -> list[Source]:
    """CT and MR alike; where T1DUAL and T2SPIR of a subject are labelled, the former counts."""

    def twin(ground: Path) -> Path:
        return Path(*("T1DUAL" if part == "T2SPIR" else part for part in ground.parts))

    found = sorted(folder.rglob("Ground"))
    grounds = [ground for ground in found if "T2SPIR" not in ground.parts or twin(ground) not in found]
    sources: dict[str, Source] = {}
    for ground in grounds:
        images = ground.parent / "DICOM_anon"
        images = images / "InPhase" if (images / "InPhase").is_dir() else images
        slices = dicom_slices(images) if images.is_dir() else []
        subject = ground.parent.parent if ground.parent.name in ("T1DUAL", "T2SPIR") else ground.parent
        if slices and subject.name in sources:
            twice = [sources[subject.name].image[0].parent, images]
            raise UserError(
                f"{folder} holds the subject {subject.name} twice, in {twice[0]} and {twice[1]}: give CT or MR alone"
            )
        if slices:
            sources[subject.name] = Source(subject.name, tuple(slices), tuple(images_in(ground)))
    return list(sources.values())


def _brats(folder: Path) -> list[Source]:
    """Subjects of BraTS 2018: four sequences and a segmentation, below HGG and LGG or beside each other."""
    sources = []
    for labels in sorted(folder.rglob("*_seg.nii*")):
        match = OF_BRATS.match(stem_of(labels))
        if match is None or not is_nifti(labels) or labels.name.startswith("."):
            continue
        beside = {stem_of(file): file for file in _niftis(labels.parent)}
        names = [f"{match[1]}_{sequence}" for sequence in SEQUENCES]
        missing = next((name for name in names if name not in beside), None)
        if missing is not None:
            raise UserError(f"{labels} lacks a sequence: expected {missing}.nii.gz beside it")
        sources.append(Source(match[1], tuple(beside[name] for name in names), (labels,)))
    return sources


def read_subject(source: Source, values: Sequence[int], channels: int = 1) -> Labelled:
    """A subject's volume and class numbers.

    Args:
        source: where it lies.
        values: what each class is called in the labels.
        channels: images a voxel.

    Raises:
        UserError: files that cannot be read, of different sizes, or with values of no class.
    """
    first = source.image[0]
    if is_nifti(first):
        volume = read_sequences(source.image, channels)
    elif first.suffix.lower() in SUFFIXES:
        volume = read_pictures(first.parent, source.image, channels)
    else:
        volume = read_dicom(first.parent, source.image, channels)
    return labelled(source.name, volume, source.labels, values)


def labelled(name: str, volume: Volume, labels: Sequence[Path], values: Sequence[int]) -> Labelled:
    """A volume with the class numbers of its labels.

    Args:
        name: of the subject.
        volume: as it was read.
        labels: a NIfTI file, or pictures of slices.
        values: what each class is called in them.

    Raises:
        UserError: labels of another size or place, or values of no class.
    """
    raw = _read_labels(labels, volume)
    table = {value: index for index, value in enumerate(values)}
    mask = np.full(raw.shape, IGNORED, np.uint8)
    for value in np.unique(raw).tolist():
        if value not in table and value != IGNORED:
            raise UserError(
                f"{labels[0]}: holds the value {value}, which is no class; the classes are called "
                f"{', '.join(map(str, values))} (write all to {CLASSES}, a line each: the value and a name)"
            )
        if value in table:
            mask[raw == value] = table[value]
    return Labelled(name, volume.slices, mask, volume.spacing)


def _read_labels(labels: Sequence[Path], volume: Volume) -> np.ndarray:
    """The values of labels, in the slices, rows and columns of the volume as a network sees it."""
    if is_nifti(labels[0]):
        if volume.affine is None:
            raise UserError(f"{labels[0]}: {volume.file} is of pictures, whose labels are pictures too")
        truth = read_nifti(labels[0], labels=True)
        raw = np.rint(truth.slices[:, 0]).astype(np.int64)
        if raw.shape == volume.shape and not np.allclose(axial_affine(truth), axial_affine(volume), atol=1e-2):
            raise UserError(f"{labels[0]} does not lie where {volume.file} does: their affines differ")
    elif not volume.names:
        raise UserError(f"{labels[0]}: the labels of {volume.file} are a NIfTI file, not pictures")
    else:
        files = _by_slice(labels, volume)
        parts = [read_mask(file).astype(np.int64) for file in files]
        odd = next((file for file, part in zip(files, parts) if part.shape != parts[0].shape), None)
        if odd is not None:
            raise UserError(f"{odd} has another size than {files[0].name}: labels of a volume have one size")
        raw = np.stack(parts)
        if volume.turned is not None:
            raw = turned_slices(raw, volume.turned)
    if raw.shape != volume.shape:
        shapes = [" × ".join(map(str, shape)) for shape in (raw.shape, volume.shape)]
        raise UserError(f"{labels[0]} and what belongs to it have {shapes[0]} voxels, {volume.file} {shapes[1]}")
    return raw


def _by_slice(labels: Sequence[Path], volume: Volume) -> list[Path]:
    """The labels of each slice: of its name; without such names the first by name goes with the first by name."""
    called = {file.stem: file for file in labels}
    if set(called) >= set(volume.names):
        return [called[name] for name in volume.names]
    if len(labels) != len(volume.names):
        raise UserError(
            f"{labels[0].parent} holds labels of {len(labels)} slices, {volume.file} has {len(volume.names)}: "
            "call them like the slices"
        )
    if len(labels) > 1:
        progress.say(
            f"{labels[0].parent}: labels are not called like the slices of {volume.file}; they are taken in the order "
            "of both names"
        )
    in_order = sorted(range(len(labels)), key=lambda index: natural(Path(volume.names[index])))
    files = dict(zip(in_order, sorted(labels, key=natural)))
    return [files[index] for index in range(len(labels))]


def with_splits(root: Path, splits: Splits, seed: int, share: float, test_share: float | None = None) -> Splits:
    """The same, and what of train, val and test is missing cut from `train`, by subject.

    Args:
        root: the folder, for messages.
        splits: what it holds.
        seed: of the drawing.
        share: of the training subjects, what is cut from them for each missing split.
        test_share: the same for the test split alone; `share` by default.
    """
    if "train" not in splits:
        raise UserError(f"{root} holds {next(iter(splits))!r} but no subjects to train on")
    splits = dict(splits)
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
    missing = [split for split in ("val", "test") if split not in splits]
    subjects = splits["train"]
    if len(subjects) <= len(missing):
        raise UserError(f"{root}: {len(subjects)} subjects are too few: {' and '.join(missing)} are cut from them")
    order = split_indices(len(subjects), (1.0,), seed)[0]
    shares = {"val": share, "test": share if test_share is None else test_share}
    most = (len(subjects) - 1) // max(1, len(missing))
    for split in missing:
        count = min(max(1, round(shares[split] * len(subjects))), most)
        splits[split] = [subjects[order.pop()] for _ in range(count)]
    splits["train"] = [subjects[index] for index in sorted(order)]
    return splits


def read_classes(root: Path, sources: Iterable[Source]) -> tuple[list[int], list[str]]:
    """What classes are called in the labels, and their names.

    They stand in `classes.txt`, or under "labels" in the decathlon's `dataset.json`. Else they are all values that
    occur, by the names that a public set gives them.

    Raises:
        UserError: lines that are no value and name, or more than 255 values.
    """
    file = root / CLASSES
    if file.is_file():
        values, names = [], []
        for number, line in enumerate(read_text(file).splitlines(), 1):
            if not line.strip():
                continue
            value, _, name = line.strip().partition(" ")
            if not value.lstrip("-").isdecimal() or int(value) in values or abs(int(value)) >= MOST:
                raise UserError(f"{file}, line {number}: expected a value of its own and a name, got {line!r}")
            values.append(int(value))
            names.append(name.strip() or f"class {value}")
        if len(values) < 2:
            raise UserError(f"{file}: {len(values)} classes; there are two or more, the background first")
        return values, names
    sources = list(sources)
    described = _described(root / DESCRIPTION)
    if described is not None:
        return list(described), list(described.values())
    seen: set[int] = set()
    for source in progress.track(sources, "reading labels"):
        seen |= set(_values_of(source))
        if len(seen) > IGNORED:
            raise UserError(f"{source.labels[0]}: more than {IGNORED} values: are these labels?")
    if seen != {0, IGNORED}:  # black and white masks have two classes, and nothing that is not judged
        seen.discard(IGNORED)
    values = sorted(seen)
    if len(values) < 2:
        raise UserError(f"{root}: the labels hold {len(values)} value(s); segmentation needs two or more")
    known = _known_names(sources)
    return values, [known.get(value, "background" if value == 0 else f"class {value}") for value in values]


def _known_names(sources: Sequence[Source]) -> dict[int, str]:
    """What the classes of a public set are called; nothing where not all subjects are of one."""
    for mark, names in KNOWN:
        if sources and all(source.image and mark.search(source.image[0].as_posix()) for source in sources):
            return names
    return {}


def _described(file: Path) -> dict[int, str] | None:
    """Values and names from the decathlon's `dataset.json`, or nnU-Net's, which has them the other way round."""
    if not file.is_file():
        return None
    try:
        labels = json.loads(read_text(file))["labels"]
        pairs = [(value, key) if isinstance(value, int) else (int(key), value) for key, value in labels.items()]
        named = {value: str(name) for value, name in sorted(pairs)}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f'{file}: expected "labels" with a value and a name each, such as {{"0": "background", "1": "edema"}}'
        ) from None
    if len(named) < 2 or len(named) < len(pairs):
        raise UserError(f"{file}: expected two classes or more, each of a value of its own, got {labels}")
    return named


def _values_of(source: Source) -> list[int]:
    first = source.labels[0]
    if is_nifti(first):
        return np.unique(np.rint(read_nifti(first, labels=True).slices)).astype(int).tolist()
    return sorted({int(value) for file in source.labels for value in np.unique(read_mask(file))})

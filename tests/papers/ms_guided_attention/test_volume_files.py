"""Volumes of every kind in, labels in the same header out; the paper's sets as they lie on disk; splits of subjects."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import miniature
from provenn import catalog
from provenn.core.errors import UserError
from provenn.experiments.reproduce import reproduce
from provenn.papers.ms_guided_attention.printed import ABLATION, BRATS, CHAOS, HVSMR
from provenn.papers.ms_guided_attention.task.measures import agreement
from provenn.papers.ms_guided_attention.task.subjects import find_subjects, read_classes, read_subject, with_splits
from provenn.papers.ms_guided_attention.task.volumes import read_volume, write_labels
from provenn.tasks import datasets, get_task

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

TASK = get_task("volume-segmentation")
ARRAY = np.random.default_rng(0).normal(100, 30, (9, 11, 7)).astype(np.float32)
# Fields of a header that follow from the labels' own kind
OWN = {"datatype", "bitpix", "scl_slope", "scl_inter", "cal_max", "cal_min", "vox_offset", "magic"}


def turned(a: float, b: float, c: float) -> np.ndarray:
    around_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    around_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    around_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return around_x @ around_y @ around_z


def affine_of(axes: np.ndarray) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, (5, -3, 9)
    return affine


OBLIQUE = affine_of(turned(0.7, -0.6, 0.5) @ np.diag([0.8, 1.3, 4.0]))


def oblique(kind=np.float32) -> "nibabel.Nifti1Image":
    return nibabel.Nifti1Image(np.clip(ARRAY, 0, 120).astype(kind), OBLIQUE, dtype=kind)


def qform_alone() -> "nibabel.Nifti1Image":
    image = nibabel.Nifti1Image(ARRAY, None)
    image.set_qform(OBLIQUE, 1)
    image.header["sform_code"] = 0
    return image


def two_forms() -> "nibabel.Nifti1Image":
    image = nibabel.Nifti1Image(ARRAY, np.diag([2.0, 2, 2, 1]))
    image.set_qform(np.diag([-2.0, 2, 2, 1]), 2)
    image.set_sform(np.diag([2.0, 2, 2, 1]), 4)
    return image


def unplaced() -> "nibabel.Nifti1Image":
    image = nibabel.Nifti1Image(ARRAY, None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    image.header["pixdim"][1:4] = (0.7, 0.9, 3.0)
    return image


def described() -> "nibabel.Nifti1Image":
    image = oblique()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"comment"))
    image.header["descrip"] = b"a scan"
    return image


KINDS = {
    "oblique": oblique,
    "very oblique": lambda: nibabel.Nifti1Image(ARRAY, affine_of(turned(2.0, 1.0, 0.3) @ np.diag([0.8, 1.3, 4.0]))),
    "uint8": lambda: oblique(np.uint8),
    "int16": lambda: oblique(np.int16),
    "int64": lambda: oblique(np.int64),
    "float64": lambda: oblique(np.float64),
    "qform alone": qform_alone,
    "two forms": two_forms,
    "extension": described,
    "NIfTI-2": lambda: nibabel.Nifti2Image(ARRAY, OBLIQUE),
    "big endian": lambda: nibabel.Nifti1Image(ARRAY, OBLIQUE, nibabel.Nifti1Header(endianness=">")),
    "one slice": lambda: nibabel.Nifti1Image(ARRAY[:, :, :1], np.diag([1.0, 1, 5, 1])),
    "one voxel": lambda: nibabel.Nifti1Image(ARRAY[:1, :1, :1], np.eye(4)),
    "unplaced": unplaced,
}


@pytest.mark.parametrize("name", KINDS)
def test_labels_go_back_into_the_header_that_they_came_from(name, tmp_path):
    nibabel.save(KINDS[name](), tmp_path / "scan.nii.gz")
    if name == "unplaced":
        with pytest.warns(UserWarning, match="does not say where it lies"):
            volume = read_volume(tmp_path / "scan.nii.gz")
        assert volume.spacing == pytest.approx((3.0, 0.9, 0.7)) and not volume.placed
    else:
        volume = read_volume(tmp_path / "scan.nii.gz")
    write_labels(tmp_path / "labels.nii.gz", (volume.slices[:, 0] > 0.5).astype(np.uint8), volume, [0, 7])
    scan, labels = nibabel.load(tmp_path / "scan.nii.gz"), nibabel.load(tmp_path / "labels.nii.gz")
    assert type(labels) is type(scan) and labels.get_data_dtype() == np.uint8
    assert labels.shape == scan.shape and labels.header.get_zooms() == scan.header.get_zooms()
    assert np.array_equal(labels.affine, scan.affine)
    changed = [
        key
        for key in scan.header
        if key not in OWN
        and not np.array_equal(scan.header[key], labels.header[key], equal_nan=scan.header[key].dtype.kind == "f")
    ]
    assert not changed
    assert [e.get_content() for e in labels.header.extensions] == [e.get_content() for e in scan.header.extensions]
    values = scan.get_fdata().astype(np.float32)
    low, high = np.percentile(values, (0.5, 99.5))
    bright = np.clip((values - low) / max(high - low, 1e-12), 0, 1) > 0.5
    assert np.array_equal(np.asarray(labels.dataobj), 7 * bright)


def test_scaled_values_of_a_file_are_what_is_read(tmp_path):
    """`scl_slope` and `scl_inter` of the header; none, and 0, say nothing."""
    content = bytearray(nibabel.Nifti1Image(np.rint(ARRAY).astype(np.int16), np.eye(4)).to_bytes())
    plain = np.rint(ARRAY).astype(np.float64)
    for slope, inter, expected in ((0.25, -17.0, 0.25 * plain - 17), (float("nan"), 0.0, plain), (0.0, 3.0, plain)):
        content[112:120] = struct.pack("<ff", slope, inter)
        (tmp_path / "s.nii").write_bytes(content)
        volume = read_volume(tmp_path / "s.nii")
        low, high = np.percentile(expected, (0.5, 99.5))
        wanted = np.clip((expected - low) / (high - low), 0, 1).transpose(2, 1, 0)[:, ::-1]
        np.testing.assert_allclose(volume.slices[:, 0], wanted, atol=1e-5)
        write_labels(tmp_path / "out.nii", (volume.slices[:, 0] > 0.5).astype(np.uint8), volume, [0, 200])
        out = nibabel.load(tmp_path / "out.nii")
        assert set(np.unique(out.get_fdata())) == {0.0, 200.0} and out.header.get_slope_inter() in (
            (1, 0),
            (None, None),
        )


def test_values_of_classes_keep_every_digit(tmp_path):
    nibabel.save(oblique(), tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    for values, kind in (([0, 255], np.uint8), ([0, 14175], np.int16), ([-2, 3], np.int16), ([0, 70_000], np.int32)):
        write_labels(tmp_path / "out.nii", (volume.slices[:, 0] > 0.5).astype(np.uint8), volume, values)
        out = nibabel.load(tmp_path / "out.nii")
        assert out.get_data_dtype() == kind and np.unique(np.asarray(out.dataobj)).tolist() == sorted(values)


def bent(axes: list[list[float]]) -> bytes:
    """A file whose affine has these rows."""
    content = bytearray(nibabel.Nifti1Image(ARRAY, np.eye(4)).to_bytes())
    content[280:328] = struct.pack("<12f", *(number for row in axes for number in row))
    return bytes(content)


def test_affines_and_voxels_that_are_none_are_refused_in_a_line(tmp_path):
    nan = float("nan")
    (tmp_path / "nan.nii").write_bytes(bent([[nan, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))
    (tmp_path / "flat.nii").write_bytes(bent([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]))
    (tmp_path / "same.nii").write_bytes(bent([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]))
    nibabel.save(nibabel.Nifti1Image(ARRAY.astype(np.complex64), np.eye(4)), tmp_path / "complex.nii")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), [(c, "u1") for c in "RGB"]), np.eye(4)), tmp_path / "rgb.nii")
    for name, said in (
        ("nan", "affine holds numbers that are not finite"),
        ("flat", "axis of length 0"),
        ("same", "two axes of its affine point the same way"),
        ("complex", "its voxels are complex numbers"),
        ("rgb", "its voxels are colours"),
    ):
        with pytest.raises(UserError, match=said):
            read_volume(tmp_path / f"{name}.nii")


def test_labels_that_are_no_whole_numbers_are_refused(tmp_path):
    """A mask that was resampled is no label volume: rounding would make classes of it without a word."""
    root = miniature.write("hvsmr", tmp_path)
    file = root / "Ground truth" / "training_axial_crop_pat2-label.nii.gz"
    image = nibabel.load(file)
    numbers = np.asarray(image.dataobj).astype(np.float32)
    numbers[3, 3, 2] = 0.4
    nibabel.save(nibabel.Nifti1Image(numbers, image.affine), file)
    with pytest.raises(UserError, match=r"pat2-label.nii.gz holds 0.4: labels are whole numbers"):
        TASK.load(root)


# DICOM


def series(folder: Path, change=None, count: int = 6) -> Path:
    """Slices 5 mm apart, bright below, each changed by `change(number, data set)`."""
    rng = np.random.default_rng(1)
    for level in range(count):
        pixels = rng.integers(0, 900, (7, 9)) + 100 * level
        miniature.dicom_slice(folder / f"IMG-{level + 1}.dcm", pixels, height=5.0 * level, series="1.2.3")
        if change is not None:
            part = pydicom.dcmread(folder / f"IMG-{level + 1}.dcm")
            change(level, part)
            part.save_as(folder / f"IMG-{level + 1}.dcm")
    return folder


def only(number: int, **values):
    """A change of one slice; of all where the number is −1."""

    def change(level: int, part: "pydicom.Dataset") -> None:
        if number in (-1, level):
            for tag, value in values.items():
                setattr(part, tag, value)

    return change


def compressed(level: int, part: "pydicom.Dataset") -> None:
    part.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8nothing\xff\xd9"])
    part["PixelData"].is_undefined_length = True
    part.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless


def frames(level: int, part: "pydicom.Dataset") -> None:
    part.NumberOfFrames, part.PixelData = 3, part.PixelData * 3


def echoes(level: int, part: "pydicom.Dataset") -> None:
    part.SeriesInstanceUID, part.EchoTime = f"1.2.{level}", 2.3 + 2.3 * (level % 2)


@pytest.mark.parametrize(
    "change, said",
    [
        (only(2, ImageOrientationPatient=[0, 1, 0, 0, 0, 1]), "IMG-3.dcm has the orientation 0 1 0 0 0 1"),
        (only(2, PixelSpacing=[3.0, 3.0]), "IMG-3.dcm has the spacing 3 3, IMG-1.dcm 1.5 1.5"),
        (only(2, ImagePositionPatient=[50.0, -8.0, 10.0]), "IMG-3.dcm lies 59 mm aside of the others"),
        (only(1, ImagePositionPatient=[0.0, 0.0, float("nan")]), "are not finite"),
        (only(-1, ImageOrientationPatient=[0] * 6), "orientation 0 0 0 0 0 0 of its slices is none"),
        (only(-1, PixelSpacing=[0.0, 0.0]), "axis of length 0"),
        (only(0, RescaleSlope="0", RescaleIntercept="0"), "IMG-1.dcm: its values are scaled by '0'"),
        (compressed, r"is compressed \(JPEG-LS Lossless Image Compression\) and cannot be decoded: decompress"),
        (frames, r"holds an image of shape \(3, 7, 9\)"),
        (echoes, "holds 6 series"),
        (only(3, SeriesInstanceUID="9.9"), "holds 2 series"),
    ],
)
def test_series_that_are_no_volume_are_refused_in_a_line(change, said, tmp_path):
    with pytest.raises(UserError, match=said):
        read_volume(series(tmp_path / "series", change))


def test_slices_that_each_call_themselves_a_series_are_one_and_that_is_said(tmp_path):
    plain = read_volume(series(tmp_path / "plain"))
    alone = series(tmp_path / "alone", lambda level, part: setattr(part, "SeriesInstanceUID", f"1.2.{level}"))
    with pytest.warns(UserWarning, match="each of 6 slices calls itself a series"):
        volume = read_volume(alone)
    assert np.array_equal(volume.slices, plain.slices) and np.array_equal(volume.affine, plain.affine)


def test_grey_values_of_a_slice_are_bright_where_they_are_high(tmp_path):
    plain = read_volume(series(tmp_path / "plain"))
    dark = read_volume(series(tmp_path / "dark", only(-1, PhotometricInterpretation="MONOCHROME1")))
    np.testing.assert_allclose(dark.slices, 1 - plain.slices, atol=1e-5)
    empty = read_volume(series(tmp_path / "empty", only(-1, RescaleSlope=None)))
    packed = read_volume(series(tmp_path / "packed", lambda level, part: part.compress(pydicom.uid.RLELossless)))
    shutil.copy(tmp_path / "plain" / "IMG-1.dcm", tmp_path / "plain" / "DICOMDIR")  # a disc's contents are no slice
    for volume in (empty, packed, read_volume(tmp_path / "plain")):
        assert np.array_equal(volume.slices, plain.slices)


def test_a_tilted_gantry_is_in_the_affine(tmp_path):
    def tilt(level: int, part: "pydicom.Dataset") -> None:
        part.ImagePositionPatient = [-9.0, -8.0 + 6.0 * level, 5.0 * level]

    volume = read_volume(series(tmp_path / "tilted", tilt))
    write_labels(tmp_path / "out.nii.gz", (volume.slices[:, 0] > 0.5).astype(np.uint8), volume, [0, 1])
    affine = nibabel.load(tmp_path / "out.nii.gz").affine
    for level in (0, 5):  # the corner of each slice lies where its file says; DICOM's x and y run the other way
        np.testing.assert_allclose(affine @ [0, 0, level, 1], [9.0, 8.0 - 6.0 * level, 5.0 * level, 1], atol=1e-4)


def test_a_volume_of_few_pixels_is_labelled_all_the_same(tmp_path):
    from provenn.cli import main

    nibabel.save(nibabel.Nifti1Image(ARRAY[:3, :5], np.diag([1.0, 2, 3, 1])), tmp_path / "few.nii")
    assert main(["predict", "ms_guided_attention", str(tmp_path / "few.nii"), "-o", str(tmp_path / "out.nii")]) == 0
    assert nibabel.load(tmp_path / "out.nii").shape == (3, 5, 7)


# The paper's sets


SETS = {
    "chaos": (
        "T1DUAL",
        {0: "background", 63: "liver", 126: "right kidney", 189: "left kidney", 252: "spleen"},
        ["1", "2", "3", "13"],
    ),
    "hvsmr": (
        "Training dataset",
        {0: "background", 1: "myocardium", 2: "blood pool"},
        [f"training_axial_crop_pat{index}" for index in range(4)],
    ),
    "msd-brain": (
        "imagesTr",
        {0: "background", 1: "edema", 2: "non-enhancing tumor", 3: "enhancing tumour"},
        ["BRATS_001", "BRATS_002", "BRATS_003", "BRATS_457"],
    ),
    "brats-2018": (
        "GG",
        {0: "background", 1: "necrotic core", 2: "oedema", 4: "enhancing tumour"},
        [f"Brats18_TCIA0{index}_1" for index in range(1, 5)],
    ),
}


@pytest.mark.filterwarnings("ignore:.*calls itself a series")
@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_as_it_lies_on_disk(name, tmp_path, monkeypatch):
    """Image and labels of each subject are those of one array, class by class."""
    mark, classes, subjects = SETS[name]
    monkeypatch.setenv("PROVENN_DATA", str(tmp_path))
    miniature.write(name, tmp_path)
    source = datasets.resolve(name)
    sources = find_subjects(source.data)["train"]
    assert [one.name for one in sources] == subjects
    assert all(mark in file.as_posix() and "OutPhase" not in file.as_posix() for one in sources for file in one.image)
    values, names = read_classes(source.data, sources)
    assert dict(zip(values, names)) == classes
    channels = source.options.get("channels", 1)
    assert channels == (4 if name in ("msd-brain", "brats-2018") else 1)
    if name == "brats-2018":  # in the decathlon's order
        ends = [[file.name.split("_")[-1] for file in one.image] for one in sources]
        assert ends == 4 * [[f"{sequence}.nii.gz" for sequence in ("flair", "t1", "t1ce", "t2")]]
    for one in sources:
        subject = read_subject(one, values, channels)
        assert subject.image.shape[1] == channels and subject.mask.shape == subject.image[:, 0].shape
        there = subject.mask[-1] if name == "chaos" else subject.mask  # the other slices have no labels there
        assert set(np.unique(there)) <= set(range(len(values)))
        # In the miniature the grey level grows with the label's value.
        inside = slice(0, 3) if name == "chaos" else slice(None)
        means = [subject.image[inside][:, 0][subject.mask[inside] == k].mean() for k in range(len(values))]
        assert means == sorted(means) and means[-1] > 0.8, means
    data = TASK.load(source.data, size=16, **source.options)
    assert data.options == {"num_classes": len(classes), "in_channels": channels}
    assert data.meta["classes"] == list(classes.values()) and data.meta["values"] == list(classes)
    parts = [{one.name for one in part.subjects} for part in (data.train, data.val, data.test)]
    assert sum(map(len, parts)) == 4 == len(set.union(*parts))


@pytest.mark.parametrize(
    "count, val_share, test_share, expected",
    [(20, 0.1, 0.25, (13, 2, 5)), (10, 0.2, 0.2, (6, 2, 2)), (484, 0.1, 0.1, (388, 48, 48))],
)
def test_subjects_are_divided_as_in_the_paper_and_no_subject_is_in_two_splits(count, val_share, test_share, expected):
    from provenn.papers.ms_guided_attention.task.subjects import Source

    subjects = [Source(f"s{index}", (Path(f"{index}.nii"),), (Path(f"{index}-label.nii"),)) for index in range(count)]
    tests = []
    for seed in range(3):
        splits = with_splits(Path("x"), {"train": list(subjects)}, seed, val_share, test_share)
        parts = [{one.name for one in splits[name]} for name in ("train", "val", "test")]
        assert tuple(map(len, parts)) == expected and len(set.union(*parts)) == count
        tests.append(parts[2])
    assert tests[0] != tests[1] != tests[2]
    card = catalog.card("ms_guided_attention")
    shares = [
        (how.overrides["val_share"], how.overrides["test_share"])
        for how in (card.experiment(name).at_paper for name in ("chaos", "hvsmr", "brats"))
    ]
    assert (val_share, test_share) in shares


def test_what_lacks_in_a_set_is_said(tmp_path):
    root = miniature.write("brats-2018", tmp_path)
    next(root.rglob("*TCIA03_1_t1ce.nii.gz")).unlink()
    with pytest.raises(UserError, match=r"TCIA03_1_seg.nii.gz lacks a sequence: expected Brats18_TCIA03_1_t1ce.nii.gz"):
        find_subjects(root)
    root = miniature.write("hvsmr", tmp_path)
    next(root.rglob("*pat1-label.nii.gz")).unlink()
    with pytest.raises(UserError, match=r"pat1\.nii\.gz has no labels"):
        find_subjects(root)
    both = tmp_path / "both"
    root = miniature.write("chaos", tmp_path)
    shutil.copytree(root / "MR" / "1" / "T2SPIR", both / "CT" / "1")
    shutil.copytree(root / "MR" / "1", both / "MR" / "1")
    with pytest.raises(UserError, match=r"holds the subject 1 twice, .* give CT or MR alone"):
        find_subjects(both)
    described = miniature.write("msd-brain", tmp_path)
    (described / "dataset.json").write_text('{"labels": ["background"]}')
    with pytest.raises(UserError, match='expected "labels" with a value and a name each'):
        TASK.load(described, channels=4)


def test_sequences_of_a_subject_share_one_grid(tmp_path):
    root = miniature.write("brats-2018", tmp_path)
    (subject, *_) = find_subjects(root)["train"]
    with pytest.raises(UserError, match=r"holds 4 image\(s\) a voxel; the network takes 1"):
        read_subject(subject, [0, 1, 2, 4])
    image = nibabel.load(subject.image[2])
    moved = image.affine.copy()
    moved[0, 3] += 2
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), moved), subject.image[2])
    with pytest.raises(UserError, match=r"t1ce.nii.gz does not lie where .*flair.nii.gz does"):
        read_subject(subject, [0, 1, 2, 4], 4)


@pytest.mark.filterwarnings("ignore:.*calls itself a series")
@pytest.mark.parametrize("experiment", ["chaos", "brats_danet"])
def test_the_papers_figures_are_tried_where_their_sets_are_found(experiment, tmp_path, monkeypatch):
    card = catalog.card("ms_guided_attention")
    asked = card.experiment(experiment)
    missing = reproduce(card, experiments=experiment, budget="paper", device="cpu", out=tmp_path / "none")[0]
    assert asked.at_paper.data in str(missing.measurement.needs)
    monkeypatch.setenv("PROVENN_DATA", str(tmp_path))
    miniature.write(asked.at_paper.data, tmp_path)
    overrides = {**asked.at_paper.overrides, "size": 16, "backbone": "small", "dim": 8}
    how = asked.at_paper.model_copy(update={"gpu": False, "overrides": overrides})
    chosen = card.preset(asked.at_paper.preset)
    small = card.model_copy(
        update={
            "experiments": [asked.model_copy(update={"at_paper": how})],
            "presets": [
                chosen.model_copy(update={"recipe": {**chosen.recipe, "max_steps": 2, "epochs": 1, "batch_size": 2}})
            ],
        }
    )
    (finding,) = reproduce(small, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert len(measured.values) == 1 and all(0 <= value <= 100 for value in measured.values)
    assert not measured.at_paper_setting and measured.setting["at_paper"]["metric"] == "dice"


def test_registered_figures_are_those_of_the_papers_tables():
    tables = {"chaos": CHAOS, "hvsmr": HVSMR, "brats": BRATS}
    whose = {
        "volume_unet": "U-Net",
        "volume_attention_unet": "Attention U-Net",
        "volume_danet": "DANet",
        "daf": "DAF",
        "guided_attention": "guided",
        "guided_attention_plain": "no guidance",
    }
    card = catalog.card("ms_guided_attention")
    seen = 0
    for experiment in card.experiments:
        if experiment.at_paper is None:
            continue
        table = tables[experiment.id.partition("_")[0]]
        if experiment.id == "chaos_single":
            row = ABLATION["guided, no deep supervision"][1]
        else:
            row = table[whose[experiment.at_paper.preset]]
        assert experiment.published.value == row.dice and f"{row.dice:g}" in experiment.says
        seen += 1
    assert seen == 3 * 5 + 2
    assert card.experiment("chaos").expects.above == max(
        row.dice for name, row in CHAOS.items() if name in ("U-Net", "DANet", "Attention U-Net", "DAF")
    )
    # Printed means are those of their classes, but for DAF's, which differs by a slip of the paper.
    for table in tables.values():
        for name, row in table.items():
            if row.classes and len(row.classes) > 1:
                assert row.dice == pytest.approx(np.mean(row.classes), abs=0.12), name
    assert (
        ABLATION["guided"][1][:3] == CHAOS["guided"][:3] and ABLATION["no guidance"][1][:3] == CHAOS["no guidance"][:3]
    )


# Measures


def distances(a: np.ndarray, b: np.ndarray, spacing) -> np.ndarray:
    """From each place of `a` to the nearest of `b`, by all pairs in double precision."""
    scale = np.asarray(spacing, np.float64)
    return np.linalg.norm((a[:, None] - b[None]) * scale, axis=-1).min(1)


def rim(mask: np.ndarray) -> np.ndarray:
    """Places of which a neighbour along an axis is outside."""
    places = []
    for place in np.argwhere(mask):
        for axis in range(3):
            for step in (-1, 1):
                other = place.copy()
                other[axis] += step
                inside = (other >= 0).all() and (other < mask.shape).all()
                if not inside or not mask[tuple(other)]:
                    places.append(tuple(place))
    return np.array(sorted(set(places)))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (6.0, 0.5, 0.75), (0.1, 9.0, 2.0)])
@pytest.mark.parametrize("kind", ["noise", "blocks", "one voxel each", "a voxel in a block", "whole volume", "flat"])
def test_measures_are_those_of_all_pairs_of_voxels(kind, spacing):
    rng = np.random.default_rng(7)
    a, b = np.zeros((2, 5, 6, 7), bool)
    if kind == "noise":
        a, b = rng.random((2, 5, 6, 7)) < 0.25
    elif kind == "blocks":
        a[1:4, 1:5, 2:6], b[0:3, 2:6, 3:7] = True, True
    elif kind == "one voxel each":
        a[0, 0, 0] = b[4, 5, 6] = True
    elif kind == "a voxel in a block":
        a[2, 3, 3], b[1:4, 1:6, 1:6] = True, True
    elif kind == "whole volume":
        a[:], b[:, :3] = True, True
    else:
        a[2], b[2, :, 1:] = True, True
    found = agreement(a, b, spacing)
    pa, pb = np.argwhere(a), np.argwhere(b)
    voxels = np.concatenate([distances(pa, pb, (1, 1, 1)), distances(pb, pa, (1, 1, 1))])
    assert found.mean_distance == pytest.approx(voxels.mean(), abs=1e-9)
    sides = distances(rim(a), rim(b), spacing), distances(rim(b), rim(a), spacing)
    assert found.surface_distance == pytest.approx(np.concatenate(sides).mean(), abs=1e-9)
    assert found.hausdorff_95 == pytest.approx(max(np.percentile(side, 95) for side in sides), abs=1e-9)
    assert found.dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert found.volume_similarity == pytest.approx(1 - abs(int(a.sum()) - int(b.sum())) / (a.sum() + b.sum()))
    other = agreement(b, a, spacing)
    assert other == pytest.approx(found)


def test_the_spread_is_the_deviation_over_subjects_of_each_ones_mean_over_classes():
    dice = np.array([[0.9, 0.5], [0.7, 0.7], [0.4, np.nan]])
    names = ("dice", "volume_similarity", "mean_distance", "surface_distance", "hausdorff_95")
    summary = TASK.summary({name: dice for name in names})
    assert summary["dice"] == pytest.approx((0.7 + 0.7 + 0.4) / 3)
    assert summary["dice_std"] == pytest.approx(np.std([0.7, 0.7, 0.4]))
    assert TASK.summary({name: dice[:1] for name in names})["dice_std"] == 0.0


def test_a_voxel_that_is_not_judged_counts_on_neither_side():
    from provenn.papers.ms_guided_attention.task import Slices
    from provenn.papers.ms_guided_attention.task.subjects import Labelled

    mask = np.full((2, 20, 20), 255, np.uint8)
    mask[:, :10] = 1
    subject = Labelled("a", np.zeros((2, 1, 20, 20), np.float32), mask, (1.0, 1.0, 1.0))
    torch.manual_seed(0)
    meta = {"size": 20, "mean": [0.0], "std": [1.0]}
    for _ in range(20):
        _, drawn = Slices([subject], meta, "released")[0]
        assert set(drawn.unique().tolist()) <= {1, 255}

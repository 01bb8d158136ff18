"""The task volume-segmentation: files, layouts, measures, training and prediction by commands, and studies."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from provenn.cli import main
from provenn.core.errors import UserError
from provenn.evidence.study import TUNING_SEED
from provenn.papers.ms_guided_attention import studies
from provenn.papers.ms_guided_attention.experiments import BRAINS, MARKERS
from provenn.papers.ms_guided_attention.task import Slices, Subjects, framed, moved, soft_dice, strip, voxel_dice
from provenn.papers.ms_guided_attention.task.brains import TISSUES, draw_subject
from provenn.papers.ms_guided_attention.task.measures import agreement
from provenn.papers.ms_guided_attention.task.subjects import (
    Source,
    find_subjects,
    labelled,
    read_classes,
    read_subject,
    with_splits,
)
from provenn.papers.ms_guided_attention.task.volumes import from_slices, read_volume, scaled, write_labels
from provenn.tasks import get_task
from provenn.training import Recipe

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

TASK = get_task("volume-segmentation")


def nifti(file: Path, array: np.ndarray, codes: str = "RAS", spacing=(1.0, 1.0, 1.0), placed: bool = True) -> Path:
    """A NIfTI file whose axes point as the letters say."""
    orientation = nibabel.orientations.axcodes2ornt(tuple(codes))
    affine = np.zeros((4, 4))
    for axis, (along, sign) in enumerate(orientation):
        affine[int(along), axis] = sign * spacing[axis]
    affine[:3, 3], affine[3, 3] = (5.0, -7.0, 11.0), 1.0
    image = nibabel.Nifti1Image(array, affine if placed else None)
    if not placed:
        image.header["sform_code"] = image.header["qform_code"] = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, file)
    return file


def brains(root: Path, count: int = 5, values=(0, 63, 126, 189)) -> Path:
    """A folder of NIfTI subjects with labels called by grey levels, of different sizes."""
    for index in range(count):
        subject = draw_subject("train", index)
        image = 900 * subject.image.transpose(2, 1, 0)[: 60 - index, ::-1, :6].copy() + 40
        mask = np.array(values, np.int16)[subject.mask.transpose(2, 1, 0)[: 60 - index, ::-1, :6]]
        nifti(root / "images" / f"s{index}.nii.gz", image.astype(np.float32), spacing=(3, 3, 6))
        nifti(root / "labels" / f"s{index}.nii.gz", mask, spacing=(3, 3, 6))
    (root / "classes.txt").write_text("0 background\n63 fluid\n126 grey matter\n189 white matter\n")
    return root


def dicom(folder: Path, array: np.ndarray, *, series: str = "1.2.3", gap: int = -1, prefix: str = "IMG") -> Path:
    """Slices (height, width, slices) 4 mm apart, in files whose names are not in the order of their positions."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(array.shape[2])
    for name, level in enumerate(order):
        if level == gap:
            continue
        part = pydicom.Dataset()
        part.file_meta = pydicom.dataset.FileMetaDataset()
        part.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        part.file_meta.MediaStorageSOPClassUID = part.SOPClassUID = pydicom.uid.MRImageStorage
        part.file_meta.MediaStorageSOPInstanceUID = part.SOPInstanceUID = f"1.2.3.{name + 1}"
        part.SeriesInstanceUID, part.SeriesDescription = series, f"series {series}"
        part.Rows, part.Columns = array.shape[:2]
        part.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        part.ImagePositionPatient = [-20.0, -30.0, 4.0 * float(level)]
        part.PixelSpacing, part.SliceThickness = [1.5, 2.0], 3.0
        part.BitsAllocated = part.BitsStored = 16
        part.HighBit, part.PixelRepresentation, part.SamplesPerPixel = 15, 0, 1
        part.PhotometricInterpretation = "MONOCHROME2"
        part.PixelData = array[:, :, level].astype(np.uint16).tobytes()
        part.save_as(folder / f"{prefix}-{name:03d}.dcm", enforce_file_format=True)
    return folder


# Volumes


@pytest.mark.parametrize("codes", ["RAS", "LPS", "ARS", "SPL", "IRP"])
def test_every_orientation_is_seen_alike_and_labels_go_back_where_they_were(tmp_path, codes):
    reference = np.zeros((6, 8, 5), np.float32)  # right, forward, up
    reference[4, 6, 3], reference[1, 2, 0] = 100, 50
    nifti(tmp_path / "ras.nii", reference, spacing=(1, 2, 3))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(tuple(codes))
    )
    array = nibabel.orientations.apply_orientation(reference, turn)
    spacing = np.empty(3)
    for axis, (to, _) in enumerate(turn):
        spacing[int(to)] = (1, 2, 3)[axis]
    file = nifti(tmp_path / f"{codes}.nii.gz", array, codes, tuple(spacing))
    expected, volume = read_volume(tmp_path / "ras.nii"), read_volume(file)
    assert np.array_equal(volume.slices, expected.slices) and volume.spacing == expected.spacing == (3, 2, 1)
    assert volume.slices[3, 0, 1, 4] == volume.slices.max() == 1  # up 3; forward 6 of 0…7 is row 1; right 4
    labels = (volume.slices[:, 0] > 0.4).astype(np.uint8)
    labels[0, 0, 0] = 2
    write_labels(tmp_path / "out.nii.gz", labels, volume, [0, 126, -3])
    original, out = nibabel.load(file), nibabel.load(tmp_path / "out.nii.gz")
    assert out.shape == original.shape and np.array_equal(out.affine, original.affine)
    assert nibabel.aff2axcodes(out.affine) == tuple(codes) and out.header.get_zooms() == original.header.get_zooms()
    values = np.asarray(out.dataobj)
    assert out.get_data_dtype() == np.int16 and set(np.unique(values)) == {-3, 0, 126}
    assert np.array_equal(values == 126, array > 40)
    assert np.array_equal(from_slices(labels, volume), np.select([values == 126, values == -3], [1, 2]))


def test_brightness_is_scaled_by_percentiles_and_a_label_file_is_not(tmp_path):
    array = np.random.default_rng(0).normal(1000, 200, (20, 20, 10)).astype(np.float32)
    volume = read_volume(nifti(tmp_path / "a.nii", array))
    other = read_volume(nifti(tmp_path / "b.nii", 3 * array - 70))
    assert volume.slices.min() == 0 and volume.slices.max() == 1
    np.testing.assert_allclose(volume.slices, other.slices, atol=1e-5)


def test_volumes_that_cannot_be_read_are_refused_in_a_line(tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes(b"not a volume" * 40)
    four = nifti(tmp_path / "four.nii", np.zeros((4, 5, 6, 3), np.float32))
    bad = nifti(tmp_path / "bad.nii", np.full((4, 5, 6), np.nan, np.float32))
    flat = nifti(tmp_path / "flat.nii", np.zeros((4, 5), np.float32))
    for file, said in (
        (tmp_path / "broken.nii.gz", "cannot be read as NIfTI"),
        (four, "holds 3 image"),
        (bad, "not finite"),
        (flat, "2 dimensions"),
        (tmp_path / "none.nii", "none.nii"),
    ):
        with pytest.raises(UserError, match=said):
            read_volume(file)
    assert read_volume(four, 3).slices.shape == (6, 3, 5, 4)
    (tmp_path / "words.txt").write_text("x")
    with pytest.raises(UserError, match="is no volume"):
        read_volume(tmp_path / "words.txt")


def test_a_volume_that_does_not_say_where_it_lies_is_taken_as_it_stands_and_said(tmp_path):
    array = np.zeros((4, 5, 6), np.float32)
    array[1, 3, 2] = 1
    file = nifti(tmp_path / "a.nii", array, placed=False)
    with pytest.warns(UserWarning, match="does not say where it lies"):
        volume = read_volume(file)
    assert volume.slices[2, 0, 3, 1] == 1


def test_a_dicom_series_is_ordered_by_position_and_lies_where_it_says(tmp_path):
    array = np.random.default_rng(0).integers(10, 900, (7, 9, 6))
    array[5, 2, 4] = 5000
    volume = read_volume(dicom(tmp_path / "series", array))
    assert volume.slices.shape == (6, 1, 7, 9) and volume.spacing == (4.0, 1.5, 2.0)
    # DICOM's x runs to the left, so that columns are turned; y runs back, as rows do.
    expected = scaled(array.transpose(2, 0, 1)[:, :, ::-1])
    np.testing.assert_allclose(volume.slices[:, 0], expected, atol=1e-5)
    labels = np.zeros((6, 7, 9), np.uint8)
    labels[4, 5, 6] = 1
    write_labels(tmp_path / "out.nii.gz", labels, volume, [0, 1])
    out = nibabel.load(tmp_path / "out.nii.gz")
    where = out.affine @ [*(int(i[0]) for i in np.where(np.asarray(out.dataobj))), 1]
    np.testing.assert_allclose(where[:3], [-(-20 + 2 * 2.0), -(-30 + 5 * 1.5), 16.0])


def test_series_with_gaps_or_mixed_are_refused(tmp_path):
    array = np.random.default_rng(0).integers(0, 900, (5, 6, 7))
    with pytest.raises(UserError, match="slices 3 and 4 lie 8 mm apart, the others 4"):
        read_volume(dicom(tmp_path / "gap", array, gap=3))
    dicom(tmp_path / "two", array)
    dicom(tmp_path / "two", array, series="9.9", prefix="OTHER")
    with pytest.raises(UserError, match="holds 2 series"):
        read_volume(tmp_path / "two")
    dicom(tmp_path / "twice", array)
    dicom(tmp_path / "twice", array, prefix="AGAIN")
    with pytest.raises(UserError, match="two slices at"):
        read_volume(tmp_path / "twice")


def test_slices_are_ordered_by_number_with_and_without_zeros(tmp_path):
    for name, grey in (("s_2.png", 20), ("s_10.png", 100), ("s_1.png", 10)):
        Image.fromarray(np.full((8, 9), grey, np.uint8)).save(tmp_path / name)
    volume = read_volume(tmp_path)
    assert np.allclose(255 * volume.slices[:, 0, 0, 0], [10, 20, 100]) and volume.names == ("s_1", "s_2", "s_10")


# Layouts


def test_values_of_labels_become_classes_and_unknown_ones_are_refused(tmp_path):
    root = brains(tmp_path / "b", 3)
    splits = find_subjects(root)
    values, names = read_classes(root, splits["train"])
    assert values == [0, 63, 126, 189] and names[3] == "white matter"
    subject = read_subject(splits["train"][0], values)
    assert subject.image.shape == (6, 1, 64, 60) and set(np.unique(subject.mask)) <= {0, 1, 2, 3}
    truth = draw_subject("train", 0).mask[:6, :, :60]
    assert np.array_equal(subject.mask, truth)
    with pytest.raises(UserError, match="holds the value 189, which is no class"):
        read_subject(splits["train"][0], [0, 63, 126])
    (root / "classes.txt").unlink()
    assert read_classes(root, splits["train"])[0] == [0, 63, 126, 189]


def test_black_and_white_labels_are_two_classes(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for name in ("a_1", "b_1"):
            pixels = np.kron([[0, 255], [255, 0]], np.ones((4, 4))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}.png")
    sources = find_subjects(tmp_path)["train"]
    assert read_classes(tmp_path, sources) == ([0, 255], ["background", "class 255"])
    assert set(np.unique(read_subject(sources[0], [0, 255]).mask)) == {0, 1}
    assert set(np.unique(read_subject(sources[0], [0, 1]).mask)) == {0, 255}  # where 255 is no class it is not judged


def test_no_subject_is_in_two_splits(tmp_path):
    for index in range(7):
        for level in range(3):
            for folder in ("Img", "GT"):
                (tmp_path / folder).mkdir(exist_ok=True)
                Image.new("L", (8, 8), 63 * (level % 2)).save(tmp_path / folder / f"Subj_{index}slice_{level + 9}.png")
    splits = with_splits(tmp_path, find_subjects(tmp_path), 0, 0.25)
    named = {split: {source.name for source in part} for split, part in splits.items()}
    assert sum(map(len, named.values())) == 7 == len(set.union(*named.values())) and min(map(len, named.values())) >= 1
    assert all(len(source.image) == 3 for part in splits.values() for source in part)  # the last slice, too
    other = {
        split: {source.name for source in part}
        for split, part in with_splits(tmp_path, find_subjects(tmp_path), 1, 0.25).items()
    }
    assert other != named
    for part in ("train", "test"):
        (tmp_path / "twice" / part / "images").mkdir(parents=True)
        nifti(tmp_path / "twice" / part / "images" / "a.nii", np.zeros((4, 4, 4), np.float32))
        nifti(tmp_path / "twice" / part / "labels" / "a.nii", np.zeros((4, 4, 4), np.int16))
    with pytest.raises(UserError, match="the subject a is in train and in test"):
        find_subjects(tmp_path / "twice")


def test_labels_beside_their_volumes_and_folders_of_series_are_found(tmp_path):
    for index in range(2):
        nifti(tmp_path / "h" / f"training_axial_crop_pat{index}.nii.gz", np.zeros((4, 5, 6), np.float32))
        nifti(tmp_path / "h" / f"training_axial_crop_pat{index}-label.nii.gz", np.ones((4, 5, 6), np.int16))
    assert [source.name for source in find_subjects(tmp_path / "h")["train"]] == [
        "training_axial_crop_pat0",
        "training_axial_crop_pat1",
    ]
    array = np.random.default_rng(0).integers(0, 900, (7, 9, 5))
    base = tmp_path / "chaos" / "21" / "T1DUAL"
    dicom(base / "DICOM_anon" / "InPhase", array)
    dicom(base / "DICOM_anon" / "OutPhase", array)
    dicom(tmp_path / "chaos" / "21" / "T2SPIR" / "DICOM_anon", array)
    order = np.random.default_rng(0).permutation(5)
    for ground in (base / "Ground", tmp_path / "chaos" / "21" / "T2SPIR" / "Ground"):
        ground.mkdir()
        for name, level in enumerate(order):
            grey = np.where(array[:, :, level] > 600, 63, 0).astype(np.uint8)
            Image.fromarray(grey).save(ground / f"IMG-{name:03d}.png")
    (source,) = find_subjects(tmp_path / "chaos")["train"]
    assert source.name == "21" and all("InPhase" in file.parts for file in source.image)
    subject = read_subject(source, [0, 63])
    bright = np.percentile(array, 99.5) - np.percentile(array, 0.5)
    assert np.array_equal(subject.mask == 1, subject.image[:, 0] > (600 - np.percentile(array, 0.5)) / bright)


def test_layouts_that_lack_something_say_what(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        find_subjects(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no subjects"):
        find_subjects(tmp_path / "empty")
    nifti(tmp_path / "a" / "images" / "one.nii", np.zeros((4, 4, 4), np.float32))
    nifti(tmp_path / "a" / "labels" / "two.nii", np.zeros((4, 4, 4), np.int16))
    with pytest.raises(UserError, match=r"one\.nii has no labels"):
        find_subjects(tmp_path / "a")
    root = brains(tmp_path / "shifted", 3)
    first = nibabel.load(root / "labels" / "s0.nii.gz")
    moved_affine = first.affine.copy()
    moved_affine[0, 3] += 9
    nibabel.save(nibabel.Nifti1Image(np.asarray(first.dataobj), moved_affine), root / "labels" / "s0.nii.gz")
    with pytest.raises(UserError, match="affines differ"):
        TASK.load(root)


# Measures


def test_measures_are_those_of_the_definition():
    from scipy.spatial.distance import cdist

    rng = np.random.default_rng(0)
    spacing = (3.0, 1.0, 2.0)
    a, b = rng.random((2, 5, 7, 6)) < 0.3
    found = agreement(a, b, spacing)
    pa, pb = np.argwhere(a), np.argwhere(b)
    apart = cdist(pa, pb)
    assert found.dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert found.volume_similarity == pytest.approx(1 - abs(len(pa) - len(pb)) / (len(pa) + len(pb)))
    assert found.mean_distance == pytest.approx((apart.min(1).sum() + apart.min(0).sum()) / (len(pa) + len(pb)))

    def edge(mask):
        wide = np.pad(mask, 1)
        inner = np.ones_like(mask)
        for axis in range(3):
            for step in (-1, 1):
                inner &= np.roll(wide, step, axis)[1:-1, 1:-1, 1:-1]
        return np.argwhere(mask & ~inner) * np.array(spacing)

    between = cdist(edge(a), edge(b))
    sides = between.min(1), between.min(0)
    assert found.surface_distance == pytest.approx(np.concatenate(sides).mean())
    assert found.hausdorff_95 == pytest.approx(max(np.percentile(side, 95) for side in sides))


def test_empty_masks_are_no_class_or_as_far_as_can_be():
    nothing, one = np.zeros((3, 4, 5), bool), np.zeros((3, 4, 5), bool)
    one[1, 2, 2] = True
    assert agreement(nothing, nothing) is None
    far = agreement(nothing, one, (2.0, 1.0, 1.0))
    assert far.dice == 0 and far.hausdorff_95 == pytest.approx(np.linalg.norm([6, 4, 5]))
    assert agreement(one, one) == (1.0, 1.0, 0.0, 0.0, 0.0)


def test_summary_leaves_absent_classes_out_and_has_the_spread_over_subjects():
    table = np.array([[1.0, 0.5], [0.6, np.nan], [np.nan, np.nan]])
    scores = dict.fromkeys(("dice", "volume_similarity", "mean_distance", "surface_distance", "hausdorff_95"), table)
    summary = TASK.summary(scores)
    assert summary["dice"] == pytest.approx((0.75 + 0.6) / 2) and summary["dice_std"] == pytest.approx(0.075)
    columns, rows = TASK.class_scores(scores, ["outside", "a", "b"])
    assert [row[:3] for row in rows] == [["b", 1, 0.5], ["a", 2, 0.8]] and len(columns) == len(rows[0])


def test_what_is_not_judged_counts_on_neither_side():
    subject = studies.drawn(0, studies.SHORT, "none").test.subjects[0]
    masked = subject.mask.copy()
    masked[:9] = 255

    class Right(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.at = 0

        def forward(self, x):
            part = torch.from_numpy(subject.mask[self.at : self.at + len(x)]).long()
            self.at += len(x)
            wrong = torch.full_like(part, 3) if self.at <= 9 else part
            return torch.nn.functional.one_hot(wrong, 4).permute(0, 3, 1, 2).float()

    meta = studies.drawn(0, studies.SHORT, "none").meta
    from dataclasses import replace

    dataset = Subjects([replace(subject, mask=masked)], meta)
    assert TASK.evaluate(Right(), dataset, 1)["dice"] == pytest.approx(1.0)


# Training data


def test_frames_crop_and_fill_and_what_is_beyond_is_not_judged():
    image, mask = torch.arange(20.0).view(1, 4, 5), torch.ones(4, 5, dtype=torch.uint8)
    cut, part = framed(image, mask, 8, jitter=False)
    assert cut.shape == (1, 8, 8) and int((part == 1).sum()) == 20 and int((part == 255).sum()) == 44
    assert torch.equal(cut[0, 2:6, 1:6], image[0])
    inside, part = framed(image, mask, 3, jitter=False)
    assert torch.equal(inside[0], image[0, :3, 1:4]) and not (part == 255).any()
    torch.manual_seed(0)
    places = {float(framed(image, mask, 3, jitter=True)[0][0, 0, 0]) for _ in range(60)}
    assert places == {0.0, 1.0, 2.0, 5.0, 6.0, 7.0}


def test_augmentation_moves_image_and_mask_alike_and_makes_no_new_class():
    image = torch.zeros(1, 33, 33)
    image[0, 6:12, 20:26] = 1.0
    mask = torch.where(image[0] > 0, 3, 0).to(torch.uint8)
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        out, labels = moved(image, mask, "released")
        assert set(labels.unique().tolist()) <= {0, 3, 255}
        assert ((out[0] > 0.5) == (labels == 3)).float().mean() > 0.99
        seen.add(tuple(torch.nonzero(labels == 3).float().mean(0).round().int().tolist()))
        mirrored = moved(image, mask, "mirror")[1]
        assert set(mirrored.nonzero()[:, 0].tolist()) == set(range(6, 12))
    assert len(seen) > 12


def test_soft_dice_is_zero_for_what_is_right_and_ignores_what_is_not_judged():
    masks = torch.tensor([[[0, 1], [255, 1]]])
    right = torch.full((1, 2, 2, 2), -30.0)
    right[0, 0, 0, 0] = right[0, 1, 0, 1] = right[0, 1, 1, 1] = right[0, 0, 1, 0] = 30.0
    assert float(soft_dice(right, masks)) == pytest.approx(0, abs=1e-6)
    other = right.clone()
    other[0, :, 1, 0] *= -1
    torch.testing.assert_close(soft_dice(other, masks), soft_dice(right, masks))


def test_subjects_are_drawn_alike_again_and_are_all_different():
    one, again, other = draw_subject("train", 3, 1), draw_subject("train", 3, 1), draw_subject("val", 3, 1)
    assert np.array_equal(one.image, again.image) and not np.array_equal(one.mask, other.mask)
    assert one.image.min() == 0 and one.image.max() == 1 and set(np.unique(one.mask)) == {0, 1, 2, 3}


def test_the_dummy_baseline_looks_at_voxels_and_is_not_chance():
    data = studies.drawn(5, {"train": 3, "val": 1, "test": 2}, "none")
    assert 0.4 < voxel_dice(data.train.subjects, data.test.subjects, 4) < 0.85


@pytest.mark.parametrize(
    "options, said",
    [
        ({"size": 8}, "at least 16"),
        ({"size": 128}, "leave size and channels out"),
        ({"augmentation": "all"}, "augmentation must be one of"),
        ({"channels": 2}, "leave size and channels out"),
    ],
)
def test_options_that_do_not_fit_are_said(options, said):
    with pytest.raises(UserError, match=said):
        TASK.load("brains", **options)


# Command line


def test_a_folder_is_trained_on_evaluated_and_predicted_in_its_own_header(tmp_path, capsys, monkeypatch):
    root = brains(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    small = ["--set", "size=64", "--steps", "2", "--seed", "3"]
    assert main(["train", "ms_guided_attention", "--data", str(root), "--out", "run", *small]) == 0
    assert main(["evaluate", "ms_guided_attention", "--data", str(root), "--weights", "run", "--out", "judged"]) == 0
    judged = json.loads(Path("judged/evaluation.json").read_text())
    assert judged["examples"] == 1 and {"dice", "dice_std", "hausdorff_95"} <= judged["metrics"].keys()
    image, truth = root / "images" / "s1.nii.gz", root / "labels" / "s1.nii.gz"
    capsys.readouterr()
    words = ["predict", "ms_guided_attention", str(image), "--weights", "run", "-o", "out.nii.gz", "--overlay"]
    assert main([*words, "--truth", str(truth)]) == 0
    printed = capsys.readouterr().out
    assert "Dice" in printed and "Not a medical device" in printed and " ml" in printed
    out, original = nibabel.load("out.nii.gz"), nibabel.load(image)
    assert out.shape == original.shape and np.array_equal(out.affine, original.affine)
    assert set(np.unique(np.asarray(out.dataobj))) <= {0, 63, 126, 189}
    assert np.asarray(Image.open("out_overlay.png")).shape == (2 * 64, 6 * 59, 3)
    several = ["predict", "ms_guided_attention", *map(str, sorted((root / "images").iterdir())[:2])]
    assert main([*several, "--weights", "run", "-o", "all"]) == 0
    assert sorted(file.name for file in Path("all").iterdir()) == ["s0.nii.gz", "s1.nii.gz"]


def test_outputs_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    volume = nifti(Path("a.nii.gz"), np.random.default_rng(0).random((16, 18, 4)).astype(np.float32))
    Path("slices").mkdir()
    for level in range(2):
        Image.new("L", (16, 16), 40 * level).save(f"slices/x_{level}.png")
    for given, output, said in (
        ([volume], "a.png", "write it as .nii"),
        (["slices"], "b.nii.gz", "do not say where they lie"),
        (["slices"], "b.png", "give a folder"),
        ([volume], "b.csv", "are written as"),
        ([volume], str(volume), "it is the input itself"),
        ([volume, "slices"], "b.nii.gz", "need a folder"),
        ([volume], "/dev/null", "not to"),
    ):
        before = set(Path().iterdir())
        assert main(["predict", "ms_guided_attention", *map(str, given), "-o", output]) == 2
        assert said in capsys.readouterr().err and set(Path().iterdir()) == before, said
    assert main(["predict", "ms_guided_attention", "slices", "-o", "labels"]) == 0
    assert sorted(file.name for file in Path("labels").iterdir()) == ["x_0.png", "x_1.png"]


def test_what_is_read_is_never_written_over(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nifti(Path("own/a.nii.gz"), np.random.default_rng(0).random((16, 18, 4)).astype(np.float32))
    for name in ("own/x.png", "slices/a_overlay.png", "slices/s_1.png", "slices/s_2.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16), 90).save(name)
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    for words in (
        ["own/a.nii.gz", "-o", "own"],
        ["own/x.png", "-o", "own"],
        ["slices", "-o", "slices"],
        ["own/a.nii.gz", "slices/s_1.png", "-o", "slices"],
        ["own/a.nii.gz", "slices", "-o", "slices", "--overlay"],
    ):
        assert main(["predict", "ms_guided_attention", *words]) == 2, words
        assert "itself" in capsys.readouterr().err, words
        assert {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()} == before, words
    assert main(["predict", "ms_guided_attention", "own/a.nii.gz", "slices", "-o", "out", "--overlay"]) == 0
    written = sorted(str(file.relative_to("out")) for file in Path("out").rglob("*.*"))
    assert written == [
        "a.nii.gz",
        "a_overlay.png",
        "slices/a_overlay.png",
        "slices/s_1.png",
        "slices/s_2.png",
        "slices_overlay.png",
    ]


def test_a_strip_shows_slices_above_their_classes():
    slices, labels = np.zeros((3, 1, 4, 5), np.float32), np.zeros((3, 4, 5), np.uint8)
    labels[1, 2, 3] = 2
    shown = strip(slices, labels, {"classes": ["a", "b", "c"]})
    assert shown.shape == (8, 15, 3) and shown[:4].max() == 0
    assert np.argwhere(shown.any(-1)).tolist() == [[6, 8]]


# Studies


@pytest.mark.parametrize("data", [studies.subjects, studies.marked])
def test_splits_of_the_studies_share_no_subject(data):
    made = data(0, True)
    parts = [made.train.subjects, made.val.subjects, made.test.subjects]
    prints = [{one.image.tobytes() for one in part} for part in parts]
    assert not prints[0] & prints[1] and not prints[0] & prints[2] and not prints[1] & prints[2]
    assert isinstance(made.train, Slices) and made.train.augmentation != "none"


def test_markers_lie_far_from_their_discs_and_alone_tell_the_class():
    made = studies.marked(0, True).train.subjects
    kinds = set()
    for subject in made:
        for image, mask in zip(subject.image[:, 0], subject.mask):
            kind = int(mask.max())
            rows, columns = np.nonzero(mask)
            assert set(np.unique(mask)) == {0, kind} and len(rows) > 50 and np.allclose(image[mask > 0], 0.6)
            bright = np.argwhere((image == 1.0) & (mask == 0))
            near = np.hypot(bright[:, 0] - rows.mean(), bright[:, 1] - columns.mean())
            # A slice has some voxels of brightness 1 of its own; a marker has 15 and more, close together.
            assert (near >= studies.FAR - 6).sum() >= 12
            kinds.add(kind)
    assert kinds == {1, 2}


def test_parameters_of_the_ladder_are_matched_within_five_per_cent():
    counts = {}
    for name, (_, part) in studies.VARIANTS.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in studies.network(part).parameters())
    ladder = [counts[name] for name in ("scales", "position", "channel", "dilated", "one step", "two steps", "guided")]
    assert max(ladder) < 1.05 * min(ladder)
    assert counts["semantic"] == counts["guided"] and counts["unet"] < 1.05 * counts["guided"]
    assert all(0.94 < count / counts["guided"] < 1.03 for count in counts.values()), counts


def test_deep_supervision_alone_differs():
    from provenn.papers.ms_guided_attention.experiments import EXPERIMENTS

    contrast = EXPERIMENTS["supervision_more"]
    with_deep, without = (dict(studies.VARIANTS[name][1].options) for (name,) in (contrast.systems, contrast.baselines))
    assert without.pop("deep_supervision") is False and with_deep == without
    assert studies.network(studies.VARIANTS["guided"][1]).deep_supervision


def test_where_a_rate_is_chosen_nothing_is_tested():
    for data in (studies.subjects, studies.marked):
        assert not len(data(TUNING_SEED, True).test) and len(data(TUNING_SEED, True).val) == len(data(0, True).val)
        assert len(data(0, True).test)


def test_a_map_that_is_predicted_from_the_next_one_costs_nothing_where_it_can_be():
    torch.manual_seed(0)
    coarse = torch.randn(2, 3, 4, 5)
    fine = torch.nn.functional.interpolate(coarse, (8, 10), mode="bilinear") * 2 + 1
    weights = studies._linear(coarse, fine)
    seen, target = studies._pairs(coarse, fine)
    torch.testing.assert_close(seen @ weights, target, rtol=1e-2, atol=1e-2)
    model = studies.network(studies.VARIANTS["unet"][1]).eval()
    images = torch.randn(1, 1, 64, 64)
    levels = model.encoded(images)
    assert torch.equal(model.decoded(levels, (64, 64)), model(images))
    zeros = torch.zeros(levels[1].shape[1] + 1, levels[0].shape[1])
    replaced = studies._predicted(levels, 0, zeros)
    assert not replaced[0].any() and all(a is b for a, b in zip(replaced[1:], levels[1:]))
    assert not torch.equal(model.decoded(replaced, (64, 64)), model(images))  # a map of zeros is another map


def test_what_is_lost_by_prediction_is_the_mean_over_maps_of_what_each_costs():
    """By one whole forward pass for each map and subject."""
    data = studies.subjects(0, True)
    for name, count in (("unet", 3), ("two steps", 3)):
        torch.manual_seed(1)
        model = studies.network(studies.VARIANTS[name][1]).eval()
        with torch.no_grad():
            found = studies.lost_by_prediction(model, data)
            train = torch.cat([Subjects(data.train.subjects, data.meta)[one][0][::4] for one in range(2)])
            levels = model.encoded(train)
            costs = []
            for level in range(count):
                weights = studies._linear(levels[level + 1], levels[level])
                for images, masks in (data.test[0], data.test[1]):
                    images, masks = images[:: studies.EVERY], masks[:: studies.EVERY]
                    maps = model.encoded(images)
                    ways = (maps, studies._predicted(maps, level, weights))
                    soft = []
                    for way in ways:
                        likely = model.decoded(way, (64, 64)).softmax(1)[:, 1:]
                        true = torch.nn.functional.one_hot(masks.long(), 4).permute(0, 3, 1, 2)[:, 1:]
                        dice = 2 * (likely * true).sum((0, 2, 3)) / (likely + true).sum((0, 2, 3))
                        soft.append(float(dice.mean()))
                    costs.append(soft[0] - soft[1])
        assert found == pytest.approx(np.mean(costs), abs=1e-5) and abs(found) > 1e-6, name
    assert np.isnan(studies.lost_by_prediction(studies.network(studies.VARIANTS["danet"][1]), data))


def test_a_network_is_judged_once_for_all_probes_and_anew_when_it_or_its_subjects_change(monkeypatch):
    data, other = studies.subjects(0, True), studies.subjects(1, True)
    model = studies.network(studies.VARIANTS["danet"][1]).eval()
    calls = []
    scores = type(TASK).scores
    monkeypatch.setattr(type(TASK), "scores", lambda *given: calls.append(1) or scores(*given))
    judging = studies.Judging()
    with torch.no_grad():
        first = judging.evaluate(model, data.test)
        assert judging.evaluate(model, data.test) == first == TASK.evaluate(model, data.test) and len(calls) == 2
        assert judging.evaluate(model, other.test) != first and len(calls) == 3
        judging.evaluate(model, data.test)
        for change in (lambda: model.heads[0][1].bias.add_(torch.tensor([9.0, 0, 0, 0])), model.train):
            change()
            before = len(calls)
            judging.evaluate(model, data.test)
            assert len(calls) == before + 1
    assert BRAINS.of_task is studies.JUDGING and BRAINS.of_task.name == TASK.name


def test_data_of_all_seeds_of_a_study_are_drawn_once():
    """Six seeds, one of them for the rates, with three splits each."""
    from provenn.papers.ms_guided_attention import task

    for drawing in (task._drawn, studies._marked):
        assert drawing.cache_info().maxsize >= 6 * 3


def test_attention_on_its_own_class_is_measured_against_chance():
    data = studies.subjects(0, True)
    model = studies.network(studies.VARIANTS["two steps"][1]).eval()
    layer = model.attention[-1][0].layers["position"].attention
    with torch.no_grad():
        layer.query.weight.zero_(), layer.query.bias.zero_()  # all keys alike: chance
        assert studies.on_own_class(model, data) == pytest.approx(0, abs=1e-6)
    assert studies.on_own_class(studies.network(studies.VARIANTS["scales"][1]), data) == 0


def test_confusion_of_twins_counts_discs_alone():
    data = studies.marked(0, True)

    class Says(torch.nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def forward(self, x):
            logits = torch.zeros(len(x), 3, 64, 64)
            logits[:, self.kind] = 1
            return logits

    masks = np.concatenate([subject.mask for subject in data.test.subjects])
    share = (masks == 2).sum() / (masks > 0).sum()
    assert studies.twin_confusion(Says(1), data) == pytest.approx(share)
    assert studies.twin_confusion(Says(0), data) == 0.5


def test_studies_train_all_variants_alike():
    assert isinstance(BRAINS.recipe, Recipe) and BRAINS.recipe == MARKERS.recipe and len(BRAINS.lrs) >= 3


def test_labels_of_a_series_go_by_name_or_by_the_order_of_names(tmp_path, recwarn):
    """Slices are in the order of their positions, which that of their files' names is not."""
    rng = np.random.default_rng(3)
    array, classes = rng.integers(0, 900, (9, 7, 5)), rng.integers(0, 3, (9, 7, 5)).astype(np.uint8)
    folder = dicom(tmp_path / "CT" / "DICOM_anon", array)
    order = np.random.default_rng(0).permutation(5)  # as `dicom` names them
    alike, other = tmp_path / "alike", tmp_path / "other"
    series = [file.stem for file in sorted(folder.iterdir())]
    for labels, names in ((alike, series), (other, [f"GT_{k}" for k in range(5)])):
        labels.mkdir()
        for name, level in zip(names, order):
            Image.fromarray(classes[:, :, level]).save(labels / f"{name}.png")
    expected = classes.transpose(2, 0, 1)[:, :, ::-1]  # columns are turned as those of the series
    volume = read_volume(folder)
    for labels, said in ((alike, False), (other, True)):
        found = labelled("a", volume, sorted(labels.iterdir()), [0, 1, 2])
        assert np.array_equal(found.mask, expected)
        assert any("in the order of both names" in str(each.message) for each in recwarn) == said
    (other / "GT_4.png").unlink()
    with pytest.raises(UserError, match=r"labels of 4 slices, .* has 5"):
        labelled("a", volume, sorted(other.iterdir()), [0, 1, 2])


def test_truth_may_be_turned_otherwise_or_be_pictures(tmp_path, capsys, monkeypatch):
    """A label volume in other axes than the volume lies where that one does; a prediction is its own truth."""
    monkeypatch.chdir(tmp_path)
    subject = draw_subject("test", 0)
    image = 900 * subject.image.transpose(2, 1, 0)[:, ::-1, 5:9].copy()
    nifti(Path("scan.nii.gz"), image.astype(np.float32), spacing=(3, 3, 6))
    dicom(Path("series"), 900 * subject.image[5:9].transpose(1, 2, 0))
    for level in range(5, 9):
        Path("slices").mkdir(exist_ok=True)
        Image.fromarray((255 * subject.image[level]).astype(np.uint8)).save(f"slices/s_{level}.png")
    for given, output in (("scan.nii.gz", "scan_labels.nii.gz"), ("series", "out/"), ("slices", "found")):
        assert main(["predict", "ms_guided_attention", given, "-o", output]) == 0
    labels = nibabel.load("scan_labels.nii.gz")
    turned = labels.as_reoriented(nibabel.orientations.axcodes2ornt(tuple("SPL")))
    nibabel.save(turned, "turned.nii")
    shifted = labels.affine.copy()
    shifted[0, 3] += 3
    nibabel.save(nibabel.Nifti1Image(np.asarray(labels.dataobj), shifted), "elsewhere.nii")
    capsys.readouterr()
    for given, truth in (("scan.nii.gz", "turned.nii"), ("series", "out/series.nii.gz"), ("slices", "found")):
        assert main(["predict", "ms_guided_attention", given, "--truth", truth]) == 0
        said = capsys.readouterr().out
        unit = "pixels" if given == "slices" else "mm"
        assert f"grey matter: Dice 1.000, ASSD 0.00 {unit}, HD95 0.00 {unit}" in said
    for given, truth, said in (
        ("scan.nii.gz", "elsewhere.nii", "affines differ"),
        ("scan.nii.gz", "found", "are a NIfTI file"),
        ("slices", "turned.nii", "whose labels are pictures too"),
        ("slices", "found/s_5.png", "labels of 1 slices"),
    ):
        assert main(["predict", "ms_guided_attention", given, "--truth", truth]) == 2
        assert said in capsys.readouterr().err


def test_labels_that_were_written_as_pictures_are_read_as_the_same_classes(tmp_path):
    """A palette's colours say nothing about a class."""
    Image.new("L", (16, 16), 9).save(tmp_path / "a.png")
    volume = read_volume(tmp_path / "a.png")
    labels = np.random.default_rng(0).integers(0, 4, (1, 16, 16)).astype(np.uint8)
    for values in ([0, 1, 2, 3], [0, 63, 126, 189]):
        write_labels(tmp_path / "labels.png", labels, volume, values)
        assert np.array_equal(labelled("a", volume, [tmp_path / "labels.png"], values).mask, labels)
        assert read_classes(tmp_path, [Source("a", (), (tmp_path / "labels.png",))])[0] == values


def test_drawn_subjects_are_judged_as_the_weights_see_them():
    meta = {"classes": list(TISSUES), "channels": 1, "mean": [0.1], "std": [2.0]}
    held = TASK.held_out("brains", meta)
    assert held.dataset.meta is meta and len(held.dataset) == 16
    with pytest.raises(UserError, match="the weights tell a, b in 1"):
        TASK.held_out("brains", {**meta, "classes": ["a", "b"]})


def test_of_two_phases_of_a_subject_one_is_taken(tmp_path):
    array = np.random.default_rng(0).integers(0, 900, (5, 6, 2))
    for subject, kinds in (("1", ("T1DUAL", "T2SPIR")), ("2", ("T2SPIR",))):
        for kind in kinds:
            inner = "DICOM_anon/InPhase" if kind == "T1DUAL" else "DICOM_anon"
            series = dicom(tmp_path / subject / kind / inner, array)
            (tmp_path / subject / kind / "Ground").mkdir()
            for file in series.iterdir():
                Image.new("L", (6, 5)).save(tmp_path / subject / kind / "Ground" / f"{file.stem}.png")
    sources = find_subjects(tmp_path)["train"]
    assert [(source.name, source.image[0].relative_to(tmp_path).parts[1]) for source in sources] == [
        ("1", "T1DUAL"),
        ("2", "T2SPIR"),
    ]

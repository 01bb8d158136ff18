"""Captions in every layout, and what is wrong with a folder in one line that names the file and the line."""

import json

import numpy as np
import pytest
from PIL import Image

from provenn.core.errors import UserError
from provenn.data.captions import layout_of, read_captions


def photo(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


@pytest.fixture
def root(tmp_path):
    for number in range(4):
        photo(tmp_path / "images" / f"{number}.jpg")
    return tmp_path


def said(part):
    return {getattr(image, "name", None): texts for image, texts in zip(part.images, part.captions)}


def karpathy(root, **changes):
    images = [
        {"filename": f"{k}.jpg", "filepath": "images", "split": split, "sentences": [{"raw": f"A {k}."}, {"raw": "b"}]}
        for k, split in enumerate(("train", "restval", "val", "test"))
    ]
    images[3].update(changes)
    (root / "dataset_coco.json").write_text(json.dumps({"images": images}))


def coco(root, images=(0, 1), notes=((0, "one"), (0, "two"), (1, "three"))):
    listed = [{"id": k, "file_name": f"{k}.jpg"} for k in images]
    content = {"images": listed, "annotations": [{"image_id": k, "caption": text} for k, text in notes]}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "captions_train2017.json").write_text(json.dumps(content))


def test_karpathys_splits_with_restval_in_training(root):
    karpathy(root)
    parts = read_captions(root)
    assert layout_of(root) == "karpathy" and {name: len(part.captions) for name, part in parts.items()} == {
        "train": 2, "val": 1, "test": 1,
    }  # fmt: skip
    assert said(parts["test"]) == {"3.jpg": ["A 3.", "b"]}


def test_coco_files_have_a_split_each(root):
    coco(root)
    parts = read_captions(root)
    assert list(parts) == ["train"] and said(parts["train"]) == {"0.jpg": ["one", "two"], "1.jpg": ["three"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results_20130124.token", "0.jpg#0\tA dog .\n0.jpg#1\tA cat\n3.jpg#0\tA tree\n"),
        ("results.csv", "image_name| comment_number| comment\n0.jpg| 0| A dog .\n0.jpg| 1| A cat\n3.jpg| 0| A tree\n"),
    ],
)
def test_flickr30k_lists_a_caption_a_line(root, name, text):
    (root / name).write_text(text)
    assert said(read_captions(root)["train"]) == {"0.jpg": ["A dog .", "A cat"], "3.jpg": ["A tree"]}


@pytest.mark.parametrize("name", ["captions.csv", "captions.tsv", "captions.txt"])
def test_a_plain_folder_has_an_image_and_a_caption_a_line(root, name):
    mark = "\t" if name.endswith("tsv") else ","
    lines = [f"images/{k}.jpg{mark}a picture of {k}" for k in range(4)]
    (root / name).write_text("\n".join([f"image{mark}caption", *lines, f"1.jpg{mark}another"]))
    assert said(read_captions(root)["train"])["1.jpg"] == ["a picture of 1", "another"]


def features(root, name="train", images=6, each=5, lengths=None):
    rng = np.random.default_rng(0)
    np.save(root / f"{name}_ims.npy", rng.random((images, 3, 4), dtype=np.float32))
    (root / f"{name}_caps.txt").write_text("\n".join(f"caption {k}" for k in range(images * each)) + "\n")
    if lengths is not None:
        np.save(root / f"{name}_lens.npy", np.array(lengths))


def test_features_of_regions_lie_on_the_disk_with_their_lengths(tmp_path):
    features(tmp_path, lengths=[1, 2, 3, 3, 3, 3])
    features(tmp_path, "dev", 2)
    features(tmp_path, "testall", 3)
    parts = read_captions(tmp_path)
    assert {name: len(part.captions) for name, part in parts.items()} == {"train": 6, "val": 2, "test": 3}
    assert parts["train"].captions[1] == [f"caption {k}" for k in range(5, 10)]
    assert isinstance(parts["train"].images, np.memmap) and parts["train"].lengths.tolist() == [1, 2, 3, 3, 3, 3]
    some = parts["train"].some([2, 0])
    assert some.lengths.tolist() == [3, 1] and (some.images[0] == parts["train"].images[2]).all()


def test_numbers_of_real_regions_are_finite(tmp_path):
    features(tmp_path, lengths=[1, 2, 3, 3, 3, 3])
    values = np.load(tmp_path / "train_ims.npy")
    values[0, 1] = np.nan  # not real
    np.save(tmp_path / "train_ims.npy", values)
    assert len(read_captions(tmp_path)["train"].captions) == 6
    values[4, 2, 1] = np.inf
    np.save(tmp_path / "train_ims.npy", values)
    with pytest.raises(UserError, match=r"train_ims.npy: image 4, region 2 holds NaN or infinity"):
        read_captions(tmp_path)


def test_an_image_that_stands_once_for_each_caption_is_one_image(tmp_path):
    features(tmp_path, images=10, each=1)
    values = np.load(tmp_path / "train_ims.npy")
    np.save(tmp_path / "train_ims.npy", values[[0] * 5 + [5] * 5])
    part = read_captions(tmp_path)["train"]
    assert len(part.images) == 2 and [len(texts) for texts in part.captions] == [5, 5]


def bad_caption(root):
    coco(root, notes=((0, "one"), (1, "two"), (7, "three")))


def bad_image(root):
    coco(root, notes=((0, "one"),))


def missing_in_json(root):
    coco(root, images=(0, 9), notes=((0, "one"), (9, "two")))


def missing_in_list(root):
    (root / "results.csv").write_text("image_name| n| comment\n0.jpg| 0| A dog\n8.jpg| 0| A cat\n")


def no_caption(root):
    (root / "captions.csv").write_text("0.jpg,a\n1.jpg\n")


def no_image(root):
    (root / "captions.csv").write_text("0.jpg,a\n,b\n")


def unnamed(root):
    (root / "captions.csv").write_text("0.jpg,a\n1.jpg,b\n2.jpg,c\n")


def unsplit(root):
    karpathy(root, split="left")


def silent(root):
    karpathy(root, sentences=[])


def odd_lines(root):
    features(root)
    (root / "train_caps.txt").write_text("a\n" * 29)


def few_lines(root):
    features(root, each=0)


def empty_line(root):
    features(root)
    (root / "train_caps.txt").write_text("a\n" * 12 + "\n" + "a\n" * 17)


def odd_lengths(root):
    features(root, lengths=[1, 2, 3])


def flat(root):
    features(root)
    np.save(root / "train_ims.npy", np.zeros((6, 4)))


def no_array(root):
    features(root)
    (root / "train_ims.npy").write_text("no array")


def two_of_a_name(root):
    photo(root / "more" / "0.jpg")
    (root / "results.csv").write_text("0.jpg| 0| A dog\n")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (bad_caption, r"captions_train2017.json, annotation 2: a caption without an image: the file lists no image 7"),
        (bad_image, r"captions_train2017.json: the image '1.jpg' has no caption: add one, or remove the image"),
        (missing_in_json, r"captions_train2017.json, image 9: no image '9.jpg' below"),
        (missing_in_list, r"results.csv, line 3: no image '8.jpg' below .*: add the file or remove the line"),
        (no_caption, r"captions.csv, line 2: the image '1.jpg' has no caption: expected an image and a text"),
        (no_image, r"captions.csv, line 2: a caption without an image: 'b'"),
        (unnamed, r"3.jpg: the image has no caption in captions.csv: add one, or remove the image"),
        (unsplit, r"dataset_coco.json, image 3: its split is 'left': expected train, restval, val or test"),
        (silent, r"dataset_coco.json, image 3: 'images/3.jpg' has no caption"),
        (odd_lines, r"train_caps.txt has 29 lines for 6 images in train_ims.npy: captions without an image"),
        (few_lines, r"train_caps.txt.* 6 images in train_ims.npy: images without a caption|line 1: an image without"),
        (empty_line, r"train_caps.txt, line 13: an image without a caption: the line is empty"),
        (odd_lengths, r"train_lens.npy: expected 6 numbers from 1 to 3, one for each image, got 3"),
        (flat, r"train_ims.npy: expected numbers in 3 dimensions, got float64 \(6, 4\)"),
        (no_array, r"train_ims.npy is no array of NumPy"),
        (two_of_a_name, r"results.csv, line 1: 2 images are called '0.jpg'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(root, wrong, message):
    wrong(root)
    with pytest.raises(UserError, match=message) as caught:
        read_captions(root)
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_layout_than_said_is_refused(root):
    (root / "captions.csv").write_text("".join(f"{k}.jpg,a\n" for k in range(4)))
    with pytest.raises(UserError, match=r"has not the layout coco: expected annotations/captions_….json; .*=plain$"):
        read_captions(root, "coco")
    with pytest.raises(UserError, match="layout must be one of karpathy, coco, flickr30k, features, plain, got 'x'"):
        read_captions(root, "x")
    with pytest.raises(UserError, match="is a file: give the folder"):
        read_captions(root / "captions.csv")
    (root / "captions.csv").unlink()
    with pytest.raises(UserError, match=r"holds no captions: expected dataset_….json; annotations"):
        read_captions(root)

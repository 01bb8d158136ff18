"""Lists of CUB-200-2011, NABirds, Stanford Dogs and Tiny-ImageNet, and one line for each way to be wrong."""

import numpy as np
import pytest
from scipy.io import savemat

import miniature
from provenn.core.errors import UserError
from provenn.data.listed_images import listed_splits


def sizes(splits):
    return {split: {name: len(files) for name, files in part.items()} for split, part in splits.items()}


def test_cub_and_nabirds(tmp_path):
    found = sizes(listed_splits(miniature.write("cub-200-2011", tmp_path)))
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    assert found == {"train": dict.fromkeys(names, 4), "test": dict.fromkeys(names, 2)}
    found = sizes(listed_splits(miniature.write("nabirds", tmp_path)))
    names = ("Wood Duck (9)", "Common Eider (Adult male)", "Wood Duck (1010)")
    assert list(found["train"]) == list(names), "by number; two of one name are told apart, one without images is none"
    assert found == {"train": dict.fromkeys(names, 4), "test": dict.fromkeys(names, 2)}


def test_the_split_is_that_of_the_list(tmp_path):
    root = miniature.write("cub-200-2011", tmp_path)
    splits = listed_splits(root)
    assert {file.name[-5] for file in splits["train"]["002.Laysan_Albatross"]} == set("0123")
    (root / "train_test_split.txt").write_text("".join(f"{i} {int(i % 2)}\n" for i in range(1, 13)))
    assert {file.name[-5] for file in listed_splits(root)["train"]["002.Laysan_Albatross"]} == set("024")


def test_stanford_dogs_with_lists_here_or_there(tmp_path):
    root = miniature.write("stanford-dogs", tmp_path)
    found = listed_splits(root)
    names = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel")
    assert sizes(found) == {"train": dict.fromkeys(names, 4), "test": dict.fromkeys(names, 2)}
    for file in (root / "lists").iterdir():
        file.rename(root / file.name)
    assert listed_splits(root) == found


def test_tiny_imagenet(tmp_path):
    root = miniature.write("tiny-imagenet", tmp_path)
    names = ("n01443537 goldfish", "n01629819 European fire salamander")
    assert sizes(listed_splits(root)) == {"train": dict.fromkeys(names, 4), "val": dict.fromkeys(names, 2)}
    (root / "words.txt").unlink()
    assert list(listed_splits(root)["val"]) == ["n01443537", "n01629819"]


def test_other_folders_are_none_of_these(tmp_path):
    assert listed_splits(miniature.write("imagenet-1k", tmp_path)) is None


def test_what_is_wrong_with_lists_of_birds_is_said_in_a_line(tmp_path):
    root = miniature.write("cub-200-2011", tmp_path)
    lists = {name: (root / name).read_text() for name in ("images.txt", "image_class_labels.txt", "classes.txt")}
    split = (root / "train_test_split.txt").read_text()
    wrong = [
        (
            "train_test_split.txt",
            split.replace("3 1\n", "3 yes\n", 1),
            "says 1 for training and 0 for the test, got 'yes'",
        ),
        ("train_test_split.txt", split.replace("3 1\n", "", 1), "the image '3' is in images.txt alone"),
        ("train_test_split.txt", split.replace("1\n", "0\n"), "no train images of the class '001.Black"),
        ("train_test_split.txt", split.replace("3 1\n", "3\n", 1), "train_test_split.txt:3: expected two columns"),
        ("image_class_labels.txt", lists["image_class_labels.txt"].replace("3 1\n", "3 7\n", 1), "has the class '7'"),
        ("images.txt", lists["images.txt"].replace("_2.jpg", "_9.jpg", 1), "_9.jpg, which is not there"),
        ("images.txt", lists["images.txt"].replace("001.Black_footed_Albatross/", "../../", 1), "lies outside of it"),
    ]
    for name, text, said in wrong:
        before = (root / name).read_text()
        (root / name).write_text(text)
        with pytest.raises(UserError, match=said) as refused:
            listed_splits(root)
        assert "\n" not in str(refused.value)
        (root / name).write_text(before)
    assert listed_splits(root)
    (root / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"has image_class_labels\.txt but no classes\.txt"):
        listed_splits(root)


def test_what_is_wrong_with_the_others_is_said_in_a_line(tmp_path):
    root = miniature.write("stanford-dogs", tmp_path)
    for content, said in (
        ({"file_list": np.array([["a.jpg"]], dtype=object)}, "expected class/file.jpg"),
        ({}, "no file_list"),
    ):
        savemat(root / "lists" / "test_list.mat", content)
        with pytest.raises(UserError, match=said):
            listed_splits(root)
    (root / "lists" / "test_list.mat").write_bytes(b"no matlab")
    with pytest.raises(UserError, match=r"holds no file_list: [^\n]*$"):
        listed_splits(root)
    (root / "lists" / "test_list.mat").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        listed_splits(root)

    root = miniature.write("tiny-imagenet", tmp_path)
    (root / "wnids.txt").write_text("n01443537\n")
    with pytest.raises(UserError, match=r"is of n01629819, which wnids\.txt does not have"):
        listed_splits(root)
    (root / "wnids.txt").write_text("n01443537\nn01629819\nn00000001\n")
    with pytest.raises(UserError, match=r"wnids\.txt has n00000001, and there is no folder"):
        listed_splits(root)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match=r"has wnids.txt but no val.val_annotations.txt"):
        listed_splits(root)


def test_an_image_that_the_lists_name_twice_is_refused(tmp_path):
    """In two splits it would be tested on what it was trained on."""
    root = miniature.write("stanford-dogs", tmp_path)
    first = next(iter(listed_splits(root)["train"].values()))[0]
    tested = [file for files in listed_splits(root)["test"].values() for file in files]
    names = [f"{file.parent.name}/{file.name}" for file in (*tested, first)]
    savemat(root / "lists" / "test_list.mat", {"file_list": np.array([[name] for name in names], dtype=object)})
    with pytest.raises(UserError, match=f"{first.name} twice"):
        listed_splits(root)
    root = miniature.write("cub-200-2011", tmp_path)
    lines = (root / "images.txt").read_text().splitlines()
    lines[1] = f"{lines[1].split()[0]} {lines[0].split()[1]}"
    (root / "images.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match="twice"):
        listed_splits(root)
    root = miniature.write("tiny-imagenet", tmp_path)
    with (root / "val" / "val_annotations.txt").open("a") as listing:
        listing.write((root / "val" / "val_annotations.txt").read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="twice"):
        listed_splits(root)

"""Layouts of re-identification: who, where and which part, and one line for each way in which a folder can be wrong."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from provenn.core.errors import UserError
from provenn.data.identities import Seen, read_identities


def pictures(root, *names):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 2, 3), np.uint8)).save(file)
    return root


def shown(found, part):
    return [(seen.file.name, seen.identity, seen.camera) for seen in found.parts[part]]


@pytest.mark.parametrize(
    "folders, names",
    [
        (("bounding_box_train", "query", "bounding_box_test"), ("0002_c1s1_000451_03.jpg", "0007_c2s3_070952_01.jpg")),
        (("bounding_box_train", "query", "bounding_box_test"), ("0002_c1_f0046182.jpg", "0007_c2_f0046182.jpg")),
        (("image_train", "image_query", "image_test"), ("0002_c001_00030600_0.jpg", "0007_c002_00084250_0.jpg")),
    ],
)
def test_names_say_who_and_where(tmp_path, folders, names):
    train, test = names
    elsewhere = test.replace("c2", "c5").replace("c002", "c005")
    again = train.replace(".jpg", "b.jpg")
    pictures(tmp_path, f"{folders[0]}/{train}", f"{folders[0]}/{again}", f"{folders[1]}/{test}")
    pictures(tmp_path, f"{folders[2]}/{elsewhere}", f"{folders[2]}/-1{test[4:]}", f"{folders[2]}/0000{test[4:]}")
    found = read_identities(tmp_path)
    assert shown(found, "train") == [(train, 2, 1), (again, 2, 1)]
    assert shown(found, "query") == [(test, 7, 2)]
    assert {(identity, camera) for _, identity, camera in shown(found, "gallery")} == {(-1, 2), (0, 2), (7, 5)}
    assert found.identities[7] == "7"


@pytest.mark.parametrize("train, test", [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_msmt17_lists_count_the_test_on(tmp_path, train, test):
    name = "{0:04}/{0:04}_000_{1:02}_0303morning_0008_{2}.jpg"
    listed = {
        "train": [(0, 1, 0), (0, 2, 0), (1, 4, 0), (1, 4, 1)],
        "val": [(2, 3, 0)],
        "query": [(0, 1, 0)],
        "gallery": [(0, 14, 1), (1, 1, 0)],
    }
    for part, rows in listed.items():
        folder = train if part in ("train", "val") else test
        pictures(tmp_path, *(f"{folder}/{name.format(*row)}" for row in rows))
        (tmp_path / f"list_{part}.txt").write_text("".join(f"{name.format(*row)} {row[0]}\n" for row in rows))
    found = read_identities(tmp_path)
    assert [(seen.identity, seen.camera) for seen in found.parts["train"]] == [(0, 1), (0, 2), (1, 4), (1, 4)]
    assert [(seen.identity, seen.camera) for seen in found.parts["val"]] == [(2, 3)]
    assert [(seen.identity, seen.camera) for seen in found.parts["query"]] == [(3, 1)]
    assert [(seen.identity, seen.camera) for seen in found.parts["gallery"]] == [(3, 14), (4, 1)]

    listing = tmp_path / "list_query.txt"
    for line, word in (
        ("0000/a.jpg 0", "expected a picture"),
        ("../../x/0_0_1_.jpg 0", "outside"),
        ("x", "query.txt:1"),
    ):
        listing.write_text(line)
        with pytest.raises(UserError, match=word):
            read_identities(tmp_path)


def test_a_plain_folder_is_divided_by_identity(tmp_path):
    names = [f"{who}/{where}/{k}.png" for who in "abcdef" for where in ("door", "hall") for k in (1, 2)]
    found = read_identities(pictures(tmp_path, *names))
    parts = {part: {found.identities[seen.identity] for seen in some} for part, some in found.parts.items()}
    assert parts == {"train": set("ace"), "query": set("bdf"), "gallery": set("bdf")}
    asked = Counter((seen.identity, seen.camera) for seen in found.parts["query"])
    assert len(asked) == 6 and set(asked.values()) == {1}
    assert all(seen.file.name == "1.png" for seen in found.parts["query"])
    assert len(found.parts["gallery"]) == 12 and set(found.parts["query"]) <= set(found.parts["gallery"])
    assert found.cameras == {0: "door", 1: "hall"}


def test_given_parts_are_kept(tmp_path):
    names = ("train/a/1/x.png", "train/a/2/x.png", "query/b/1/x.png", "gallery/b/2/x.png", "gallery/z/2/x.png")
    found = read_identities(pictures(tmp_path, *names))
    assert {part: len(some) for part, some in found.parts.items()} == {"train": 2, "query": 1, "gallery": 2}
    assert found.parts["query"] == [Seen(tmp_path / "query/b/1/x.png", 1, 0)]


def test_what_is_left_out_is_said(tmp_path):
    names = ("train/a/1/x.png", "query/b/1/x.png", "query/c/1/x.png", "query/d/1/x.png")
    pictures(tmp_path, *names, "gallery/b/2/x.png", "gallery/c/1/y.png")
    with pytest.warns(UserWarning) as warned:
        read_identities(tmp_path)
    said = " ".join(str(warning.message) for warning in warned)
    assert "2 of 3 queries have nobody to find and are left out: c, d" in said
    assert "with one picture to train on, and so no pair: a" in said


@pytest.mark.parametrize(
    "names, said",
    [
        (("a/1/x.png", "loose.png"), "expected identity/camera/loose.png"),
        (("a/1/x.png", "a/x.png"), "expected identity/camera/x.png"),
        (("a/1/x.png", "a/1/2/x.png"), "expected identity/camera/x.png"),
        (("bounding_box_train/0001_c1.png",), "none called query"),
        (
            ("bounding_box_train/0001_c1.png", "query/me.png", "bounding_box_test/1_c1.png"),
            "says no identity and camera",
        ),
        (("train/a/1/x.png", "query/b/1/x.png"), "none called 'gallery'"),
        (("a/1/x.png", "a/2/x.png"), "shows one identity"),
        (
            ("train/a/1/x.png", "train/a/1/y.png", "query/a/1/x.png", "gallery/a/2/x.png"),
            "identities a are in train and in the test",
        ),
        (("train/a/1/x.png", "query/b/1/x.png", "gallery/c/2/x.png"), "no query's identity is in the gallery"),
        (("train/a/1/x.png", "query/b/1/x.png", "gallery/b/1/y.png"), "no query's identity is in the gallery"),
        (("a/1/x.png", "b/1/x.png", "b/2/x.png", "b/2/x.jpg"), "two pictures called 'x'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, names, said):
    with pytest.raises(UserError, match=said) as refused:
        read_identities(pictures(tmp_path, *names))
    assert "\n" not in str(refused.value)


def test_a_query_that_shows_nobody_has_nobody_to_find(tmp_path):
    folders = ("bounding_box_train/2_c1.png", "bounding_box_train/2_c2.png", "query/-1_c1.png", "query/3_c1.png")
    pictures(tmp_path, *folders, "bounding_box_test/-1_c2.png", "bounding_box_test/3_c2.png")
    with pytest.warns(UserWarning, match="1 of 2 queries have nobody to find and are left out: -1"):
        read_identities(tmp_path)


def test_junk_may_be_in_every_part(tmp_path):
    names = ("bounding_box_train/-1_c1.png", "bounding_box_train/2_c2.png", "bounding_box_train/2_c1.png")
    pictures(tmp_path, *names, "query/3_c1.png", "bounding_box_test/-1_c2.png", "bounding_box_test/3_c2.png")
    assert {seen.identity for seen in read_identities(tmp_path).parts["train"]} == {-1, 2}


def test_no_folder_and_an_empty_one(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        read_identities(tmp_path / "nowhere")
    with pytest.raises(UserError):
        read_identities(tmp_path)


def test_a_folder_of_one_identity_says_so(tmp_path):
    for camera in "12":
        (tmp_path / "anna" / camera).mkdir(parents=True)
        (tmp_path / "anna" / camera / "a b.jpg").touch()
    with pytest.raises(UserError, match="shows one identity, 'anna': every second is for the test"):
        read_identities(tmp_path)
    parts = read_identities(tmp_path, whole=True).parts
    assert [len(parts[part]) for part in ("train", "query", "gallery")] == [0, 2, 2]

"""COCO JSON: where it lies, what is read, and what is refused."""

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from provenn.core.errors import UserError
from provenn.data.coco import filled, find_coco, read_coco, read_outlines
from provenn.data.scenes import BACKGROUNDS, COUNTS, SHARES, SIZE, _stock, scenes


def write(folder, name="a.json", images=None, annotations=None, categories=None):
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"id": 5, "file_name": "a.png", "width": 40, "height": 30}] if images is None else images
    for image in images:
        if isinstance(image, dict) and "file_name" in image and "width" in image:
            path = folder / image["file_name"]
            Image.new("RGB", (image["width"], image["height"])).save(path)
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}] if categories is None else categories
    content = {"images": images, "categories": categories, "annotations": annotations or []}
    (folder / name).write_text(json.dumps(content))
    return folder / name


def note(**overrides):
    return {"id": 1, "image_id": 5, "category_id": 7, "bbox": [2, 3, 10, 20], "area": 150.0, "iscrowd": 0, **overrides}


def test_what_a_file_says_is_read(tmp_path):
    images = [
        {"id": 5, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 9, "file_name": "b.png", "width": 10, "height": 10},
    ]
    notes = [note(), note(id=2, category_id=3, bbox=[35, 25, 20, 20], area=0, iscrowd=1)]
    content = read_coco(write(tmp_path, images=images, annotations=notes))
    assert content.classes == ["cat", "dog"] and content.ids == [3, 7]
    first, empty = content.images
    assert first.file == tmp_path / "a.png" and first.number == 5
    assert first.boxes.tolist() == [[2, 3, 12, 23], [35, 25, 40, 30]] and first.labels.tolist() == [1, 0]
    assert first.areas.tolist() == [150, 25] and first.crowd.tolist() == [False, True]
    assert empty.boxes.shape == (0, 4) and not len(empty.labels)


def test_boxes_that_nobody_can_find_are_left_out_and_said(tmp_path):
    notes = [note(), *(note(id=i) for i in (2,)), note(id=3, bbox=[1, 1, 0, 5]), note(id=4, bbox=[50, 50, 9, 9])]
    notes += [note(id=i, bbox=[i, 2, 5, 5]) for i in range(5, 12)] + [note(id=12, bbox=[9, 9, -4, 5])]
    with pytest.warns(UserWarning) as said:
        content = read_coco(write(tmp_path, annotations=notes))
    assert len(content.images[0].boxes) == 8
    text = " | ".join(str(each.message) for each in said)
    for words in ("left out 2 boxes without width or height", "left out 1 box outside", "left out 1 box given twice"):
        assert words in text, text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"annotations": [note(image_id=6)]}, "annotation 1 is of image 6, which the file does not list"),
        ({"annotations": [note(category_id=1)]}, "annotation 1 is of category 1, which the file does not list"),
        ({"annotations": [note(bbox=[1, 2, 3])]}, r"annotation 1: bbox must be four numbers.*got \[1, 2, 3\]"),
        ({"annotations": [note(bbox=[1, 2, 3, float("nan")])]}, "bbox must be four numbers"),
        ({"annotations": [{"id": 4, "image_id": 5}]}, "annotation 4 lacks image_id, category_id or bbox"),
        ({"annotations": [3]}, "annotation 0 lacks"),
        ({"annotations": [note(id=i, bbox=[9, 9, 39, 29 - i]) for i in range(4)]}, "not two corners"),
        ({"images": []}, "lists no images"),
        ({"images": [{"id": 1}]}, "an image needs an id and a file_name"),
        ({"images": [{"id": 1, "file_name": "b.gif"}]}, "'b.gif' is no image that is read"),
        ({"images": [{"id": 1, "file_name": "b.png"}]}, "its images, such as b.png, are in none of"),
        ({"images": [{"id": 1, "file_name": "b.png", "width": 3, "height": 4}] * 2}, "two images have the id 1"),
        ({"categories": []}, "lists no categories"),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
            r"the category 'b' \(id 1\) is listed twice",
        ),
        ({"categories": [{"name": "a"}]}, "a category needs an id"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        read_coco(write(tmp_path, **overrides))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"images": 3}', "[" * 100_000])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json(: no JSON| is no COCO JSON|: nested)"):
        read_coco(tmp_path / "a.json")


def test_images_that_are_missing_damaged_or_of_another_size(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 6} for i in range(4)]
    file = write(tmp_path, images=images, annotations=[note(image_id=1, bbox=[0, 0, 4, 4]), note(image_id=2, id=2)])
    (tmp_path / "3.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 images are not in .*, such as 3\.png"):
        read_coco(file)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"left out 2 of its images, .* such as 1\.png"):
        assert [image.number for image in read_coco(file, skip_broken=True).images] == [0, 2]
    Image.new("RGB", (6, 8)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"0\.png is 6×8 pixels; a\.json says 8×6"):
        read_coco(file, skip_broken=True)


def test_sizes_that_a_file_leaves_open_are_those_of_the_images(tmp_path):
    file = write(tmp_path, annotations=[note()])
    file.write_text(file.read_text().replace('"width": 40, "height": 30', '"width": null, "height": null'))
    assert "null" in file.read_text() and len(read_coco(file).images[0].boxes) == 1


def test_every_layout_is_found(tmp_path):
    official = tmp_path / "official"
    for split in ("train", "val"):
        write(official / f"{split}2017")
        (official / "annotations").mkdir(exist_ok=True)
        (official / f"{split}2017" / "a.json").rename(official / "annotations" / f"instances_{split}2017.json")
        (official / "annotations" / f"captions_{split}2017.json").write_text("{}")
    nested = tmp_path / "nested"
    write(nested / "images" / "train2017", name="x.json")
    (nested / "annotations").mkdir()
    (nested / "images" / "train2017" / "x.json").rename(nested / "annotations" / "instances_train2017.json")
    folders = tmp_path / "folders"
    for split in ("train", "valid", "test"):
        write(folders / split, name="_annotations.coco.json")
    single = tmp_path / "single"
    write(single, name="labels.json")
    for root, splits in ((official, 2), (nested, 1), (folders, 3), (single, 1), (single / "labels.json", 1)):
        found = find_coco(root)
        assert list(found) == ["train", "val", "test"][:splits] or set(found) == {"train", "val", "test"}
        for file in found.values():
            assert read_coco(file, root if root.is_dir() else root.parent).images[0].file.is_file()
    assert find_coco(official)["val"].name == "instances_val2017.json"


def test_folders_that_leave_something_open_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no annotations: expected COCO JSON"):
        find_coco(tmp_path)
    write(tmp_path, "one.json")
    write(tmp_path, "two.json")
    with pytest.raises(UserError, match="says neither train, val nor test"):
        find_coco(tmp_path)
    write(tmp_path / "b", "train.json")
    write(tmp_path / "b", "train2.json")
    with pytest.raises(UserError, match="are both for train"):
        find_coco(tmp_path / "b")


def test_scenes_are_exact_seeded_and_share_nothing_between_splits():
    one, again, other = scenes("val", 0, 30), scenes.__wrapped__("val", 0, 30), scenes("val", 1, 30)
    for first, second in zip(one, again):
        assert np.array_equal(first.pixels, second.pixels) and np.array_equal(first.boxes, second.boxes)
    assert not np.array_equal(one[0].pixels, other[0].pixels)
    assert len({len(scene.boxes) for scene in one}) == 5, "none to four objects"
    for scene in one:
        assert scene.pixels.shape == (*SIZE, 3) and scene.pixels.dtype == np.uint8
        assert (scene.boxes[:, :2] >= 0).all() and (scene.boxes[:, 2:] <= (SIZE[1], SIZE[0])).all()
        assert (scene.boxes[:, 2:] > scene.boxes[:, :2]).all()
    assert len(set(sum(BACKGROUNDS.values(), ()))) == sum(map(len, BACKGROUNDS.values()))
    ends = [SHARES[split] for split in COUNTS]
    assert ends[0][0] == 0 and ends[-1][1] == 1 and all(a[1] == b[0] for a, b in pairwise(ends))
    assert {kind: len(cuts) for kind, cuts in _stock().items()} == {
        "coin": 24, "digit": 1797, "face": 100, "oval": 100, "disc": 108
    }  # fmt: skip


def test_the_box_of_an_object_is_where_its_pixels_are(monkeypatch):
    """Without noise and light, what differs from the background lies in the boxes and touches each of their sides."""
    from provenn.data import scenes as module

    monkeypatch.setattr(module, "MOST_DISTRACTORS", 0)
    monkeypatch.setattr(module, "MOST_OBJECTS", 1)
    monkeypatch.setattr(module, "_background", lambda split, rng: np.zeros((*SIZE, 3)))
    seen = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scene = module._scene("train", rng)
        strong = scene.pixels.max(axis=2) > 45
        if not len(scene.boxes) or scene.pixels.max() < 120:
            continue
        left, top, right, bottom = scene.boxes[0].astype(int)
        outside = strong.copy()
        outside[top:bottom, left:right] = False
        assert outside.mean() < 0.02, "noise alone"
        rows, columns = (np.flatnonzero(strong[top:bottom, left:right].any(axis=a)) for a in (1, 0))
        assert rows[0] <= 4 and columns[0] <= 4 and rows[-1] >= bottom - top - 5 and columns[-1] >= right - left - 5
        seen += 1
    assert seen > 10


def test_boxes_of_absurd_size_are_cut_and_said(tmp_path):
    boxes = [[1, 1, 3, 3], [2, 2, 1e9, 1], [-500.0, 0, 502, 4], [0, 0, 4, 4]]
    notes = [{"id": i, "image_id": 5, "category_id": 7, "bbox": box, "area": 1e30} for i, box in enumerate(boxes)]
    with pytest.warns(
        UserWarning, match="cut 2 boxes that reach beyond the sides of the image, such as .*annotation 1"
    ):
        (image,) = read_coco(write(tmp_path, annotations=notes)).images
    assert (image.boxes[:, 2:] <= (40, 30)).all() and (image.boxes >= 0).all()
    assert image.areas.tolist() == ((image.boxes[:, 2:] - image.boxes[:, :2]).prod(1)).tolist()


HUGE = 10**400


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, HUGE, 1]}]}, "bbox must be four numbers"),
        ({"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, float("nan"), 1]}]}, "bbox must be four"),
        ({"annotations": [{"image_id": HUGE, "category_id": 1, "bbox": [0, 0, 1, 1]}]}, "which the file does not list"),
        ({"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1], "iscrowd": "0"}]}, "iscrowd must be"),
        ({"categories": [{"id": 1, "name": " "}]}, "a category needs an id"),
        ({"categories": [{"id": 1, "name": None}]}, "a category needs an id"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a "}]}, "'a' .id 2. is listed twice"),
        ({"images": [{"id": 1, "file_name": "../a.png"}]}, "lies outside of the data set"),
        ({"images": [{"id": 1, "file_name": "/etc/a.png"}]}, "lies outside of the data set"),
        ({"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "./a.png"}]}, "are the same file"),
    ],
)  # fmt: skip
def test_numbers_names_and_places_that_no_data_set_has(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        read_coco(write(tmp_path, **overrides))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_an_area_beyond_any_float_is_that_of_the_box(tmp_path):
    notes = [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 2, 3], "area": HUGE}]
    assert read_coco(write(tmp_path, annotations=notes)).images[0].areas.tolist() == [6.0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_names_of_categories_in_any_unicode(tmp_path, encoding):
    file = write(tmp_path, categories=[{"id": 1, "name": "Straße"}])
    file.write_bytes(json.dumps(json.loads(file.read_text()), ensure_ascii=False).encode(encoding))
    assert read_coco(file).classes == ["Straße"]


def test_outlines_are_those_of_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (7, 5), (200, 300)):
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = rng.random(shape) < share
            packed = coco.encode(np.asfortranarray(mask, np.uint8))
            packed["counts"] = packed["counts"].decode()
            packed["size"] = list(packed["size"])
            assert (filled(packed, shape, "") == mask).all()
    polygons = [[2.0, 1.0, 8.0, 1.0, 8.0, 6.0, 2.0, 6.0], [10.2, 2.0, 14.9, 2.5, 11.0, 7.9]]
    both = coco.merge(coco.frPyObjects(polygons, 9, 16))
    mask = filled(polygons, (9, 16), "")
    assert (mask == coco.decode(both)).all() and mask[1:6, 2:8].all() and mask[:, 10:].any()


@pytest.mark.parametrize(
    "outline",
    [
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [1, 2, 3, 4, 5, 6],
        "abc",
        7,
        {"counts": [30]},
        {"size": [5, 7], "counts": [35]},
        {"size": [7, 5], "counts": [30]},
        {"size": [7, 5], "counts": [40, -5]},
        {"size": [7, 5], "counts": [35.0]},
        {"size": [7, 5], "counts": "o" * 100},
        {"size": [7, 5], "counts": "\u20ac"},
        {"size": [7, 5], "counts": ""},
    ],
)
def test_an_outline_that_is_none_is_refused(outline):
    with pytest.raises(UserError, match=r"^here: "):
        filled(outline, (7, 5), "here")


def test_outlined_objects_are_read_without_crowds(tmp_path):
    pytest.importorskip("pycocotools")
    square = [[2, 2, 12, 2, 12, 8, 2, 8]]
    notes = [note(segmentation=square), note(id=2, iscrowd=1, segmentation=square), note(id=3)]
    with pytest.warns(UserWarning, match="left out 1 of 3 without an outline"):
        classes, images = read_outlines(write(tmp_path, annotations=notes))
    (file, (one,)), *others = images
    assert file.is_file() and one.noun in classes and one.mask.sum() == 60 and not any(more for _, more in others)
    with pytest.raises(UserError, match="outlines no object"):
        read_outlines(write(tmp_path, annotations=[note()]))

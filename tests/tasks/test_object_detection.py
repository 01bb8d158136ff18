"""Object detection: average precision, pictures as a model sees them, and what is drawn and written."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from provenn.core.errors import UserError
from provenn.inference.evaluation import evaluate
from provenn.nn.detection import Detections, RetinaNet
from provenn.nn.resnet import BasicBlock, ResNet
from provenn.tasks import get_task
from provenn.tasks.average_precision import Found, Truth, _annotations, average_precision, curves, match
from provenn.tasks.object_detection import Pictures, fitting_font, join, legible_on

TASK = get_task("object-detection")
META = {"classes": ["a", "b", "c"], "ids": [4, 7, 9], "size": 48, "mean": [0.5] * 3, "std": [0.25] * 3}


def random_images(seed, count=6, classes=3, crowds=True):
    """Whole numbers, so that IoUs and scores tie; boxes of all three sizes."""
    rng = np.random.default_rng(seed)
    truths, found = [], []
    for _ in range(count):
        n, m = rng.integers(0, 5), rng.integers(0, 9)
        corner, side = rng.integers(0, 40, (n, 2)), rng.choice([10, 20, 60, 130], (n, 2))
        boxes = np.concatenate([corner, corner + side], 1).astype(float)
        crowd = (rng.random(n) < 0.3) & crowds
        truths.append(Truth(boxes, rng.integers(0, classes, n), side.prod(1).astype(float), crowd))
        guess, label = rng.integers(0, 60, (m, 4)).astype(float), rng.integers(0, classes, m)
        guess[:, 2:] += guess[:, :2] + 1
        for i in range(m):
            if n and rng.random() < 0.7:
                pick = rng.integers(n)
                guess[i], label[i] = boxes[pick] + rng.integers(-3, 4, 4), truths[-1].labels[pick]
        found.append(Found(guess, label, rng.integers(1, 5, m) / 5))
    return truths, found


def pycocotools_says(truths, found, classes=3):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": i + 1} for i in range(len(truths))]
    categories = [{"id": i + 1} for i in range(classes)]
    truth, predicted = COCO(), COCO()
    truth.dataset = {"images": images, "categories": categories, "annotations": _annotations(truths)}
    predicted.dataset = {"images": images, "categories": categories, "annotations": _annotations(found)}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        predicted.createIndex()
        judge = COCOeval(truth, predicted, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats[:6]


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=25, deadline=None)
def test_average_precision_is_that_of_pycocotools_crowds_and_ties_included(seed, crowds):
    truths, found = random_images(seed, crowds=crowds)
    if not sum((~truth.crowd).sum() for truth in truths):
        return
    ours = average_precision(list(match(truths, found, 3)))
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    for name, theirs in zip(names, pycocotools_says(truths, found), strict=True):
        assert ours.get(name, -1) == pytest.approx(theirs, abs=1e-12), name


def test_average_precision_by_hand():
    box = np.array([[0.0, 0, 50, 50]])
    one = Truth(box, np.array([0]), np.array([2500.0]), np.array([False]))
    two = Truth(np.concatenate([box, box + 60]), np.array([0, 0]), np.array([2500.0] * 2), np.array([False] * 2))
    exact = Found(box, np.array([0]), np.array([0.9]))
    assert average_precision(list(match([one], [exact], 1)))["AP"] == pytest.approx(1)
    # Half of the objects: precision 1 up to a recall of one half, 51 of the 101.
    assert average_precision(list(match([two], [exact], 1)))["AP50"] == pytest.approx(51 / 101)
    # A surer box beside it: precision one half at a recall of 1.
    worse = Found(np.concatenate([box + 200, box]), np.array([0, 0]), np.array([0.95, 0.9]))
    assert average_precision(list(match([one], [worse], 1)))["AP"] == pytest.approx(0.5)
    # 40 of 50 columns: an IoU of 0.8, which passes seven of the ten thresholds.
    shifted = Found(box * [1, 1, 0.8, 1], np.array([0]), np.array([0.9]))
    metrics = average_precision(list(match([one], [shifted], 1)))
    assert metrics["AP"] == pytest.approx(0.7) and metrics["AP75"] == pytest.approx(1)
    assert set(metrics) == {"AP", "AP50", "AP75", "AP_medium"}


def test_images_that_are_drawn_twice_count_twice():
    """What the bootstrap does: a choice of rows is the set that holds these images."""
    truths, found = random_images(3)
    rows = [0, 2, 2, 5, 1]
    chosen = match(truths, found, 3)[rows]
    again = match([truths[i] for i in rows], [found[i] for i in rows], 3)
    np.testing.assert_allclose(curves(list(chosen)), curves(list(again)))


class Oracle(nn.Module):
    """Finds what is bright, by its colour, as one box for each; red, green, blue are classes 0, 1, 2."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def detect(self, images, *, score_threshold=0.05):
        found = []
        for image in images:
            boxes, labels = [], []
            for label in range(3):
                rows, columns = ((image[label] > 1).any(dim=d).nonzero()[:, 0] for d in (1, 0))
                if len(rows):
                    boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                    labels.append(label)
            scores = torch.full((len(labels),), 0.9)
            found.append(Detections(torch.tensor(boxes).float().reshape(-1, 4), scores, torch.tensor(labels).long()))
        return found


@pytest.fixture
def folder(tmp_path):
    """Pictures of several sizes with a bright rectangle of each of some classes, one grey and empty."""
    rng = np.random.default_rng(0)
    images, notes = [], []
    root = tmp_path / "data"
    root.mkdir()
    for number in range(24):
        height, width = ((48, 64), (64, 48), (48, 80))[number % 3]
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for label in range(number % 4):
            left, top = 4 + 14 * label, int(rng.integers(0, 20))
            right, bottom = left + 12, top + int(rng.integers(10, 25))
            pixels[top:bottom, left:right, label] = 255
            notes.append(
                {"id": len(notes), "image_id": number, "category_id": (4, 7, 9)[label], "area": 99,
                 "bbox": [left, top, right - left, bottom - top], "iscrowd": 0}
            )  # fmt: skip
        picture = Image.fromarray(pixels)
        name = f"{number:03d}.png"
        if number % 4 == 0:
            picture = picture.convert(("L", "RGB")[number % 8 == 0])
        if number == 12:
            picture, name = picture.convert("CMYK"), "cmyk.jpg"
        picture.save(root / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
    categories = [{"id": i, "name": n} for i, n in ((4, "a"), (7, "b"), (9, "c"))]
    (root / "labels.json").write_text(json.dumps({"images": images, "annotations": notes, "categories": categories}))
    return root


def test_a_folder_is_split_and_batches_are_padded(folder):
    data = TASK.load(folder, size=48)
    parts = [len(part) for part in (data.train, data.val, data.test)]
    assert sum(parts) == 24 and data.options == {"num_classes": 3} and data.meta["ids"] == [4, 7, 9]
    batch = data.collate([data.test[i] for i in range(parts[2])])
    assert batch.images.shape[2:] == (batch.sizes[:, 0].max(), batch.sizes[:, 1].max())
    assert batch.valid.sum() == sum(len(data.test[i].labels) for i in range(parts[2])) > 0
    assert min(batch.sizes.amin(1)) == 48, "the short side is what was asked for"
    files = [{image.file for image in part.sources} for part in (data.train, data.val, data.test)]
    assert not files[0] & files[1] and not files[0] & files[2] and not files[1] & files[2]
    assert TASK.load(folder, size=48).fingerprint == data.fingerprint != TASK.load(folder, size=48, seed=1)
    assert TASK.load(folder).meta["size"] == 48


def test_an_oracle_is_perfect_at_any_size_and_a_blind_one_near_nothing(folder):
    data = TASK.load(folder)
    assert TASK.evaluate(Oracle(), data.test) == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1, "AP_small": 1})
    held_out = TASK.held_out(folder, data.meta, size=96)
    assert len(held_out.dataset) == 24 and "all of" in held_out.about
    metrics = TASK.evaluate(Oracle(), held_out.dataset)
    assert metrics["AP50"] == 1 and metrics["AP"] > 0.7, "at twice the size, boxes go back to where they were"
    assert TASK.dummy_baseline(data) < 0.3
    found = evaluate(Oracle(), TASK, held_out, meta=data.meta)
    assert found.metrics["AP"] == metrics["AP"] and found.intervals["AP50"] == pytest.approx((1, 1))
    table = found.class_table()
    assert table.columns == ["class", "objects", "AP", "AP50", "AP75"]
    assert sorted(row[0] for row in table.rows) == ["a", "b", "c"] and sum(row[1] for row in table.rows) == 36


def test_batches_of_any_size_find_the_same(folder):
    torch.manual_seed(0)
    backbone = ResNet(BasicBlock, (1, 1), widths=(8, 8), num_classes=0)
    model = RetinaNet(backbone, num_classes=3, dim=8, convs=1, finest=4, coarser=0, scales=(2, 4)).eval()
    nn.init.normal_(model.head.classify.weight, std=0.5)
    data = TASK.load(folder)
    whole, alone = (TASK.scores(model, data.test, size)["matches"] for size in (256, 1))
    for one, other in zip(whole, alone, strict=True):
        assert len(one.scores) and np.allclose(one.scores, other.scores, atol=1e-5)
        assert np.array_equal(one.hits, other.hits)


def test_mirrored_pictures_have_mirrored_boxes(folder):
    data = TASK.load(folder)
    plain, mirrored = Pictures(data.train.sources, data.meta), data.train
    index = next(i for i in range(len(plain)) if len(plain[i].labels) > 1)
    torch.manual_seed(0)
    seen = [mirrored[index] for _ in range(8)]
    flipped = [each for each in seen if not torch.equal(each.image, plain[index].image)]
    assert 0 < len(flipped) < 8
    for example in (plain[index], *flipped):
        for (left, top, right, bottom), label in zip(example.boxes.int().tolist(), example.labels.tolist()):
            assert (example.image[label, top:bottom, left:right] > 1).float().mean() > 0.95


def test_crowds_are_not_trained_on_and_not_judged(folder):
    content = json.loads((folder / "labels.json").read_text())
    for note in content["annotations"]:
        note["iscrowd"] = int(note["category_id"] == 9)
    (folder / "labels.json").write_text(json.dumps(content))
    data = TASK.load(folder)
    examples = [data.train[i] for i in range(len(data.train))]
    assert any(example.crowd.any() for example in examples) and (join(examples).labels != 2).all()
    assert TASK.evaluate(Oracle(), data.test)["AP"] == 1


def test_classes_are_the_models_own_by_name(folder):
    turned = {**META, "classes": ["c", "x", "b", "a"], "ids": [1, 2, 3, 4]}
    held_out = TASK.held_out(folder, turned)
    names = [[turned["classes"][label] for label in image.labels] for image in held_out.dataset.sources]
    plain = TASK.held_out(folder, META).dataset.sources
    assert names == [[META["classes"][label] for label in image.labels] for image in plain]
    with pytest.raises(UserError, match="the model knows no class 'c'; it knows: a, b, d"):
        TASK.held_out(folder, {**META, "classes": ["a", "b", "d"]})
    nameless = TASK.default_meta({"num_classes": 3})
    assert [i.labels.tolist() for i in TASK.held_out(folder, nameless).dataset.sources] == [
        i.labels.tolist() for i in plain
    ]


def test_a_prediction_is_drawn_and_written_as_coco_does(folder, tmp_path):
    file = folder / "003.png"
    said = TASK.predict(Oracle(), META, [file], tmp_path / "drawn.png")
    assert "a 90%, b 90%, c 90%" in said and f"wrote {tmp_path / 'drawn.png'}" in said
    before, after = Image.open(file), Image.open(tmp_path / "drawn.png")
    assert after.size == before.size and np.asarray(after).tolist() != np.asarray(before).tolist()
    said = TASK.predict(Oracle(), META, [folder], tmp_path / "out")
    assert "and 4 more" in said and len(list((tmp_path / "out").glob("*.png"))) == 24
    TASK.predict(Oracle(), META, [folder], tmp_path / "results.json")
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads((tmp_path / "out" / "detections.json").read_text())
    truth = json.loads((folder / "labels.json").read_text())["annotations"]
    own = [row for row in written if row["file_name"] == "003.png"]
    expected = [note for note in truth if note["image_id"] == 3]
    assert [row["image_id"] for row in own] == [3] * 3 and [row["category_id"] for row in own] == [4, 7, 9]
    np.testing.assert_allclose([row["bbox"] for row in own], [note["bbox"] for note in expected], atol=1)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("a.txt", "cannot write a.txt: expected .json, a folder, or one of"),
        ("two.png", "is one image, and there are 2 to draw on: give a folder"),
        ("data", "is the input itself"),
    ],
)
def test_places_that_cannot_take_a_prediction(folder, output, message):
    files = [folder / "000.png", folder / "003.png"]
    with pytest.raises(UserError, match=message):
        TASK.predict(Oracle(), META, files, folder.parent / output)


def test_labels_lie_in_the_picture_and_can_be_read():
    assert legible_on("#ffffff") == "black" and legible_on("#000000") == "white"
    assert legible_on("#911eb4") == "white" and legible_on("#ffe119") == "black"
    texts = ["dining table 100%", "a 1%"]
    assert fitting_font(texts, 640, 20).size == 20
    small = fitting_font(texts, 60, 20)
    assert small.size < 20 and small.getlength(texts[0]) <= 61


def test_bad_data_and_models_are_refused_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="size must be at least 1 pixel, got 0"):
        TASK.load(folder, size=0)
    with pytest.raises(UserError, match="Linear is no detector"):
        TASK.loss(nn.Linear(1, 1), None)
    with pytest.raises(UserError, match="score_threshold must be"):
        TASK.predict(Oracle(), META, [], None, score_threshold=3.0)
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:900])
    with pytest.raises(UserError, match=r"003\.png is damaged"):
        TASK.load(folder)
    with pytest.warns(UserWarning, match=r"003\.png"):
        assert (
            sum(len(part) for part in (lambda d: (d.train, d.val, d.test))(TASK.load(folder, skip_broken=True))) == 23
        )
    content = json.loads((folder / "labels.json").read_text())
    (folder / "labels.json").write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(UserError, match=r"split, .* images, holds no object"):
        TASK.load(folder, skip_broken=True)
    with pytest.raises(UserError, match="images, holds no object"):
        TASK.evaluate(Oracle(), TASK.held_out(folder, META, skip_broken=True).dataset)


def test_a_picture_smaller_than_a_stride_goes_through():
    torch.manual_seed(0)
    model = RetinaNet(ResNet(BasicBlock, (1, 1, 1), widths=(4, 4, 4), num_classes=0), num_classes=2, dim=8).eval()
    assert all(len(found) == 3 for found in model.detect(torch.randn(2, 3, 3, 5), score_threshold=0.0))


def test_the_picture_of_a_training_shows_what_was_found(folder):
    figure = TASK.picture(Oracle(), TASK.load(folder))
    texts = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert {"a 90%", "b 90%", "c 90%"} & texts


def test_crowds_alone_are_neither_trained_on_nor_judged(folder):
    meta = TASK.load(folder, size=48).meta
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        content["annotations"] = [{**note, "iscrowd": 1} for note in content["annotations"]]
        file.write_text(json.dumps(content))
    for ask in (lambda: TASK.load(folder), lambda: TASK.held_out(folder, meta)):
        with pytest.raises(
            UserError, match=r"holds no object but \d+ crowds .iscrowd: 1., which nobody is asked to find"
        ):
            ask()

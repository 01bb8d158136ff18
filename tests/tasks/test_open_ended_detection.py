"""Open-ended detection: recall as COCO counts it, names by likeness, what is written and what is refused."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from provenn.core.errors import UserError
from provenn.data.coco import read_coco
from provenn.tasks import get_task
from provenn.tasks.naming import classes_of
from provenn.tasks.open_ended_detection import Detected, Scenes, as_coco, box_iou, mask_iou, match, run_lengths

TASK = get_task("open-ended-detection")


class Fixed(nn.Module):
    """Finds the same in every picture."""

    def __init__(self, *found):
        super().__init__()
        self.found = Detected(*found)

    def detect(self, image):
        return self.found


def scene(seed, objects=5, detections=12):
    draw = np.random.default_rng(seed)
    corner = draw.uniform(0, 150, (objects, 2))
    boxes = np.concatenate([corner, corner + draw.uniform(8, 140, (objects, 2))], axis=1).round()
    which = draw.integers(0, objects, detections)
    found = boxes[which] + draw.normal(0, 6, (detections, 4))
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    return boxes, found, draw.random(detections)


@pytest.mark.parametrize("seed", range(4))
def test_recall_is_that_of_pycocotools(seed):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    boxes, found, scores = scene(seed)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    data = Scenes([(np.zeros((300, 300, 3), np.uint8), boxes, np.zeros(len(boxes), int), areas, None)], ["thing"])
    order = np.argsort(-scores, kind="stable")
    masks = torch.zeros(len(found), 300, 300, dtype=torch.bool)
    model = Fixed(torch.tensor(found), masks, torch.tensor(scores), ["thing"] * len(found))
    ours = TASK.evaluate(model, data)
    truth, said = coco.COCO(), coco.COCO()

    def rows(listed, values):
        return [
            {"id": k + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "score": float(v),
             "bbox": [*b[:2], *(b[2:] - b[:2])], "area": float((b[2:] - b[:2]).prod())}
            for k, (b, v) in enumerate(zip(listed, values))
        ]  # fmt: skip

    images, kinds = [{"id": 1, "height": 300, "width": 300}], [{"id": 1, "name": "thing"}]
    truth.dataset = {"images": images, "categories": kinds, "annotations": rows(boxes, np.ones(len(boxes)))}
    said.dataset = {"images": images, "categories": kinds, "annotations": rows(found[order], scores[order])}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        said.createIndex()
        judge = COCOeval(truth, said, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert ours["AR"] == pytest.approx(judge.stats[8])
    for name, number in (("AR_small", 9), ("AR_medium", 10), ("AR_large", 11)):
        if judge.stats[number] >= 0 and name in ours:
            # COCO leaves detections of another size out of a group; here every detection may find an object.
            assert ours[name] >= judge.stats[number] - 1e-9


def test_names_count_and_masks_count_apart():
    mask = torch.zeros(2, 20, 20, dtype=torch.bool)
    mask[0, 2:8, 2:8] = mask[1, 10:18, 10:18] = True
    boxes = np.array([[2.0, 2, 8, 8], [10, 10, 18, 18]])
    pixels = np.zeros((20, 20, 3), np.uint8)
    data = Scenes([(pixels, boxes, np.array([0, 1]), np.array([36.0, 64]), mask.numpy())], ["dog", "traffic light"])
    right = Fixed(torch.tensor(boxes), mask, torch.tensor([0.9, 0.8]), ["brown dog", "traffic lights"])
    metrics = TASK.evaluate(right, data)
    assert {metrics[name] for name in ("named_AR", "AR", "mask_AR", "AR50", "AR_small", "name_accuracy")} == {1.0}
    wrong = Fixed(torch.tensor(boxes), ~mask, torch.tensor([0.9, 0.8]), ["cat", "traffic lights"])
    metrics = TASK.evaluate(wrong, data)
    assert metrics["AR"] == 1 and metrics["named_AR"] == 0.5 == metrics["name_accuracy"] and metrics["mask_AR"] < 0.2


def test_nothing_found_is_a_recall_of_zero():
    data = TASK.load("composed", examples=3)
    none = Fixed(torch.zeros(0, 4), torch.zeros(0, 64, 64, dtype=torch.bool), torch.zeros(0), [])
    metrics = TASK.evaluate(none, data.test)
    assert set(metrics.values()) == {0.0}


def test_each_object_is_found_once():
    overlap = np.array([[0.95, 0.0], [0.96, 0.0], [0.0, 0.7]])
    taken = match(overlap)
    assert taken[0].tolist() == [1, 1] and taken[5].tolist() == [1, 0]
    assert match(np.zeros((0, 2))).shape == (10, 2) and match(np.zeros((3, 0))).shape == (10, 0)


def test_iou_of_boxes_and_masks_agree_on_rectangles():
    boxes = np.array([[0.0, 0, 4, 6], [2, 2, 9, 9], [5, 5, 5, 5]])
    masks = np.zeros((3, 10, 10), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int)):
        mask[top:bottom, left:right] = True
    np.testing.assert_allclose(box_iou(boxes, boxes), mask_iou(masks, masks))


def test_names_are_matched_by_their_words_and_else_by_letters():
    classes = ["car", "carpet", "traffic light", "seven"]
    names = ["red seven", "cars", "big traffic lights", "carpets", "zebra", ""]
    assert classes_of(names, classes).tolist() == [3, 0, 2, 1, -1, -1]
    assert classes_of([], classes).tolist() == [] and classes_of(["car"], []).tolist() == [-1]

    def embed(texts):
        return np.array([[1.0, 0.0] if text in ("auto", "car") else [0.0, 1.0] for text in texts])

    assert classes_of(["auto"], ["car", "dog"], embed=embed).tolist() == [0]


@pytest.mark.parametrize("seed", range(5))
def test_runs_are_those_of_pycocotools(seed):
    tools = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(seed).random((7, 5)) < (0.0, 0.2, 0.5, 0.9, 1.0)[seed]
    rle = run_lengths(mask)
    assert sum(rle["counts"]) == mask.size
    packed = tools.frPyObjects(rle, *rle["size"])
    assert np.array_equal(tools.decode(packed).astype(bool), mask)


@pytest.fixture
def pictures(tmp_path):
    for name, size in (("a.png", (40, 30)), ("b.png", (9, 70))):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(
            tmp_path / name
        )
    return tmp_path


class Corner(nn.Module):
    def detect(self, image):
        mask = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
        mask[0, :5, :4] = True
        return Detected(torch.tensor([[0.0, 0, 4, 5]]), mask, torch.tensor([0.7]), ["thing"])


def test_what_is_found_is_written_as_coco_and_read_back(pictures, tmp_path):
    out = tmp_path / "found.json"
    text = TASK.predict(Corner(), {}, [pictures / "a.png", pictures / "b.png"], out)
    assert "thing 0.70" in text and f"wrote {out}" in text
    content = json.loads(out.read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.png"]
    assert content["annotations"][1]["bbox"] == [0, 0, 4, 5] and content["annotations"][1]["area"] == 20
    part = read_coco(out, tmp_path)
    assert part.classes == ["thing"] and part.images[0].boxes.tolist() == [[0, 0, 4, 5]]
    assert TASK.evaluate(Corner(), TASK.held_out(out, {}).dataset)["AR"] == 1


def test_masks_are_drawn_at_the_size_of_the_picture_or_larger(pictures, tmp_path):
    overlay = tmp_path / "over.png"
    TASK.predict(Corner(), {}, [pictures / "a.png"], None, overlay=overlay)
    drawn = Image.open(overlay)
    assert drawn.size == (320, 240)
    assert TASK.predict(Corner(), {}, [pictures / "b.png"], tmp_path / "folder").endswith("folder")
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == ["b.png", "found.json"]
    assert TASK.predict(Corner(), {}, [pictures / "a.png"], None, score_threshold=0.8).endswith("a.png: nothing")


def test_refusals(pictures, tmp_path):
    one = pictures / "a.png"
    with pytest.raises(UserError, match="score_threshold must be from 0 to 1, got 2"):
        TASK.predict(Corner(), {}, [one], None, score_threshold=2)
    with pytest.raises(UserError, match="overlay is one picture, and there are 2"):
        TASK.predict(Corner(), {}, [one, pictures / "b.png"], None, overlay=tmp_path / "x.png")
    with pytest.raises(UserError, match=r"expected \.json or a folder"):
        TASK.predict(Corner(), {}, [one], tmp_path / "x.csv")
    with pytest.raises(UserError, match="Corner trains nothing"):
        TASK.loss(Corner(), [])
    with pytest.raises(UserError, match="no single graph of ONNX"):
        TASK.portable(Corner(), {})
    with pytest.raises(UserError, match="examples must be at least 1"):
        TASK.load("composed", examples=0)
    empty = Scenes([(np.zeros((9, 9, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), None)], ["a"])
    with pytest.raises(UserError, match="none of the images holds an object"):
        TASK.evaluate(Corner(), empty)
    assert as_coco([]) == {"images": [], "categories": [], "annotations": []}

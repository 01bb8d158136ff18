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
from provenn.tasks.naming import ClipTexts, classes_of
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
    said = TASK.predict(Corner(), {}, [pictures / "a.png"], tmp_path / "over.json", overlay=True)
    assert said.endswith(f"wrote {tmp_path / 'over.json'}\nwrote {tmp_path / 'over.png'}")
    drawn = Image.open(tmp_path / "over.png")
    assert drawn.size == (320, 240)
    TASK.predict(Corner(), {}, [pictures / "a.png"], tmp_path / "alone.png")
    assert np.array_equal(drawn, Image.open(tmp_path / "alone.png")) and not (tmp_path / "alone.json").exists()
    assert TASK.predict(Corner(), {}, [pictures / "b.png"], tmp_path / "folder").endswith("folder")
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == ["b.png", "found.json"]
    assert TASK.predict(Corner(), {}, [pictures / "a.png"], None, score_threshold=0.8).endswith("a.png: nothing")


def test_refusals(pictures, tmp_path):
    one = pictures / "a.png"
    with pytest.raises(UserError, match="score_threshold must be from 0 to 1, got 2"):
        TASK.predict(Corner(), {}, [one], None, score_threshold=2)
    for output, options in ((tmp_path / "x.json", {"overlay": True}), (tmp_path / "x.png", {})):
        with pytest.raises(UserError, match="one picture is drawn, and there are 2 images"):
            TASK.predict(Corner(), {}, [one, pictures / "b.png"], output, **options)
    with pytest.raises(UserError, match="overlay draws beside"):
        TASK.predict(Corner(), {}, [one], None, overlay=True)
    with pytest.raises(UserError, match=r"expected \.json, a picture or a folder"):
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


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of random weights, with a tokenizer of letters."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("clip")
    letters = {text: k for k, text in enumerate(["<s>", "</s>", "<unk>", "<pad>", *"abcdefghijklmnopqrstuvwxyz "])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        model_max_length=20,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 31, "max_position_embeddings": 20, "eos_token_id": 1, "bos_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4})
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_matches_names_as_its_own_tower_says(clip):
    from transformers import AutoTokenizer, CLIPModel

    texts = ["dog", "a very long name that has to be cut", "cat", "dog"]
    embed = ClipTexts(clip)
    found = embed(texts)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    for text, vector in zip(texts, found, strict=True):
        inputs = tokenizer(f"a {text}", truncation=True, return_tensors="pt")
        own = model.text_projection(model.text_model(**inputs).pooler_output)[0]
        torch.testing.assert_close(torch.from_numpy(vector), own / own.norm(), rtol=1e-4, atol=1e-5)
    likest = classes_of(["dog"], ["cat", "horse", "dogs"], embed=embed, least=-1.0)
    assert likest[0] == (embed(["dog"]) @ embed(["cat", "horse", "dogs"]).T).argmax()


def test_names_by_clip_are_an_option_of_the_data(clip, tmp_path):
    data = TASK.load("composed", examples=2, names=clip)
    assert isinstance(data.test.embed, ClipTexts) and data.test.least == -1
    entry = data.test[0]
    boxes, masks = torch.from_numpy(entry.boxes).float(), torch.from_numpy(entry.masks)
    model = Fixed(boxes, masks, torch.ones(len(boxes)), ["xylophone"] * len(boxes))
    named = TASK.scores(model, TASK.held_out("composed", {}, examples=1, names=clip).dataset)
    plain = TASK.scores(model, TASK.held_out("composed", {}, examples=1).dataset)
    assert plain["named"].sum() == 0, "a name like no class in its letters"
    likest = classes_of(["xylophone"], data.test.classes, embed=data.test.embed, least=-1.0)[0]
    assert named["named"][0, 0, 0] == (entry.labels == likest).sum()
    with pytest.raises(UserError, match="there is no such folder"):
        TASK.load("composed", names=tmp_path / "none")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no CLIP that can be read"):
        TASK.load("composed", names=tmp_path)

"""The semantic-segmentation task: embedded and the user's own data, metrics, prediction, and clear refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from provenn.core.errors import UserError
from provenn.data.images import Picture
from provenn.data.masks import IGNORED, palette, read_mask
from provenn.inference.evaluation import evaluate
from provenn.tasks import get_task
from provenn.tasks.semantic_segmentation import TASK, boundary_f_score, keyed, random_scaled_crop
from provenn.training import Recipe, fit


class Threshold(nn.Module):
    """Bright or dark: one 1×1 convolution on a map of half the size."""

    def __init__(self, num_classes=2, in_channels=3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, x):
        return self.conv(F.avg_pool2d(x, 2, ceil_mode=True))


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Ten images of several sizes with a bright square, and masks of it."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for index in range(10):
        height, width = (int(n) for n in rng.integers(40, 60, 2))
        mask = np.zeros((height, width), np.uint8)
        mask[8:30, 10:32] = 1
        picture = mask[..., None] * 180 + rng.integers(0, 40, (height, width, 3))
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "images" / f"{index}.png")
        mask[0] = IGNORED
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index}.png")
    return tmp_path


class Fixed(nn.Module):
    """Gives the masks that it was made with, as logits."""

    def __init__(self, masks, classes):
        super().__init__()
        self.masks, self.classes, self.at = masks, classes, 0
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        part = self.masks[self.at : self.at + len(x)]
        self.at += len(x)
        return F.one_hot(part, self.classes).permute(0, 3, 1, 2).float()


class Listed(list, Dataset):
    """A list as a data set."""


def pairs(masks):
    return Listed((torch.zeros(3, *mask.shape), mask) for mask in masks)


def test_mean_intersection_over_union_is_of_the_whole_set():
    true = torch.tensor([[[0, 0, 1, 1]], [[2, 255, 1, 1]]])
    predicted = torch.tensor([[[0, 1, 1, 1]], [[2, 2, 2, 1]]])
    scores = TASK.scores(Fixed(predicted, 4), pairs(true), 1)
    metrics = TASK.summary(scores)
    # Class 0: 1 of 2; class 1: 3 of 5; class 2: 1 of 2 (what is not judged counts nowhere); class 3 is nowhere.
    assert metrics["miou"] == pytest.approx((1 / 2 + 3 / 5 + 1 / 2) / 3)
    assert metrics["pixel_accuracy"] == pytest.approx(5 / 7)
    columns, rows = TASK.class_scores(scores, ["a", "b", "c", "d"])
    assert columns[0] == "class" and [row[0] for row in rows] == ["a", "c", "b"]
    assert rows[-1][1:] == [4, 3 / 5, 3 / 4, 3 / 4]


def test_the_metric_is_torchmetrics():
    from torchmetrics.segmentation import MeanIoU

    generator = torch.Generator().manual_seed(0)
    true, predicted = (torch.randint(5, (6, 7, 8), generator=generator) for _ in range(2))
    scores = TASK.scores(Fixed(predicted, 5), pairs(true), 4)
    judge = MeanIoU(5, input_format="index", per_class=False)
    # One picture of all the pixels: torchmetrics takes the mean over pictures, the field's benchmarks do not.
    judge.update(predicted.reshape(1, 6, 56), true.reshape(1, 6, 56))
    assert TASK.summary(scores)["miou"] == pytest.approx(judge.compute().item(), rel=1e-6)


def test_boundaries_may_be_off_by_a_little():
    true = torch.zeros(1, 40, 40, dtype=torch.long)
    true[:, :, 20:] = 1
    for shift, score in ((0, 1.0), (1, 1.0), (2, 0.0)):
        assert boundary_f_score(true.roll(shift, 2)[:, :, 5:35], true[:, :, 5:35]).item() == score
    flat = torch.zeros_like(true)
    assert boundary_f_score(flat, flat).item() == 1 and boundary_f_score(flat, true).item() == 0
    half = true.clone()
    half[:, :20] = 0  # finds half of the boundary, and predicts one along the middle that is none
    precision, recall = (21 + 1) / (20 + 20), 21 / 40
    assert boundary_f_score(half, true).item() == pytest.approx(2 * precision * recall / (precision + recall), abs=0.05)


def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(squares):
    torch.manual_seed(0)
    data, model = TASK.load(squares), Threshold().eval()
    test = TASK.scores(model, data.test, 8)
    single = [TASK.scores(model, Listed([data.test[i]]), 1) for i in range(len(data.test))]
    for name in test:
        np.testing.assert_array_equal(test[name], np.concatenate([each[name] for each in single]))


def test_what_is_not_judged_changes_no_loss():
    torch.manual_seed(0)
    model, images = Threshold(), torch.randn(2, 3, 8, 8)
    masks = torch.randint(2, (2, 8, 8))
    masks[0, :4] = IGNORED
    logits = nn.functional.interpolate(model(images), size=(8, 8), mode="bilinear")
    judged = masks != IGNORED
    expected = -logits.log_softmax(1).gather(1, masks.where(judged, 0)[:, None])[:, 0][judged].mean()
    torch.testing.assert_close(TASK.loss(model, (images, masks)), expected)
    assert TASK.loss(model, (images, torch.full_like(masks, IGNORED))).item() == 0


def test_a_folder_is_split_and_trained_on(squares, tmp_path):
    (squares / "classes.txt").write_text("dark\nbright\n")
    data = TASK.load(squares)
    assert [len(part) for part in (data.train, data.val, data.test)] == [6, 2, 2]
    assert data.meta["classes"] == ["dark", "bright"] and data.options == {"num_classes": 2, "in_channels": 3}
    assert data.meta["size"] == 32
    files = [{file for file, _ in part.files} for part in (data.train, data.val, data.test)]
    assert not (files[0] & files[1] or files[0] & files[2] or files[1] & files[2])
    image, mask = data.train[0]
    assert image.shape == (3, 32, 32) and mask.shape == (32, 32)
    done = fit(Threshold, TASK, data, Recipe(epochs=40, batch_size=6, lr=0.1, schedule="constant"), seed=0)
    metrics = TASK.evaluate(done.model.eval(), data.test)
    assert metrics["miou"] > 0.8 > TASK.dummy_baseline(data)


def test_the_dummy_baseline_says_the_commonest_class(squares):
    data = TASK.load(squares)

    class Dark(nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, 0.0])[None, :, None, None].expand(len(x), 2, 4, 4)

    assert TASK.dummy_baseline(data) == pytest.approx(TASK.evaluate(Dark(), data.test)["miou"])


def test_crops_keep_image_and_mask_together():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
    marked = ((rows // 10 + columns // 10) % 2).byte()
    sizes = set()
    for _ in range(20):
        image, mask = random_scaled_crop(255 * marked[None], marked, 32)
        judged = mask != IGNORED
        assert image.shape == (1, 32, 32) and mask.shape == (32, 32)
        agree = ((image[0] > 127).byte() == mask)[judged].double().mean()
        assert agree > 0.85  # but for what the scaling blurs
        assert not image[0][~judged].any()
        sizes.add(int(judged.sum()))
    assert len(sizes) > 3 and min(sizes) < 32 * 32  # some are smaller than the crop


def test_predictions_are_masks_and_overlays(squares, tmp_path):
    torch.manual_seed(0)
    data = TASK.load(squares)
    model = fit(
        Threshold, TASK, data, Recipe(epochs=40, batch_size=6, lr=0.1, schedule="constant"), seed=0
    ).model.eval()
    picture = squares / "images" / "0.png"
    text = TASK.predict(model, data.meta, [picture], tmp_path / "mask.png", overlay=True)
    mask, true = read_mask(tmp_path / "mask.png"), read_mask(squares / "masks" / "0.png")
    assert mask.shape == true.shape and (mask == true)[true != IGNORED].mean() > 0.95
    assert "class 0" in text and "wrote" in text
    with Image.open(tmp_path / "mask_overlay.png") as overlay:
        assert overlay.size == true.shape[::-1]
    TASK.predict(model, data.meta, [squares / "images"], tmp_path / "all")
    assert len(list((tmp_path / "all").glob("*.png"))) == 10
    for output, overlay, message in (
        (tmp_path / "mask.jpg", False, r"written as \.png"),
        (None, True, "an overlay needs a path"),
    ):
        with pytest.raises(UserError, match=message):
            TASK.predict(model, data.meta, [picture], output, overlay=overlay)
    with pytest.raises(UserError, match="10 images need a folder"):
        TASK.predict(model, data.meta, [squares / "images"], tmp_path / "one.png")


@pytest.mark.parametrize(("width", "count"), [(30, 2), (61, 5), (640, 150)])
def test_an_overlay_says_which_colour_is_which(width, count):
    picture = Picture(np.zeros((20, width, 3), np.uint8))
    entries = [(f"a class called {k}", colour) for k, colour in enumerate(palette(count))]
    shown = keyed(picture, entries).colour
    assert shown.shape[1] == width and not shown[:20].any()
    there = {tuple(pixel) for pixel in shown[20:].reshape(-1, 3).tolist()}
    assert (width < 60) == (len(shown) == 20)
    assert width < 60 or {colour for _, colour in entries} <= there


@pytest.mark.parametrize("mode", ["L", "I;16", "CMYK", "RGBA", "tiny"])
def test_images_of_every_kind_are_segmented(mode, tmp_path):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    size = (3, 2) if mode == "tiny" else (20, 30)
    if mode == "I;16":
        Image.fromarray(rng.integers(0, 65535, size).astype(np.uint16)).save(file)
    else:
        pixels = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).convert({"tiny": "RGB"}.get(mode, mode)).save(file)
    TASK.predict(Threshold().eval(), TASK.default_meta({"num_classes": 2}), [file], tmp_path / "m.png", overlay=True)
    assert read_mask(tmp_path / "m.png").shape == size


def test_evaluation_has_intervals_and_classes(squares):
    torch.manual_seed(0)
    data = TASK.load(squares)
    held_out = TASK.held_out(squares, data.meta)
    assert len(held_out.dataset) == 10 and len(TASK.held_out(squares, data.meta, whole=False).dataset) == 2
    result = evaluate(Threshold().eval(), TASK, held_out, meta=data.meta)
    low, high = result.intervals["miou"]
    assert low <= result.metrics["miou"] <= high and result.picture() is None
    assert result.class_table().columns[2] == "IoU"


def broken(folder: Path, what: str) -> None:
    mask = folder / "masks" / "3.png"
    with Image.open(folder / "images" / "3.png") as image:
        width, height = image.size
    if what == "size":
        Image.new("L", (width + 1, height)).save(mask)
    elif what == "class":
        Image.new("L", (width, height), 7).save(mask)
    elif what == "cut":
        mask.write_bytes(mask.read_bytes()[:40])
    else:
        mask.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("size", "a mask has the size of its image"),
        ("class", "most often 7, nearest to 'bright' .1..*add --set unknown=ignore"),
        ("cut", "no mask that can be read"),
        ("missing", "3.png has no mask"),
    ],
)
def test_masks_that_do_not_fit_are_named_before_training(squares, what, message):
    (squares / "classes.txt").write_text("dark\nbright\n")
    broken(squares, what)
    with pytest.raises(UserError, match=message):
        TASK.load(squares)


def test_other_refusals(squares, tmp_path):
    with pytest.raises(UserError, match="no data at"):
        TASK.load("texture")
    with pytest.raises(UserError, match="at least 16"):
        TASK.load("textures", size=8)
    with pytest.raises(UserError, match="leave size out"):
        TASK.load("brain", size=64)
    data = TASK.load(squares)
    with pytest.raises(UserError, match="the model knows 1"):
        TASK.scores(Threshold(1), data.test)
    with pytest.raises(UserError, match="textures has 1 channel"):
        TASK.held_out("textures", data.meta)


def test_masks_of_black_and_white_are_asked_for_their_colours(squares):
    for mask in (squares / "masks").iterdir():
        Image.fromarray(np.where(read_mask(mask) == 1, 255, 0).astype(np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"one class; .* write two lines to .*classes.txt, 'background 0 0 0' and 'obj"):
        TASK.load(squares)
    (squares / "classes.txt").write_text("ground\nthing\n")  # which says nothing of 255
    with pytest.raises(UserError, match="one class"):
        TASK.load(squares)
    (squares / "classes.txt").write_text("ground 0 0 0\nthing 255 255 255\n")
    assert TASK.load(squares).test[0][1].unique().tolist() == [0, 1]


def test_masks_of_which_nothing_is_judged_are_refused(squares):
    meta = TASK.load(squares).meta
    for mask in (squares / "masks").iterdir():
        Image.fromarray(np.full_like(read_mask(mask), IGNORED)).save(mask)
    with pytest.raises(UserError, match="the train split's masks hold 255 alone, which is not judged"):
        TASK.load(squares)
    with pytest.raises(UserError, match="every pixel of the masks is 255: nothing is judged"):
        TASK.evaluate(Threshold().eval(), TASK.held_out(squares, meta).dataset)


def test_classes_are_the_models_own_by_name(squares):
    data = TASK.load(squares)
    model, meta = Threshold().eval(), {**data.meta, "classes": ["dark", "bright"]}
    (squares / "classes.txt").write_text("dark\nbright\n")
    before = TASK.evaluate(model, TASK.held_out(squares, meta).dataset)
    (squares / "classes.txt").write_text("bright\ndark\n")
    for mask in (squares / "masks").iterdir():
        numbers = read_mask(mask)
        Image.fromarray(np.where(numbers == IGNORED, IGNORED, 1 - numbers).astype(np.uint8)).save(mask)
    assert TASK.evaluate(model, TASK.held_out(squares, meta).dataset) == before
    nameless = {**meta, "classes": ["class 0", "class 1"]}
    assert TASK.evaluate(model, TASK.held_out(squares, nameless).dataset) != before  # their order counts
    (squares / "classes.txt").write_text("sea\ndark\n")
    with pytest.raises(UserError, match="the model knows no class 'sea'; it knows: dark, bright"):
        TASK.held_out(squares, meta)


def test_no_prediction_is_written_over_an_input(squares, tmp_path):
    meta, model, images = TASK.default_meta({"num_classes": 2}), Threshold().eval(), squares / "images"
    before = (images / "0.png").read_bytes()
    for inputs, output in (([images / "0.png"], images / "0.png"), ([images], images)):
        with pytest.raises(UserError, match=r"0\.png is an input itself"):
            TASK.predict(model, meta, inputs, output)
    (images / "0_overlay.png").write_bytes(before)
    with pytest.raises(UserError, match="as another one's overlay would be"):
        TASK.predict(model, meta, [images], tmp_path / "out", overlay=True)
    assert (images / "0.png").read_bytes() == before
    twice = [images / "0.png", squares / "masks" / "0.png"]
    assert len(TASK.predict(model, meta, twice, None).splitlines()) == 2  # where nothing is written, names may repeat
    with pytest.raises(UserError, match="have the same name"):
        TASK.predict(model, meta, twice, tmp_path / "out")


def test_embedded_scenes():
    data = TASK.load("textures", size=32)
    assert [len(part) for part in (data.train, data.val, data.test)] == [320, 40, 60]
    assert TASK.dummy_baseline(data) < 0.1
    assert TASK.load("textures", size=32).fingerprint == data.fingerprint
    assert TASK.load("textures", size=32, seed=1).fingerprint != data.fingerprint
    image, mask = data.test[0]
    assert image.shape == (1, 32, 32) and set(mask.unique().tolist()) <= set(range(5))


def test_the_brain_has_its_tissues():
    pytest.importorskip("nilearn")
    data = get_task("semantic-segmentation").load("brain")
    image, mask = data.test[0]
    assert image.shape == (1, 224, 192) and mask.unique().tolist() == [0, 1, 2, 3]
    means = [image[0][mask == k].mean().item() for k in range(4)]
    assert means[0] < means[1] < means[2] < means[3]  # T1: fluid is dark, white matter bright


def test_pixels_in_no_class_are_left_out_where_the_user_says_so(squares):
    """In training, in evaluating what it held out, and in evaluating all of it."""
    (squares / "classes.txt").write_text("dark\nbright\n")
    broken(squares, "class")
    with pytest.warns(UserWarning, match="are in no class: most often 7"):
        data = TASK.load(squares, size=32, unknown="ignore")
    with pytest.raises(UserError, match="--set unknown=ignore"):
        TASK.held_out(squares, data.meta)
    with pytest.warns(UserWarning, match="they are not judged"):
        assert len(TASK.held_out(squares, data.meta, unknown="ignore").dataset)

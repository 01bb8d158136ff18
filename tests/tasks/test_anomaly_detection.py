"""Anomaly detection: figures by category, splits, thresholds without the test, heat maps, and what is refused."""

import csv
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from provenn.core.errors import UserError
from provenn.data.defects import Drawn
from provenn.nn.anomaly import Anomalies
from provenn.tasks import TaskData, get_task
from provenn.tasks.anomaly_detection import Composed, best_threshold, evaluated, floors, join_named, shrink_mask
from provenn.training import Recipe, fit

TASK = get_task("anomaly-detection")
META = {"size": 16, "categories": ["a"], "mean": [0.5] * 3, "std": [0.25] * 3}


class Bright(nn.Module):
    """What is bright is anomalous."""

    def __init__(self, **_):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        heat = self.scale * images.mean(1) + self.shift
        return Anomalies(heat.amax((1, 2)), heat)


class Named(Bright):
    reads_names = True

    def forward(self, images, names):
        self.heard = names
        return super().forward(images)


def spots(count=8, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 200, (count, 16, 16, 3), dtype=np.uint8)
    masks = np.zeros((count, 16, 16), bool)
    masks[::2, 3:7, 4:9] = True
    images[masks] += 50
    return Composed(Drawn(images, masks, tuple("ab"[k // 2 % 2] for k in range(count)), ("",) * count), META)


def test_figures_are_means_over_categories_of_scikit_learns():
    dataset, model = spots(), Bright().eval()
    with torch.no_grad():
        found = TASK.evaluate(model, dataset, batch_size=3)
        heat = model(torch.stack([dataset[k][0] for k in range(8)])).heat.numpy()
    names, masks = np.array(dataset.drawn.categories), dataset.drawn.masks
    for kind, score in (("auroc", roc_auc_score), ("ap", average_precision_score)):
        pixels = [score(masks[names == c].ravel(), heat[names == c].ravel()) for c in "ab"]
        images = [score(masks[names == c].any((1, 2)), heat[names == c].max((1, 2))) for c in "ab"]
        assert found[f"pixel_{kind}"] == pytest.approx(np.mean(pixels))
        assert found[f"image_{kind}"] == pytest.approx(np.mean(images))
    assert set(found) == {f"{w}_{k}" for w in ("image", "pixel") for k in ("auroc", "ap", "f1")} | {"pro"}


def test_names_are_given_to_systems_that_read_them():
    model = Named().eval()
    with torch.no_grad():
        TASK.evaluate(model, spots(), batch_size=8)
    assert list(model.heard) == list("aabbaabb")
    with pytest.raises(UserError, match="a system that reads names is exported for one category"):
        TASK.portable(model, META)


def test_a_category_of_one_kind_alone_and_other_outputs_are_refused():
    dataset = spots(2)
    dataset.drawn = dataset.drawn._replace(masks=np.zeros_like(dataset.drawn.masks))
    with pytest.raises(UserError, match="the category 'a' cannot be judged: 2 normal and 0 anomalous examples"):
        TASK.evaluate(Bright().eval().requires_grad_(False), dataset)
    with pytest.raises(UserError, match=r"Flatten gives no score and map of each image .*: got Tensor"):
        TASK.evaluate(nn.Flatten(), spots())

    class Coarse(nn.Module):
        def forward(self, images):
            return Anomalies(images.mean((1, 2, 3)), images[:, 0, ::2, ::2])

    with pytest.raises(UserError, match=r"Coarse gives scores \(8,\) and maps \(8, 8, 8\) for images \(8, 3, 16, 16\)"):
        TASK.evaluate(Coarse(), spots())


def test_the_embedded_textures_of_the_test_are_unseen_and_local_deviation_does_not_solve_them():
    data = TASK.load("defects")
    seen = [set(part.drawn.categories) for part in (data.train, data.val, data.test)]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert data.meta["categories"] == list(dict.fromkeys(data.train.drawn.categories)) and len(data.test) == 200
    found = floors(data.test)
    assert found["random"] < 0.05 and 2 * found["random"] < found["local deviation"] < 0.5


def test_training_lowers_the_loss():
    parts = [spots(8, seed) for seed in range(3)]
    data = TaskData("spots", *parts, "x", {}, META, join_named(["a", "b"]))
    done = fit(Bright, TASK, data, Recipe(epochs=30, batch_size=8, lr=0.1))
    assert done.curve[-1]["train_loss"] < 0.8 * done.curve[0]["train_loss"]


def test_a_threshold_is_chosen_on_another_split_than_the_test():
    val, model = spots(8, 1), Bright().eval()
    threshold = best_threshold(model, val)
    heat = torch.stack([val[k][0] for k in range(8)]).mean(1).numpy()
    f1 = [
        2 * ((heat >= t) & val.drawn.masks).sum() / ((heat >= t).sum() + val.drawn.masks.sum()) for t in np.unique(heat)
    ]
    chosen = 2 * ((heat >= threshold) & val.drawn.masks).sum() / ((heat >= threshold).sum() + val.drawn.masks.sum())
    assert chosen == pytest.approx(max(f1))


def picture(file, seed=0, spot=False, size=16):
    pixels = np.random.default_rng(seed).integers(80, 120, (size, size, 3), dtype=np.uint8)
    if spot:
        pixels[4:8, 5:9] = 250
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def root(tmp_path):
    for category in ("nut", "cap", "pin"):
        for k in range(6):
            picture(tmp_path / category / "train/good" / f"{k}.png", k)
            picture(tmp_path / category / "test/good" / f"{k}.png", 10 + k)
            picture(tmp_path / category / "test/spot" / f"{k}.png", 20 + k, spot=True)
            mask = np.zeros((16, 16), np.uint8)
            mask[4:8, 5:9] = 255
            file = tmp_path / category / "ground_truth/spot" / f"{k}_mask.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(file)
    return tmp_path


def test_a_folder_is_trained_on_by_good_images_or_without_the_unseen_categories(root):
    data = TASK.load(root, size=16)
    images = [{part.image for part in split.parts} for split in (data.train, data.val, data.test)]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    assert all(part.mask is None for part in data.train.parts)
    assert TASK.evaluate(Bright().eval().requires_grad_(False), data.test)["pixel_auroc"] == pytest.approx(1)
    assert TASK.evaluate(Bright().eval().requires_grad_(False), data.val)["image_auroc"] == pytest.approx(1)
    data = TASK.load(root, size=16, unseen="nut")
    names = [{part.category for part in split.parts} for split in (data.train, data.val, data.test)]
    assert names[2] == {"nut"} and not names[0] & names[1] and not (names[0] | names[1]) & names[2]
    assert any(part.mask is not None for part in data.train.parts)
    for unseen, message in (("nuts", "has no category 'nuts'; there are: cap, nut, pin"), ("nut,cap", "leaves 1 cat")):
        with pytest.raises(UserError, match=message):
            TASK.load(root, size=16, unseen=unseen)
    assert len(TASK.held_out(root, META).dataset) == 36


def test_no_image_that_was_trained_on_is_tested_in_silence(root):
    for options in ({}, {"unseen": "nut"}):
        data = TASK.load(root, size=16, seed=3, **options)
        with warnings.catch_warnings(action="error"):
            held = TASK.held_out(root, data.meta, seed=3, whole=False, **options)
        assert held.dataset.parts == data.test.parts and not {*held.dataset.parts} & {*data.train.parts}
        assert "seen" not in held.about
    seen = TASK.load(root, size=16, seed=3, unseen="nut").meta
    (name,) = seen["categories"]
    for options in ({"whole": True}, {"whole": False}, {"whole": False, "unseen": name}):
        with pytest.warns(UserWarning, match=f"{name}: these weights were trained on categories of this name"):
            held = TASK.held_out(root, seen, seed=3, **options)
        assert held.about.endswith(f", of which the weights may have seen {name}")
    assert TASK.held_out(root, META).about == f"the test images of 3 categories in {root}"


def test_no_defect_falls_between_the_pixels_that_are_seen(root):
    file = next(root.rglob("*_mask.png"))
    drawn = np.zeros((160, 160), np.uint8)
    drawn[100:103, 21:23] = 255
    for side in (8, 16, 40, 160, 200):
        Image.fromarray(drawn).save(file)
        seen = shrink_mask(file, side)
        assert seen.shape == (side, side) and set(seen.unique().tolist()) == {0.0, 1.0}
        rows, columns = seen.nonzero().float().add(0.5).mul(160 / side).mean(0).tolist()
        assert abs(rows - 101.5) <= 160 / side and abs(columns - 22) <= 160 / side
    Image.fromarray(drawn[1::3, 1::3]).save(file)
    whole = drawn[1::3, 1::3] > 0
    assert (shrink_mask(file, len(whole)).numpy() == whole).all()
    Image.fromarray(0 * drawn).save(file)
    with pytest.raises(UserError, match="the mask of a defect is black everywhere: mark the defect"):
        shrink_mask(file, 16)


def test_options_that_fit_no_embedded_data_are_refused():
    for options, message in (({"size": 32}, "64×64 pixels: leave size out"), ({"unseen": "x"}, "leave unseen out")):
        with pytest.raises(UserError, match=message):
            TASK.load("defects", **options)
    with pytest.raises(UserError, match="size must be from 8 to 4096 pixels, got 4"):
        TASK.load("defects", size=4)


def test_predictions_are_heat_maps_scores_and_an_outline(root, tmp_path):
    model = Named().eval()
    bad, good = root / "nut/test/spot/0.png", root / "nut/train/good"
    said = TASK.predict(model, META, [bad], tmp_path / "heat.png", normal=good, category="metal nut")
    assert model.heard == ["metal nut"] and said.startswith("threshold ") and "% of the pixels anomalous" in said
    assert 16 / 256 <= float(said.partition("% of")[0].rpartition(" ")[2]) / 100 < 16 / 256 + 0.02
    heat = np.asarray(Image.open(tmp_path / "heat.png")).astype(int)
    assert heat.shape == (16, 16, 3) and (heat[4, 5] == 255).all(), "the outline"
    assert heat[5, 6, 0] > heat[5, 6, 2] and heat[12, 12, 2] > heat[12, 12, 0], "red where it is, blue elsewhere"
    TASK.predict(model, META, [root / "nut/test/spot", root / "nut/test/good"], tmp_path / "out", threshold=1.0)
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").open()))
    assert len(rows) == 12 and len(list((tmp_path / "out").glob("*_heat.png"))) == 12
    assert min(float(row["score"]) for row in rows[:6]) > max(float(row["score"]) for row in rows[6:])
    assert TASK.predict(model, META, [bad], None).startswith(f"{bad}: score")
    for options, message in (
        ({"normal": good, "threshold": 1.0}, "normal and threshold both say"),
        ({"normal": bad}, "is no folder: give the good images"),
    ):
        with pytest.raises(UserError, match=message):
            TASK.predict(model, META, [bad], None, **options)
    for files, output, message in (
        ([], None, "there is nothing to inspect"),
        ([bad, bad], tmp_path / "x.png", "2 images do not go into x.png: give a folder"),
        ([bad], tmp_path / "x.txt", "expected .csv, a folder, or one of"),
    ):
        with pytest.raises(UserError, match=message):
            TASK.predict(model, META, files, output)


def test_the_exported_system_says_what_prediction_says():
    portable = TASK.portable(Bright().eval().requires_grad_(False), META)
    for ours, theirs in zip(portable.system(**portable.example), portable.predict(**portable.example), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_picture_of_an_evaluation_has_masks_and_maps():
    assert len(evaluated(Bright().eval().requires_grad_(False), spots(), {}).axes) == 3 * 4

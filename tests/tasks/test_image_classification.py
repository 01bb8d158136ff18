"""The image-classification task: embedded and the user's own data, metrics, prediction, and clear refusals."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import provenn
from provenn.core.errors import UserError
from provenn.tasks import get_task
from provenn.tasks.image_classification import random_crop, shrink
from provenn.training import Recipe, fit

TASK = get_task("image-classification")


def save(
    file: Path, colour: tuple[int, ...] | int = (200, 30, 30), size: tuple[int, int] = (20, 16), mode: str = "RGB"
):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file)


@pytest.fixture
def reds_and_blues(tmp_path: Path) -> Path:
    """Two classes that differ in colour, eight images each, of several sizes."""
    rng = np.random.default_rng(0)
    for index in range(8):
        size = (int(rng.integers(16, 30)), int(rng.integers(16, 30)))
        save(tmp_path / "red" / f"{index}.png", (int(rng.integers(150, 255)), 20, 20), size)
        save(tmp_path / "blue" / f"{index}.jpg", (20, 20, int(rng.integers(150, 255))), size)
    return tmp_path


class Colour(nn.Module):
    """Mean colour to logits."""

    def __init__(self, num_classes: int = 2, in_channels: int = 3):
        super().__init__()
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


def test_digits_are_split_without_overlap_and_by_seed():
    data = TASK.load("digits")
    assert [len(part) for part in (data.train, data.val, data.test)] == [1258, 180, 359]
    assert data.options == {"num_classes": 10, "in_channels": 1} and data.meta["classes"] == list("0123456789")
    images = [part[:][0].flatten(1) for part in (data.train, data.val, data.test)]
    assert abs(images[0].mean()) < 1e-4 and abs(images[0].std() - 1) < 1e-3
    again, other = TASK.load("digits"), TASK.load("digits", seed=1)
    assert torch.equal(again.train[:][0], data.train[:][0]) and again.fingerprint == data.fingerprint
    assert not torch.equal(other.train[:][0], data.train[:][0]) and other.fingerprint != data.fingerprint


def test_metrics_of_known_logits():
    logits = torch.eye(7)[[0, 1, 2, 3]] * 9 + torch.arange(7.0) / 10
    labels = torch.tensor([0, 1, 6, 0])  # right, right, second, last
    result = TASK.evaluate(nn.Identity(), TensorDataset(logits, labels), batch_size=3)
    assert result["accuracy"] == 0.5 and result["top5"] == 0.75
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    few = TASK.evaluate(nn.Identity(), TensorDataset(torch.eye(5), torch.arange(5)))
    assert few["accuracy"] == 1 and "top5" not in few


def test_a_folder_is_learned_and_predicted(reds_and_blues, tmp_path_factory):
    data = TASK.load(reds_and_blues)
    assert data.meta["classes"] == ["blue", "red"] and data.options["num_classes"] == 2
    result = fit(lambda: Colour(**data.options), TASK, data, Recipe(epochs=8, batch_size=4, lr=0.3), seed=0)
    assert result.metrics["accuracy"] == 1
    new = tmp_path_factory.mktemp("new")
    save(new / "a.png", (250, 10, 10), (40, 10))
    save(new / "b.png", (10, 10, 250, 255), (10, 40), "RGBA")
    text = TASK.predict(result.model, data.meta, [new / "a.png", new], new / "out" / "labels.csv")
    lines = text.splitlines()
    assert (
        len(lines) == 4
        and lines[3].startswith("wrote ")
        and "red" in lines[0].split(",")[0]
        and "blue" in lines[2].split(",")[0]
    )
    rows = list(csv.DictReader((new / "out" / "labels.csv").open()))
    assert [row["label"] for row in rows] == ["red", "red", "blue"]
    assert all(abs(float(row["red"]) + float(row["blue"]) - 1) < 1e-5 for row in rows)
    assert TASK.predict(result.model, data.meta, [new] * 15, None).endswith("and 10 more; -o FILE.csv writes them all")
    assert TASK.picture(result.model, data) is not None


def test_large_images_are_seen_at_the_largest_side_and_small_ones_at_their_own(reds_and_blues):
    assert TASK.load(reds_and_blues, largest=12).meta["size"] == 12
    assert TASK.load(reds_and_blues, largest=12, size=14).meta["size"] == 14
    assert TASK.load(reds_and_blues, largest=100).meta["size"] == TASK.load(reds_and_blues).meta["size"] < 30
    assert TASK.load("digits", largest=4).meta["size"] == 8
    with pytest.raises(UserError, match="largest must be at least 1 pixel, got 0"):
        TASK.load(reds_and_blues, largest=0)


@pytest.mark.parametrize(
    "paper, preset, side",
    [
        ("eca_net", "eca_resnet20", 64),
        ("moh", "moh_vit_digits", 32),
        ("hedgehog", "hedgehog_vit", 32),
        ("nprf", "nprf_vit_tiny", 16),
        ("residual_depth", "residual_mlp", 8),
    ],
)
def test_a_small_preset_learns_from_a_folder_of_large_photographs(tmp_path, paper, preset, side):
    for index in range(6):
        save(tmp_path / "photos" / "red" / f"{index}.png", (200, 20, 20), (400, 300))
        save(tmp_path / "photos" / "blue" / f"{index}.png", (20, 20, 200), (400, 300))
    run = tmp_path / "run"
    words = {"preset": preset, "out": run, "device": "cpu", "recipe": {"max_steps": 1}}
    provenn.train(paper, tmp_path / "photos", **words)
    model, label = provenn.paper(paper).load(run)
    assert label.meta["size"] == side
    assert TASK.predict(model, label.meta, [tmp_path / "photos" / "red" / "0.png"], None).count("%") == 2
    if preset != "eca_resnet20":  # which takes any size; a Transformer and an MLP are built for one
        provenn.train(paper, tmp_path / "photos", overrides={"size": 12 if preset != "nprf_vit_tiny" else 4}, **words)


@pytest.mark.parametrize("level, word", [(255, "brighter"), (90, None), (0, None)])
def test_ink_on_paper_is_distinguished_from_light_on_dark(tmp_path, level, word, recwarn):
    meta = TASK.load("digits").meta
    save(tmp_path / "7.png", level, (8, 8), "L")
    TASK.predict(Colour(10, 1), meta, [tmp_path / "7.png"], None)
    says = [str(warning.message) for warning in recwarn if "7.png is" in str(warning.message)]
    assert len(says) == (word is not None) and all(word in line and "invert it" in line for line in says)


def test_missing_splits_are_cut_class_by_class(reds_and_blues):
    data = TASK.load(reds_and_blues)
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 2, 2]
    files = [{file for file, _ in part.files} for part in (data.train, data.val, data.test)]
    assert len(set.union(*files)) == 16
    for part in (data.train, data.val, data.test):
        assert {label for _, label in part.files} == {0, 1}
        assert all((file.parent.name == "red") == (label == 1) for file, label in part.files)
    assert TASK.load(reds_and_blues).val.files == data.val.files
    assert any(TASK.load(reds_and_blues, seed=seed).val.files != data.val.files for seed in (1, 2, 3))


def test_given_splits_are_honoured(tmp_path):
    for split, count in (("train", 8), ("valid", 2), ("test", 3)):
        for name in ("cat", "dog"):
            for index in range(count):
                save(tmp_path / split / name / f"{index}.png")
    data = TASK.load(tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test)] == [16, 4, 6]
    assert {file.parts[-3] for file, _ in data.val.files} == {"valid"}


def test_val_without_test_is_the_test(tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            for index in range(count):
                save(tmp_path / split / name / f"{index}.png")
    data = TASK.load(tmp_path)
    assert {file.parts[-3] for file, _ in data.test.files} == {"val"}
    assert [len(part) for part in (data.train, data.val, data.test)] == [14, 2, 4]


def test_training_images_vary_and_test_images_do_not(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / name / f"{index}.png")
    data = TASK.load(tmp_path)
    assert data.meta["size"] == 40
    for part, same in ((data.train, False), (data.test, True)):
        image = part[0][0]
        assert image.shape == (3, 40, 40) and image.dtype == torch.float32
        assert torch.equal(image, part[0][0]) is same
    torch.manual_seed(3)
    first = data.train[0][0]
    torch.manual_seed(3)
    assert torch.equal(first, data.train[0][0])


def test_a_flat_image_stays_flat_however_it_is_cut():
    flat = torch.full((3, 31, 77), 130, dtype=torch.uint8)
    for short in (10, 31, 50):
        small = shrink(flat, short)
        assert min(small.shape[1:]) == short and bool((small == 130).all())
    for _ in range(20):
        assert bool((random_crop(flat, 24) == 130).all())


def test_grey_models_see_luma(tmp_path):
    save(tmp_path / "white.png", (255, 255, 255))
    save(tmp_path / "black.png", (0, 0, 0))
    save(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")
    meta = {"classes": ["dark", "bright"], "size": 8, "channels": 1, "mean": [0.5], "std": [0.25]}
    model = Colour(2, 1)
    model.linear.weight.data, model.linear.bias.data = torch.tensor([[-1.0], [1.0]]), torch.zeros(2)
    lines = TASK.predict(model, meta, [tmp_path / f"{name}.png" for name in ("white", "black", "clear")], None)
    assert [line.split(": ")[1].split()[0] for line in lines.splitlines()] == ["bright", "dark", "bright"]


def test_every_colour_space_of_a_collection_is_read(tmp_path):
    meta = {"classes": ["blue", "red"], "size": 8, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    model = Colour(2, 3)
    model.linear.weight.data, model.linear.bias.data = torch.tensor([[-1.0, 0, 1], [1, 0, -1]]), torch.zeros(2)
    save(tmp_path / "cmyk.jpg", (0, 255, 255, 0), mode="CMYK")
    save(tmp_path / "indexed.png", (0, 0, 255))
    Image.open(tmp_path / "indexed.png").convert("P").save(tmp_path / "indexed.png")
    lines = TASK.predict(model, meta, [tmp_path / "cmyk.jpg", tmp_path / "indexed.png"], None).splitlines()
    assert [line.split(": ")[1].split()[0] for line in lines] == ["red", "blue"]


def test_published_weights_are_given_their_classes():
    meta = TASK.default_meta({"num_classes": 1000})
    assert len(meta["classes"]) == 1000 and meta["size"] == 224 and meta["mean"][0] == 0.485


def broken_png(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:2000])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "red" / "8.png").write_text("not an image"), r"8\.png is no image"),
        (lambda root: broken_png(root / "red" / "8.png"), r"8\.png is damaged"),
        (lambda root: [f.unlink() for f in (root / "red").iterdir()], r"red holds no images"),
        (lambda root: (root / "red").rename(root / "blue" / "red"), r"one class, 'blue'"),
        (
            lambda root: [f.unlink() for f in sorted((root / "red").iterdir())[2:]],
            r"'red' has 2 images; cutting val and",
        ),
        (lambda root: save(root / "train" / "red" / "0.png"), r"one class, 'red'"),
        (lambda root: [save(root / "val" / c / "0.png") for c in "ab"], "none called 'train'"),
        (
            lambda root: [save(root / f"{p}.png") for p in ("train/a/0", "train/b/0", "val/a/0", "val/c/0")],
            "the class 'b' is in train alone",
        ),
    ],
)
def test_bad_folders_are_refused(reds_and_blues, spoil, message):
    spoil(reds_and_blues)
    with pytest.raises(UserError, match=message):
        TASK.load(reds_and_blues)


def test_other_bad_sources_are_refused(tmp_path):
    with pytest.raises(UserError, match="or an embedded data set: digits"):
        TASK.load("digit")
    with pytest.raises(UserError, match="holds no images"):
        TASK.load(tmp_path)
    save(tmp_path / "loose.png")
    with pytest.raises(UserError, match="1 images and no folders: give each class a folder"):
        TASK.load(tmp_path)
    with pytest.raises(UserError, match="is a file: give a folder"):
        TASK.load(tmp_path / "loose.png")


def test_bad_predictions_are_refused(tmp_path):
    meta = TASK.default_meta({"num_classes": 2})
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"written as \.csv"):
        TASK.predict(Colour(), meta, [tmp_path / "a.png"], tmp_path / "out.txt")
    with pytest.raises(UserError, match="is no image"):
        TASK.predict(Colour(), meta, [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out.csv")
    with pytest.raises(UserError, match="holds no images"):
        TASK.predict(Colour(), meta, [tmp_path / "empty"], None)
    assert not (tmp_path / "out.csv").exists()

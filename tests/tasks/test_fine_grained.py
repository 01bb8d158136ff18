"""Fine-grained recognition: the field's lists, the embedded regions and their floors, and what is mistaken."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import miniature
import provenn
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.data.photographs import GREY
from provenn.tasks import TaskData, fine_grained, get_task
from provenn.tasks.base import LABEL, PREDICTED, HeldOut
from provenn.tasks.fine_grained import FLOORS, Regions, floors, most_confused

TASK = get_task("fine-grained")


@pytest.fixture(scope="module")
def regions() -> TaskData:
    return TASK.load("regions")


def test_the_embedded_regions_are_64_classes_of_16_photographs(regions):
    assert regions.options == {"num_classes": 64, "in_channels": 3} and len(regions.meta["classes"]) == 64
    assert [len(part) for part in (regions.train, regions.val, regions.test)] == [64 * 24, 64 * 8, 64 * 16]
    image, label = regions.train[0]
    assert image.shape == (3, 32, 32) and label == 0
    pixels = torch.stack([regions.train[i][0] for i in range(len(regions.train))])
    assert pixels.mean().abs() < 1e-3 and abs(pixels.std() - 1) < 0.01
    assert TASK.load("regions", seed=1).fingerprint != regions.fingerprint == TASK.load("regions").fingerprint
    assert sum(name.split(",")[0] in GREY for name in regions.meta["classes"]) == 32


def test_the_floors_are_those_that_stand_in_the_code(regions):
    found = floors(regions)
    assert found == pytest.approx(FLOORS, abs=0.02)
    assert TASK.dummy_baseline(regions) == max(found.values()) > 10 / 64


def test_a_blind_guess_counts_where_pixels_say_nothing():
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count, common in ((40, 30), (5, 2), (40, 36)):
        images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        labels = (torch.arange(count) >= common).long()
        parts.append(Regions(images, labels, {"mean": [0.5] * 3, "std": [0.25] * 3}))
    data = TaskData("noise", *parts, "")
    assert TASK.dummy_baseline(data) >= 0.9 > floors(data)["nearest neighbour"]


@pytest.mark.parametrize(
    "name, sizes",
    [("cub-200-2011", (6, 2, 4)), ("nabirds", (9, 3, 6)), ("stanford-dogs", (6, 2, 4)), ("tiny-imagenet", (6, 2, 4))],
)
def test_the_fields_own_splits_are_honoured(tmp_path, name, sizes):
    root = miniature.write(name, tmp_path)
    data = TASK.load(root, size=16)
    assert tuple(len(part) for part in (data.train, data.val, data.test)) == sizes
    files = [{file for file, _ in part.files} for part in (data.train, data.val, data.test)]
    assert sum(map(len, files)) == len(set.union(*files)), "no image is in two splits"
    assert data.train.augment and not data.test.augment and data.meta["size"] == 16
    again = TASK.held_out(root, data.meta)
    assert [file for file, _ in again.dataset.files] == [file for file, _ in data.test.files]
    backwards = {**data.meta, "classes": data.meta["classes"][::-1]}
    labels = [label for _, label in TASK.held_out(root, backwards).dataset.files]
    assert labels == [len(data.meta["classes"]) - 1 - label for _, label in data.test.files]
    with pytest.raises(UserError, match="the model knows no class"):
        TASK.held_out(root, {**data.meta, "classes": ["a", "b"]})


def test_folders_of_classes_are_read_as_image_classification_reads_them(tmp_path):
    root = miniature.write("imagenet-1k", tmp_path)
    fine, plain = (get_task(name).load(root) for name in ("fine-grained", "image-classification"))
    assert fine.fingerprint == plain.fingerprint and fine.test.files == plain.test.files


@pytest.mark.parametrize(
    "options, said",
    [
        ({"source": "regions", "size": 64}, "regions are images of 32×32 pixels"),
        ({"source": "digits"}, "no data at 'digits': give a path to a folder of CUB-200-2011"),
        ({"source": "regions", "size": 0}, "size must be at least 1 pixel"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        TASK.load(**options)


def test_weights_of_other_classes_do_not_fit_the_regions(regions):
    with pytest.raises(UserError, match="these weights take 1 channel"):
        TASK.held_out("regions", {**regions.meta, "channels": 1})


class Takes(nn.Module):
    """Takes every picture for one class, by its brightness."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        found = (images.mean((1, 2, 3)) > 0).long() * 5
        return nn.functional.one_hot(found, self.classes).float()


def test_what_is_most_often_mistaken():
    labels = np.array([0, 0, 0, 1, 2, 2])
    assert most_confused(labels, labels) == []
    assert most_confused(labels, np.array([2, 2, 0, 1, 0, 1]), most=2) == [(0, 2, 2), (2, 0, 1)]


@pytest.mark.parametrize("right", [True, False])
def test_an_evaluation_is_drawn_with_the_worst_classes_and_pairs(regions, right):
    part = Regions(regions.test.images[::8], regions.test.labels[::8], regions.meta)
    scores = TASK.scores(Takes(64), part)
    if right:
        scores[PREDICTED] = scores[LABEL]
    figure = fine_grained.evaluated(Takes(64), part, scores)
    texts = [axes.get_title() for axes in figure.axes]
    assert len(figure.axes) == (1 if right else 13) and texts[0] == "the worst classes"
    if not right:
        names = regions.meta["classes"]
        assert any(text.startswith(name) and "taken 2× for" in text for text in texts for name in names)
        bars = figure.axes[0].patches
        assert len(bars) == 20 and max(bar.get_width() for bar in bars) == 0


def test_the_picture_is_written_by_evaluate_out(regions, tmp_path):
    from provenn.inference.evaluation import evaluate

    part = Regions(regions.test.images[::32], regions.test.labels[::32], regions.meta)
    found = evaluate(Takes(64), TASK, HeldOut(part, "a few"), meta=regions.meta)
    assert {file.name for file in found.save(tmp_path)} == {
        "evaluation.json", "classes.csv", "confusion.png", "evaluation.png"
    }  # fmt: skip
    assert len((tmp_path / "classes.csv").read_text().splitlines()) > 2


def test_presets_of_classifiers_are_trained_on_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = miniature.write("cub-200-2011", tmp_path)
    line = [
        "train",
        "eca_net",
        "--task",
        "fine-grained",
        "--data",
        f"cub-200-2011={root}",
        "--steps",
        "2",
        "--out",
        "run",
    ]
    assert main([*line, "--set", "size=32", "--batch-size", "4"]) == 0
    assert "provenn predict eca_net" in capsys.readouterr().out
    label = json.loads(Path("run/run.json").read_text())
    assert label["task"] == "fine-grained" and label["meta"]["classes"][0] == "001.Black_footed_Albatross"
    found = provenn.evaluate("eca_net", root, weights="run")
    assert found.examples == 4 and found.classes == label["meta"]["classes"]
    picture = next((root / "images").rglob("*.jpg"))
    assert main(["predict", "eca_net", str(picture), "--weights", "run"]) == 0
    assert "001.Black_footed_Albatross" in capsys.readouterr().out

"""The task wound-segmentation: reading, splits, figures, prediction on files, and the studies."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import provenn
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.papers.pressure_ulcer import ResidualAttentionUNet, studies
from provenn.papers.pressure_ulcer.task import scenes, segmenting
from provenn.papers.pressure_ulcer.task.photos import (
    WoundFiles,
    Wounds,
    default_meta,
    framed,
    framed_mask,
    read_wound_mask,
    resize,
    unframed,
)
from provenn.tasks import get_task
from provenn.training import Recipe

TASK = get_task("wound-segmentation")


def folder_of(root: Path, count: int = 8, side: int = 40) -> Path:
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image, mask = scenes.draw(scenes.ULCERS, "train", index, seed=0, side=side)
        Image.fromarray(image[:, : side - index]).save(root / "images" / f"{index}.png")
        Image.fromarray(255 * mask[:, : side - index]).save(root / "masks" / f"{index}.png")
    return root


# Frames


def test_a_resized_ramp_is_a_ramp_and_the_same_size_is_the_same():
    ramp = torch.arange(12.0).expand(1, 5, 12)
    wide = resize(ramp, 5, 24)[0, 2]
    torch.testing.assert_close(wide[1:-1], (torch.arange(24.0) + 0.5)[1:-1] / 2 - 0.5)
    assert resize(ramp, 5, 12) is ramp


def test_shrinking_by_more_than_two_looks_at_every_pixel():
    lines = torch.zeros(1, 64, 64)
    lines[:, :, ::8] = 1.0
    assert float(resize(lines, 8, 8).std()) < 0.05 < float(resize(lines, 40, 40).std())


@pytest.mark.parametrize("letterbox", [True, False])
def test_logits_come_back_to_where_the_photograph_has_them(letterbox):
    meta = default_meta(64, letterbox=letterbox)
    mask = np.zeros((90, 150), np.uint8)
    mask[20:60, 30:100] = 1
    inside = torch.from_numpy(framed_mask(mask, meta)).float()
    assert framed(torch.zeros(3, 90, 150, dtype=torch.uint8), meta).shape == (3, 64, 64)
    told = unframed(4 * inside[None, None] - 2, 90, 150, letterbox)[0, 0] > 0
    both = (told.numpy() & (mask > 0)).sum()
    assert 2 * both / (told.numpy().sum() + mask.sum()) > 0.95


def test_logits_are_upsampled_and_not_the_mask():
    logits = torch.tensor([[[[-1.0, -1.0], [-1.0, 9.0]]]])
    told = unframed(logits, 8, 8, False)[0, 0] > 0
    as_mask = nn.functional.interpolate((logits > 0).float(), (8, 8), mode="bilinear")[0, 0] > 0.5
    assert not torch.equal(told, as_mask) and int(told.sum()) > int(as_mask.sum())


def test_turns_of_a_network_that_turns_with_its_input_change_nothing():
    class Pixelwise(nn.Module):
        def forward(self, x):
            return x.mean(1, keepdim=True) ** 2 - 0.3

    x = torch.randn(2, 3, 10, 10)
    torch.testing.assert_close(segmenting.turned_logits(Pixelwise(), x), Pixelwise()(x))


def test_nothing_outside_the_body_is_wound():
    torch.manual_seed(0)
    model, image = ResidualAttentionUNet(width=4, depth=2, wound_share=0.99).eval(), np.full((30, 40, 3), 99, np.uint8)
    body = np.zeros((30, 40), bool)
    body[:, :20] = True
    report, mask = segmenting.segment(image, model, meta=default_meta(32), body=body, turns=True)
    assert np.array_equal(mask, body) and report.wound_share == 0.5


# Data


def test_splits_are_cut_by_photograph_and_by_patient(tmp_path):
    root = folder_of(tmp_path / "wounds", 9)
    (root / "patients.csv").write_text("".join(f"{index}.png,{index // 3}\n" for index in range(9)))
    data = TASK.load(root, size=32, augmentation="none")
    assert len(data.train) == 3 and len(data.val) == len(data.test) == 3
    patients = [{int(image.stem) // 3 for image, _ in part.files} for part in (data.val, data.test)]
    assert all(len(part) == 1 for part in patients) and not patients[0] & patients[1]
    (root / "patients.csv").write_text("0.png 1\n")
    with pytest.raises(UserError, match="line 1: expected a photograph's name"):
        TASK.load(root)


def test_masks_are_read_as_people_keep_them(tmp_path):
    true = np.zeros((6, 8), np.uint8)
    true[2:4, 3:6] = 1
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "image.png")
    kept = {
        "numbers": Image.fromarray(true),
        "white": Image.fromarray(255 * true),
        "edges": Image.fromarray(np.where(true > 0, 200, 60).astype(np.uint8)),
        "red": Image.fromarray(np.stack([200 * true, 0 * true, 0 * true], -1)),
        "bit": Image.fromarray(true > 0),
    }
    for name, image in kept.items():
        image.save(tmp_path / f"{name}.png")
        assert np.array_equal(read_wound_mask(tmp_path / "image.png", tmp_path / f"{name}.png"), true), name
    Image.fromarray(true[:3]).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="a mask has the size of its image"):
        read_wound_mask(tmp_path / "image.png", tmp_path / "small.png")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"size": 8}, "at least 16"),
        ({"size": 256}, "at most 128"),
        ({"augmentation": "all"}, "augmentation must be one of"),
        ({"mode": "paint"}, "mode must be one of"),
        ({"share": 2.0}, "share must lie"),
        ({"images": 0}, "images must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_said(options, said):
    with pytest.raises(UserError, match=said):
        TASK.load("ulcers", **options)


def test_a_folder_without_any_wound_is_refused(tmp_path):
    root = folder_of(tmp_path / "wounds", 5)
    for mask in (root / "masks").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(mask)))).save(mask)
    with pytest.raises(UserError, match="no mask holds a wound"):
        TASK.load(root)


def test_the_same_seed_gives_the_same_batches():
    data = TASK.load("ulcers", size=32, images=3)
    batches = []
    for _ in range(2):
        torch.manual_seed(5)
        batches.append([data.train[index] for index in range(6)])
    assert all(torch.equal(a, b) for one, two in zip(*batches) for a, b in zip(one, two))
    assert any(not torch.equal(data.train[0][0], data.train[0][0]) for _ in range(3))


def test_figures_follow_from_the_pixels_and_the_dummy_baseline_is_below_a_perfect_mask():
    data = TASK.load("ulcers", size=32)

    class Told(nn.Module):
        """Knows the masks by their pictures."""

        def __init__(self, dataset: Wounds):
            super().__init__()
            self.known = {dataset[i][0].sum().item(): dataset[i][1] for i in range(len(dataset))}
            self.anchor = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return torch.stack([2.0 * self.known[image.sum().item()] - 1 for image in x])[:, None]

    perfect = TASK.evaluate(Told(data.test), data.test)
    assert [perfect[name] for name in ("dice", "iou", "accuracy", "precision", "recall", "dice_pooled")] == [1.0] * 6
    assert 0.8 < perfect["accuracy_all_skin"] < 0.95
    assert 0.3 < TASK.dummy_baseline(data) < 0.7


def test_figures_of_photographs_are_at_their_own_size(tmp_path):
    root = folder_of(tmp_path / "wounds", 3, 48)
    data = WoundFiles([(root / "images" / f"{i}.png", root / "masks" / f"{i}.png") for i in range(3)], default_meta(32))
    torch.manual_seed(0)
    scores = TASK.scores(ResidualAttentionUNet(width=4, depth=2).eval(), data)
    assert scores["pixels"].tolist() == [48 * 48, 48 * 47, 48 * 46]


# From the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = ["train", "pressure_ulcer", "--data", "ulcers", "--set", "size=32", "--set", "width=4", "--set", "depth=2"]
    assert main([*words, "--steps", "2", "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_a_photograph_becomes_mask_report_and_overlay(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image, _ = scenes.draw(scenes.ULCERS, "test", 2, seed=0, side=96)
    Image.fromarray(image).save("photo.jpg")
    weights = ["--weights", str(run)]
    assert (
        main(["predict", "pressure_ulcer", "photo.jpg", *weights, "-o", "out.png", "--overlay", "--scale", "20px/cm"])
        == 0
    )
    report = json.loads(Path("out.json").read_text())
    assert report["image_size"] == [96, 96] and report["network_size"] == [32, 32] and report["scale_source"] == "given"
    assert report["area_cm2"] == pytest.approx(report["wound_pixels"] / 400)
    assert report["photograph"] == "photo.jpg" and "Not a medical device" in report["notice"]
    with Image.open("out.png") as mask:
        assert mask.size == (96, 96) and np.count_nonzero(np.asarray(mask)) == report["wound_pixels"]
    assert Path("out_overlay.png").exists() and "Not a medical device" in capsys.readouterr().out
    more = ["--since", "out.json", "--turns", "--scale", "20px/cm"]
    assert main(["predict", "pressure_ulcer", "photo.jpg", *weights, "-o", "next.json", *more]) == 0
    assert "granulation" in json.loads(Path("next.json").read_text())["change"]
    assert not Path("next.png").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        ("photo.png --scale wide -o a.png", "expected 42.5px/cm"),
        ("photo.png -o a.txt", "a mask is written as .png"),
        ("photo.png other.png -o a.png", "need a folder"),
        ("photo.png other.png --since photo.png", "one wound"),
        ("photo.png --since photo.png -o a.png", "photo.png"),
        ("photo.png --overlay", "an overlay needs a path"),
        ("photo.png -o photo.json --since none.json", "none.json"),
        ("text.png -o a.png", "text.png"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((20, 24, 3), 90, np.uint8)).save("photo.png")
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save("other.png")
    Path("text.png").write_text("no picture")
    before = sorted(Path().iterdir())
    assert main(["predict", "pressure_ulcer", "--weights", str(run), *words.split()]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and sorted(Path().iterdir()) == before


@pytest.mark.parametrize("kind", ["grey", "deep", "cmyk", "alpha", "turned", "dot"])
def test_photographs_of_every_kind_are_taken(run, tmp_path, kind):
    image = scenes.draw(scenes.ULCERS, "test", 2, seed=0, side=40)[0][:, :30]
    file = tmp_path / ("photo.jpg" if kind in ("cmyk", "turned") else "photo.png")
    if kind == "grey":
        Image.fromarray(image[..., 0]).save(file)
    elif kind == "deep":
        Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(file)
    elif kind == "alpha":
        Image.fromarray(np.concatenate([image, image[..., :1]], -1)).save(file)
    elif kind == "cmyk":
        Image.fromarray(image).convert("CMYK").save(file)
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(image).save(file, exif=exif)
    else:
        Image.fromarray(image[:1, :1]).save(file)
    provenn.predict("pressure_ulcer", [file], weights=run, output=tmp_path / "out.png")
    size = json.loads((tmp_path / "out.json").read_text())["image_size"]
    assert size == {"turned": [30, 40], "dot": [1, 1]}.get(kind, [40, 30])


def test_a_second_training_starts_from_the_first(run, tmp_path):
    overrides = {"size": 32, "width": 4, "depth": 2, "start": str(run), "freeze_encoder": True}
    folder, _ = provenn.train(
        "pressure_ulcer", "ulcers", overrides=overrides, recipe={"max_steps": 1}, out=tmp_path / "next"
    )
    first, _ = provenn.paper("pressure_ulcer").load(run)
    second, _ = provenn.paper("pressure_ulcer").load(folder)
    pairs = zip(first.encoder.state_dict().values(), second.encoder.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs) and second.start is None
    assert not torch.equal(first.head.weight, second.head.weight)


def test_a_folder_is_trained_on_and_evaluated_in_full_frames(tmp_path):
    root = folder_of(tmp_path / "wounds", 6)
    overrides = {"size": 32, "width": 4, "depth": 2}
    folder, metrics = provenn.train(
        "pressure_ulcer", root, overrides=overrides, recipe={"max_steps": 2}, out=tmp_path / "run"
    )
    found = provenn.evaluate("pressure_ulcer", root, weights=folder)
    assert "full frames" in str(found.about if hasattr(found, "about") else found) and "dice" in metrics


# Studies


def test_a_classifier_of_pixels_beats_the_mean_mask_and_sees_no_place():
    data = studies.wounds(7, False, 16)
    rows = {}
    for name in ("colour", "mean"):
        part = studies.VARIANTS[name][1]
        done = studies.trained(lambda part=part: studies.network(part), TASK, data, Recipe(epochs=1))
        rows[name] = done.metrics["dice"]
        image = data.test[0][0][None]
        told, flipped = done.model(image), done.model(image.flip(-1)).flip(-1)
        assert torch.equal(told, flipped) is (name == "colour")
    assert rows["colour"] > rows["mean"] + 0.1


def test_stages_of_a_variant_take_as_many_steps_in_sum():
    recipe = Recipe(epochs=1, max_steps=2, batch_size=4, optimizer="adam")
    data = studies.wounds(1, True)
    for name in ("before", "joint", "unchanged", "watershed"):
        part = studies.VARIANTS[name][1]
        done = studies.trained(lambda part=part: studies.network(part), TASK, data, recipe, seed=1)
        assert np.isfinite(done.metrics["dice"]), name
    part = studies.VARIANTS["longer"][1]
    plain = Recipe(epochs=1, batch_size=4, optimizer="adam")
    done = studies.trained(lambda: studies.network(part), TASK, data, plain, seed=1)
    assert done.steps == 2 * len(data.train) // 4


def test_both_stages_have_epochs_of_as_many_pictures_however_few_there_are(monkeypatch):
    sizes = []

    def fitted(build, task, data, *rest, **options):
        sizes.append(len(data.train))
        return studies.Fit(build(), {"dice": 0.0})

    monkeypatch.setattr(studies, "fit", fitted)
    for name, epochs in (("before", [studies.EACH] * 2), ("longer", [studies.EACH]), ("joint", [studies.EACH])):
        for images in (8, 128):
            studies.source_state.cache_clear()
            sizes.clear()
            part = studies.VARIANTS[name][1]
            data = studies.wounds(1, False, images)
            studies.trained(lambda part=part: studies.network(part), TASK, data, Recipe(epochs=1), seed=1)
            assert sizes == epochs, (name, images)
    studies.source_state.cache_clear()


def test_the_source_is_trained_once_whatever_rate_is_tried(monkeypatch):
    titles, plain = [], studies.fit
    monkeypatch.setattr(studies, "fit", lambda *a, **o: titles.append(o["title"]) or plain(*a, **o))
    studies.source_state.cache_clear()
    data, part = studies.wounds(1, True), studies.VARIANTS["before"][1]
    for lr in (1e-3, 3e-3):
        recipe = Recipe(epochs=1, max_steps=2, batch_size=4, optimizer="adam", lr=lr)
        studies.trained(lambda: studies.network(part), TASK, data, recipe, seed=1)
    assert titles == ["before, on wounds", "training", "training"]


def test_of_several_forms_the_best_on_validation_counts(monkeypatch):
    class Told(TASK.__class__):
        def evaluate(self, model, dataset, batch_size=256):
            return {"dice": model.score if dataset is data.val else -model.score}

    def fitted(build, task, data, *rest, **options):
        model = build()
        model.score = {0.05: 0.3, 0.1: 0.9, 0.2: 0.4}[data.train.policy.colour]
        return studies.Fit(model, {"dice": model.score})

    data, part = studies.wounds(1, True), studies.VARIANTS["colour jitter"][1]
    monkeypatch.setattr(studies, "fit", fitted)
    recipe = Recipe(epochs=1, max_steps=2)
    assert studies.trained(lambda: studies.network(part), Told(), data, recipe).metrics["dice"] == 0.9


def test_the_better_baseline_of_the_area_is_the_nearer_one():
    from provenn.papers.pressure_ulcer.experiments import EXPERIMENTS

    class Half(nn.Module):
        """The upper half of every true wound's rows, read off the mask that lies in the image."""

        def forward(self, x):
            told = x[:, :1].clone()
            told[:, :, 20:] = -1
            return told

    mask = np.zeros((2, 40, 40), np.uint8)
    mask[0, 10:30, 5:25], mask[1, 0:40, 0:10] = 1, 1
    images = np.repeat(255 * mask[:, None], 3, 1)
    meta = {**default_meta(40), "mean": [0.5] * 3, "std": [0.5] * 3}
    test = Wounds(images, mask, meta)
    data = TASK.load("ulcers", size=32, images=16)
    data = data.__class__(**{**vars(data), "test": test})
    assert studies.area_error(Half(), data) == pytest.approx(0.5) == studies.area_nearness(Half(), data)
    beside = EXPERIMENTS["area_beside"]
    assert beside.metric == "area nearness" and beside.best({"colour": [0.9], "mean": [0.4]}) == [0.9]


def test_a_late_split_has_copies_of_each_picture_on_both_sides(monkeypatch):
    seen = {}

    def tagged(image, mask, policy, rng):
        source = next(i for i, each in enumerate(drawn) if np.array_equal(np.moveaxis(each, 0, -1), image))
        return np.full_like(image, source), mask

    def fitted(build, task, data, recipe, **options):
        seen["train"] = data.train.images[:, 0, 0, 0]
        return studies.Fit(build(), {})

    def evaluated(model, dataset):
        seen.setdefault("tests", []).append(dataset)
        return {"dice": 0.5}

    drawn = studies.wounds(3, False, 16).train.images
    monkeypatch.setattr(studies, "augmented", tagged)
    monkeypatch.setattr(studies, "fit", fitted)
    monkeypatch.setattr(studies.TASK, "evaluate", evaluated)
    for by_picture in (True, False):
        seen.pop("tests", None)
        studies.split_late(3, False, by_picture)
        own, fresh = seen["tests"]
        test, train = set(own.images[:, 0, 0, 0].tolist()), set(seen["train"].tolist())
        assert len(seen["train"]) == 192 and len(own.images) == 64 and len(fresh.images) == 200
        assert bool(test & train) is not by_picture


def test_gates_forced_open_are_measured_on_the_trained_network():
    from provenn.papers.pressure_ulcer import open_gates

    data = studies.wounds(1, True)
    torch.manual_seed(0)
    gated = studies.network(studies.VARIANTS["gates"][1]).eval()
    before = TASK.evaluate(gated, data.test)["dice"]
    with open_gates(gated):
        opened = TASK.evaluate(gated, data.test)["dice"]
    assert studies.gates_open(gated, data) == pytest.approx(opened - before)
    assert TASK.evaluate(gated, data.test)["dice"] == before
    assert studies.gates_open(studies.network(studies.VARIANTS["residual"][1]), data) is None
    assert gated.encoder[0].first[0].weight.is_contiguous(memory_format=torch.channels_last)


# A picture of something else


def test_outlines_of_wounds_are_near_and_those_in_other_pictures_are_not():
    from provenn.data.photographs import photograph

    model, label = provenn.paper("pressure_ulcer").load()
    refused = 0
    for index in range(12):
        image, _ = scenes.draw(scenes.ULCERS, "test", 300 + index, seed=11, side=96)
        report, mask = segmenting.segment(image, model, meta=label.meta)
        refused += not mask.any()
    assert refused <= 1
    for name in ("hubble", "motorcycle", "chelsea", "china"):
        image = photograph(name)
        report, mask = segmenting.segment(image, model, meta=label.meta)
        assert not mask.any() and "this may be no wound" in report.warnings[0] and report.unlike > 3, name
        assert report.wound_pixels == 0 and "no wound was found" not in " ".join(report.warnings)
    report, mask = segmenting.segment(image, model, meta=label.meta, anyway=True)
    assert mask.any() and "this may be no wound" in report.warnings[0] and report.wound_pixels == mask.sum()
    bare = {key: value for key, value in label.meta.items() if key != "likeness"}
    report, mask = segmenting.segment(image, model, meta=bare)
    assert report.unlike is None and mask.any()


def test_what_outlines_are_like_is_read_off_the_training_masks():
    from provenn.papers.pressure_ulcer.task.likeness import Likeness, likeness_of, outline_numbers

    pairs = [scenes.draw(scenes.ULCERS, "train", index, seed=1, side=64) for index in range(14)]
    known = Likeness.model_validate(likeness_of(pairs))
    numbers = np.stack([outline_numbers(image, mask > 0) for image, mask in pairs])
    np.testing.assert_allclose(known.mean, numbers.mean(0), rtol=1e-3)
    np.testing.assert_allclose(known.spread, np.maximum(numbers.std(0), 0.05), rtol=1e-3)
    distances = [known.distance(row) for row in numbers]
    assert np.mean(np.square(distances)) < 1.01 and max(distances) < 3
    assert likeness_of(pairs[:9]) is None and likeness_of([(image[..., :1], mask) for image, mask in pairs]) is None
    image, mask = pairs[0]
    assert outline_numbers(image, np.zeros_like(mask, bool)) is None
    bright = (image.astype(float) * 0.5).astype(np.uint8)
    assert abs(outline_numbers(bright, mask > 0) - outline_numbers(image, mask > 0))[[0, 1, 2]].max() == 0
    data = TASK.load("ulcers", size=32, images=16)
    assert "likeness" in data.meta and "likeness" not in studies.wounds(1, True).meta


def test_a_cat_gets_no_outline_on_the_command_line(tmp_path, capsys):
    from provenn.data.photographs import photograph

    cat, out = tmp_path / "cat.png", tmp_path / "out.png"
    Image.fromarray(photograph("chelsea")).save(cat)
    assert main(["predict", "pressure_ulcer", str(cat), "-o", str(out)]) == 0
    assert "this may be no wound" in capsys.readouterr().out and np.ptp(np.asarray(Image.open(out).convert("L"))) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["wound_pixels"] == 0 and report["unlike"] > 3 and report["frame"] == "full frame"
    assert main(["predict", "pressure_ulcer", str(cat), "-o", str(out), "--anyway", "--crop"]) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["wound_pixels"] > 0 and report["frame"] == "crop" and "no wound" in report["warnings"][0]


def test_evaluate_says_whether_figures_are_of_crops_or_full_frames(tmp_path):
    root, meta = folder_of(tmp_path / "w"), default_meta(32)
    assert TASK.held_out(root, meta).about.endswith("full frames")
    assert "crops: full frames have more skin" in TASK.held_out(root, meta, frame="crop").about
    with pytest.raises(UserError, match="frame must be one of full frame, crop, got 'half'"):
        TASK.held_out(root, meta, frame="half")


def test_the_gate_ratio_is_one_where_gates_are_open():
    from provenn.papers.pressure_ulcer import open_gates

    data = studies.wounds(1, True)
    torch.manual_seed(0)
    gated = studies.network(studies.VARIANTS["gates"][1]).eval()
    with torch.no_grad(), open_gates(gated):
        assert studies.gate_ratio(gated, data) == pytest.approx(1.0)
    assert studies.gate_ratio(studies.network(studies.VARIANTS["residual"][1]), data) is None


def test_skin_and_wound_are_two_classes_or_one():
    from provenn.papers.pressure_ulcer.task.segmenting import Probabilities, wound_logits

    torch.manual_seed(0)
    two, image = ResidualAttentionUNet(width=4, depth=2, num_classes=2).eval(), torch.rand(2, 3, 16, 16)
    told = Probabilities(two, [0.5] * 3, [0.2] * 3)(image)
    torch.testing.assert_close(told, two((image - 0.5) / 0.2).softmax(1))
    mask = (torch.rand(2, 16, 16) > 0.5).to(torch.uint8)
    two.dice = 0.0
    torch.testing.assert_close(TASK.loss(two, (image, mask)), nn.functional.cross_entropy(two(image), mask.long()))
    with pytest.raises(UserError, match="num_classes is 1 or 2, got 3"):
        wound_logits(torch.zeros(1, 3, 4, 4))


def test_gates_are_shown_and_their_absence_is_said(run, tmp_path, capsys):
    image = tmp_path / "photo.png"
    Image.fromarray(scenes.draw(scenes.ULCERS, "test", 2, seed=0, side=40)[0]).save(image)
    assert (
        main(["inspect", "pressure_ulcer", str(image), "--weights", str(run), "-o", str(tmp_path / "gates.png")]) == 0
    )
    assert "decoder.0.gate" in capsys.readouterr().out and (tmp_path / "gates.png").exists()


def test_a_file_for_other_programs_and_its_int8_form_do_as_the_network_does(run, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    words = ["export", "pressure_ulcer", "--weights", str(run), "-o", str(tmp_path / "ulcer.onnx"), "--int8"]
    assert main([*words, "--data", "ulcers"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    model, label = provenn.paper("pressure_ulcer").load(run)
    data = TASK.held_out("ulcers", label.meta, seed=0)
    assert float(lines["float32"][1]) == pytest.approx(TASK.evaluate(model, data.dataset)["dice"], abs=2e-4)

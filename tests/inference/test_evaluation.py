"""Trained weights on data: metrics with intervals, classes, and data read as the weights say."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

import provenn
from provenn import catalog
from provenn.cli import main
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.evidence.interval import resampled, student
from provenn.inference import evaluation
from provenn.inference.evaluate import held_out_options, recorded
from provenn.inference.evaluation import evaluate
from provenn.inference.paper import Paper
from provenn.tasks import get_task
from provenn.tasks.base import HeldOut
from provenn.tasks.discovery import SHARED
from provenn.training import weights

RNG = np.random.default_rng(5)


def mean(scores):
    return {"mean": float(scores["x"].mean())}


def width(interval):
    return interval[1] - interval[0]


def test_the_interval_of_a_mean_is_students_of_few_examples_exactly_of_many_nearly():
    few, many = RNG.normal(size=6), RNG.normal(size=400)
    (found, method), expected = resampled({"x": few}, mean), student(few.tolist())[0]
    assert found["mean"] == pytest.approx(expected) and "jackknife" in method
    found, method = resampled({"x": many}, mean)
    assert found["mean"] == pytest.approx(student(many.tolist())[0], abs=0.02) and "bootstrap" in method


def test_a_ratio_of_sums_is_resampled_as_such():
    """Errors that follow sizes leave nothing uncertain about their ratio, however much both vary."""
    sizes = RNG.integers(1, 50, 100).astype(float)
    scores = {"right": 0.5 * sizes, "asked": sizes}
    found, _ = resampled(scores, lambda s: {"share": float(s["right"].sum() / s["asked"].sum())})
    assert found["share"] == pytest.approx((0.5, 0.5))


def test_neighbours_that_tell_alike_count_as_one():
    apart = RNG.normal(size=200)
    alike = np.repeat(apart, 16)
    plain, blocks = (resampled({"x": alike}, mean, overlap=overlap)[0]["mean"] for overlap in (1, 16))
    alone = resampled({"x": apart}, mean)[0]["mean"]
    assert width(plain) == pytest.approx(width(alone) / 4, rel=0.15)
    assert width(blocks) == pytest.approx(width(alone), rel=0.15)


@pytest.mark.parametrize("count", [1, 3])
def test_examples_that_give_no_interval_say_so(count):
    found, method = resampled({"x": RNG.normal(size=count)}, mean, overlap=2)
    assert found == {"mean": None} and "too few" in method


@pytest.mark.parametrize("name", SHARED)
def test_embedded_data_are_read_as_weights_trained_on_them_say(name):
    """Then they are the test split that the training held out, item by item."""
    task = get_task(name)
    small = {"language-modelling": {"eval_tokens": 2048}, "masked-language-modelling": {"eval_tokens": 2048}}
    first, options = next(iter(task.embedded)), small.get(name, {})
    data = task.load(first, **options)
    held_out = task.held_out(first, data.meta, **options)
    assert len(held_out.dataset) == len(data.test) > 0
    for index in (0, len(data.test) - 1):
        ours, theirs = held_out.dataset[index], data.test[index]
        for one, other in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-5, atol=1e-5)


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes, which differ in their mean, and not in the order of their names."""
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = RNG.integers(level - 30, level + 30, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


class Brightness(nn.Module):
    """Class 0 is light."""

    def forward(self, x):
        level = x.mean((1, 2, 3))
        return torch.stack([level, torch.zeros_like(level), -level], 1)


META = {"classes": ["light", "grey", "dark"], "size": 12, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}


def test_classes_are_the_models_own_whatever_order_the_folder_has(photos):
    task = get_task("image-classification")
    held_out = task.held_out(photos, META)
    assert len(held_out.dataset) == 24 and str(photos) in held_out.about
    found = evaluate(Brightness(), task, held_out, meta=META)
    assert found.metrics["accuracy"] == 1 and found.intervals["accuracy"] == (1, 1)
    assert found.confusion.tolist() == [[12, 0, 0], [0, 0, 0], [0, 0, 12]]
    assert [row[:4] for row in found.class_table().rows] == [["light", 12, 1, 1], ["dark", 12, 1, 1]]
    shutil.copytree(photos / "dark", photos.parent / "one" / "dark")
    alone = evaluate(Brightness(), task, task.held_out(photos.parent / "one", META), meta=META)
    assert alone.metrics["accuracy"] == 1, "who was trained on two classes may be asked about one"
    part = task.held_out(photos, META, whole=False)
    data = task.load(photos)
    assert [file for file, _ in part.dataset.files] == [file for file, _ in data.test.files] and len(data.test) == 4
    nameless = {**META, "classes": ["class 0", "class 1"]}
    assert [label for _, label in task.held_out(photos, nameless).dataset.files] == [0] * 12 + [1] * 12
    with pytest.raises(UserError, match="knows no class 'dark'; it knows: light, grey"):
        task.held_out(photos, {**META, "classes": ["light", "grey"]})
    with pytest.raises(UserError, match="has 2 classes; these weights know 3, which have no names"):
        task.held_out(photos, {**META, "classes": ["class 0", "class 1", "class 2"]})


def test_what_a_class_is_taken_for():
    labels, told = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 1, 0])
    dataset = TensorDataset(nn.functional.one_hot(told, 3).float(), labels)
    found = evaluate(
        nn.Identity(), get_task("image-classification"), HeldOut(dataset, "six"), meta={"classes": ["a", "b", "c"]}
    )
    assert found.class_table().rows == [
        ["c", 1, 0, None, "a (1)"],
        ["a", 3, pytest.approx(1 / 3), 0.5, "b (2)"],
        ["b", 2, 1, 0.5, ""],
    ]
    assert found.class_table(most=1).caption.endswith("2 more with --out")


@pytest.fixture
def run(tmp_path):
    """The folder of a training on digits that took no step."""
    torch.manual_seed(0)
    task, paper = get_task("image-classification"), provenn.paper("eca_net")
    data = task.load("digits", seed=3)
    model = paper.build("eca_resnet20", **data.options).eval()
    trained_on = {"fingerprint": data.fingerprint, "seed": 3, "options": {}}
    label = weights.Label("eca_net", "eca_resnet20", task.name, data.options, data.meta, trained_on=trained_on)
    weights.save(model, tmp_path / "run" / weights.FILE, label)
    return tmp_path / "run", model, data


def test_the_command_line_tells_what_the_task_measures_and_writes_it(run, tmp_path, capsys):
    folder, model, data = run
    out = tmp_path / "told"
    line = f"evaluate eca_net --weights {folder} --data digits --json --out {out}"
    assert main(shlex.split(line)) == 0
    told = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        expected = get_task("image-classification").evaluate(model, data.test)
    assert told["metrics"] == pytest.approx(expected) and told["examples"] == len(data.test)
    low, high = told["intervals"]["accuracy"]
    assert low < told["metrics"]["accuracy"] < high < low + 0.2
    assert np.sum(told["confusion"]) == len(data.test)
    assert sorted(file.name for file in out.iterdir()) == ["classes.csv", "confusion.png", "evaluation.json"]
    assert Image.open(out / "confusion.png").size[0] > 300
    assert len((out / "classes.csv").read_text().splitlines()) == 11
    assert main(shlex.split(f"evaluate eca_net --weights {folder} --data digits")) == 0
    text = capsys.readouterr().out
    assert "accuracy" in text and "most often taken for" in text and "expanded bootstrap" in text


def test_weights_are_tested_on_what_their_training_held_out_and_on_all_of_other_data(tmp_path):
    rows = [f"{i},{np.sin(i / 3):.4f}" for i in range(300)]
    for name, lines in (("mine", rows), ("other", rows[::-1])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["step,x", *lines]))
    task, paper = get_task("series-forecasting"), provenn.paper("aaren")
    data = task.load(tmp_path / "mine.csv", context=12, horizon=4)
    model = paper.build("aaren_forecaster", **data.options, dim=8, layers=1, heads=1)
    trained_on = {"fingerprint": data.fingerprint, "seed": 0, "options": {"context": 12, "horizon": 4}}
    options = {**data.options, "dim": 8, "layers": 1, "heads": 1}
    label = weights.Label("aaren", "aaren_forecaster", task.name, options, data.meta, trained_on=trained_on)
    weights.save(model, tmp_path / weights.FILE, label)

    def examples(name, **more):
        return provenn.evaluate("aaren", tmp_path / f"{name}.csv", weights=tmp_path / weights.FILE, **more)

    assert examples("mine").examples == len(data.test) == 60 - 4 + 1
    assert examples("mine", whole=True).examples == examples("other").examples == 300 - 12 - 4 + 1
    assert examples("other", whole=False).examples == 57
    assert "in blocks of 16" in examples("other").method
    with pytest.raises(UserError, match="columns step, x: the model knows y"):
        task.held_out(tmp_path / "mine.csv", {**data.meta, "columns": ["y"]})


def test_the_authors_checkpoint_is_evaluated_on_folders_in_the_order_of_its_classes(photos, tmp_path, capsys):
    model = provenn.paper("eca_net").build("eca_resnet18", num_classes=2)
    theirs = {name.replace(".gate.", ".eca."): value for name, value in model.state_dict().items()}
    torch.save({"state_dict": theirs}, tmp_path / "authors.pth.tar")
    line = f"evaluate eca_net --weights {tmp_path}/authors.pth.tar --data {photos} --set size=16"
    assert main(shlex.split(line)) == 0
    text = capsys.readouterr().out
    assert "24 examples" in text and "16×16 pixels" in text and "70.92 % (the authors' README, ImageNet)" in text


def test_a_task_that_only_knows_metrics_has_no_intervals():
    class Bare(type(get_task("image-classification"))):
        scores = get_task("recall").__class__.__mro__[1].scores  # Task's own, which refuses

        def evaluate(self, model, dataset, batch_size=256):
            return {"accuracy": 0.25}

    found = evaluate(nn.Identity(), Bare(), HeldOut(TensorDataset(torch.zeros(4, 2)), "four"))
    assert found.metrics == {"accuracy": 0.25} and found.intervals == {"accuracy": None}
    assert "no score of single examples" in found.method


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--data nowhere", "no data at 'nowhere'"),
        ("--data digits --split half", "--split must be one of auto, all, test, got 'half'"),
        ("--data digits --set colour=red", "has no 'colour'; what can be set: size"),
        ("--data digits --preset eca_resnet50", "holds weights of eca_resnet20, not of eca_resnet50"),
        ("--data digits --set kernel_size=3", "has no 'kernel_size'"),
    ],
)
def test_bad_requests_are_answered_in_a_line(run, line, says, capsys):
    assert main(shlex.split(f"evaluate eca_net --weights {run[0]} {line}")) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error


def test_a_value_that_data_do_not_take_is_answered_in_a_line(capsys):
    assert main(shlex.split("evaluate wings --data composed --set pictures=9")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "multimodal-chat does not take pictures=9: pictures must be from 1 to 4, got 9" in error


def test_data_that_do_not_fit_and_weights_that_are_no_numbers_are_refused(run):
    _, model, data = run
    task = get_task("image-classification")
    wide = HeldOut(TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4).long()), "colour")
    with pytest.raises(UserError, match="colour: the data do not fit the model"):
        evaluate(model, task, wide)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="is not a finite number"):
        evaluate(model, task, HeldOut(data.test, "digits"))


def test_options_of_the_training_hold_in_the_evaluation(monkeypatch):
    """Places of 16 tokens from a vocabulary of 100: at the task's own 128 of 1,000 the weights do not even fit."""
    told = {"length": 16, "vocabulary": 100, "examples": 64, "test_examples": 40}
    label = weights.Label("urpe", "any", "position-tasks", trained_on={"options": told, "seed": 3})
    card = catalog.card("urpe")
    monkeypatch.setattr(Paper, "load", lambda *_, **__: (torch.nn.Identity(), label))
    monkeypatch.setattr(weights, "label_of", lambda _: label)
    monkeypatch.setattr(type(card), "preset", lambda *_: None)
    monkeypatch.setattr(evaluation, "published_of", lambda *_: [])
    monkeypatch.setattr(evaluation, "evaluate", lambda model, kind, held_out, **_: held_out.dataset.tensors[0])
    with pytest.warns(UserWarning, match="as in the training: length=16, vocabulary=100"):
        tokens = provenn.evaluate("urpe", "position-identification", weights="run", device="cpu")
    assert tokens.shape == (40, 16) and tokens.max() < 111
    with pytest.warns(UserWarning, match="test_examples=20 where the training had test_examples=40"):
        tokens = provenn.evaluate(
            "urpe", "position-identification", weights="run", device="cpu", overrides={"test_examples": 20}
        )
    assert tokens.shape == (20, 16)


def test_options_about_a_data_set_hold_for_the_data_of_the_training_alone(tmp_path, capsys):
    """Weights that ship were judged in five folds of composed scenes: a folder of one's own is judged whole."""
    for number in range(5):
        Image.new("RGB", (64, 64), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,a {word} disc" for number, word in enumerate(("red", "blue", "green", "pink", "grey"))]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *lines]))
    assert main(["evaluate", "rcar", "--data", str(tmp_path), "--json"]) == 0
    told = capsys.readouterr()
    assert "as in the training" not in told.err and json.loads(told.out)["metrics"]["text_r5"] == 1  # of all five
    label = weights.Label("rcar", "any", "image-text-retrieval", trained_on={"options": {"folds": 5}})
    task = get_task("image-text-retrieval")
    for of_training, found in ((True, {"folds": 5}), (False, {})):
        with progress.unsaid():
            assert recorded(label, task, held_out_options(task), {}, of_training) == found

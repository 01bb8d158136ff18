"""`provenn train --two-steps`: weights of a large set are tuned to a small one, what they lack first."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import provenn
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.training.loop import fit

SIZES = {"height": 16, "width": 8, "widths": [4, 8, 8], "placement": "none"}
SHORT = {"max_steps": 3, "batch_size": 2}


def people(root, count, seed):
    rng = np.random.default_rng(seed)
    for person in range(count):
        colours = rng.integers(0, 256, (4, 2, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        for camera in ("a", "b"):
            for number in range(2):
                file = root / f"{person}/{camera}/{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(colours // 2 + rng.integers(0, 100, colours.shape).astype(np.uint8)).save(file)
    return root


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A network of a set of twelve identities, of which half are for the test and one is held out."""
    folder = tmp_path_factory.mktemp("large")
    provenn.train(
        "little_attention", people(folder / "people", 12, 0), recipe=SHORT, overrides=SIZES, out=folder / "run"
    )
    return folder / "run"


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    return people(tmp_path_factory.mktemp("robot") / "people", 8, 1)


def command(robot, large, out, *more):
    words = ["train", "little_attention", "--data", str(robot), "--weights", str(large), "--two-steps"]
    words += ["--steps", "6", "--batch-size", "2", "--set", "height=16", "--set", "width=8", "-o", str(out)]
    return [*words, *more]


def test_a_head_for_other_identities_learns_first_and_then_all(robot, large, tmp_path, capsys, monkeypatch):
    stages = []

    def noted(build, task, data, recipe, **options):
        model = build()
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        stages.append((options["title"], learning, recipe.max_steps, recipe.lr))
        return fit(lambda: model, task, data, recipe, **options)

    monkeypatch.setattr("provenn.training.stages.fit", noted)
    out = tmp_path / "tuned"
    assert main(command(robot, large, out, "--set", "placement=3.1")) == 0
    said = capsys.readouterr().err
    assert "does not bring backbone" in said and "more, which learn alone at first" in said
    (first, alone, few, rate), (second, everything, more, slow) = stages
    assert (first, second, few, more) == ("new parts", "all", 2, 4) and slow == pytest.approx(rate / 10)
    assert "classifier.weight" in alone and all("attention" in n or n == "classifier.weight" for n in alone)
    assert {"backbone.conv1.weight", "classifier.weight"} <= everything and "neck.bias" not in everything
    before, after = (load_file(folder / "weights.safetensors") for folder in (large, out))
    assert before["classifier.weight"].shape[0] == 5 and after["classifier.weight"].shape[0] == 3
    assert any("attention" in name for name in after)
    close = (after["backbone.conv1.weight"] - before["backbone.conv1.weight"]).abs().max()
    assert 0 < close < 0.02
    run = json.loads((out / "run.json").read_text())
    assert run["steps"] == 6 and [entry["epoch"] for entry in run["curve"]] == list(range(1, 1 + len(run["curve"])))
    assert "--two-steps" in run["trained_on"]["command"].split() and run["trained_on"]["weights"] == str(large)
    assert provenn.predict("little_attention", [robot / "0/a/0.png"], weights=out, overrides={"gallery": robot})


def test_a_run_that_was_stopped_goes_on_where_it_was(robot, large, tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert main(command(robot, large, whole, "--recipe", "schedule=constant", "--epochs", "6")) == 0
    real, calls = fit, []

    def stopped(*arguments, **options):
        calls.append(options["title"])
        if options["title"] == "all":
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr("provenn.training.stages.fit", stopped)
    assert main(command(robot, large, out, "--recipe", "schedule=constant", "--epochs", "6")) == 130
    assert "--two-steps" in (said := capsys.readouterr().err) and "--resume" in said
    monkeypatch.setattr("provenn.training.stages.fit", real)
    assert main(command(robot, large, out, "--recipe", "schedule=constant", "--epochs", "6")) == 2
    assert "holds a training that did not end" in capsys.readouterr().err
    assert main(command(robot, large, out, "--recipe", "schedule=constant", "--epochs", "6", "--resume")) == 0
    same, again = (load_file(folder / "weights.safetensors") for folder in (whole, out))
    assert all(torch.equal(same[name], again[name]) for name in same)


def test_what_cannot_be_tuned_in_two_steps_is_said(robot, large, tmp_path):
    given = {"recipe": SHORT, "overrides": {"height": 16, "width": 8}, "out": tmp_path / "out"}
    with pytest.raises(UserError, match="add --two-steps to train what differs first"):
        provenn.train("little_attention", robot, weights=large, **given)
    with pytest.raises(UserError, match="give them with --weights"):
        provenn.train("little_attention", robot, two_steps=True, **given)
    with pytest.raises(UserError, match="has every part of this network"):
        provenn.train("little_attention", large.parent / "people", weights=large, two_steps=True, **given)
    other = {**given, "overrides": {**given["overrides"], "widths": [6, 12, 12]}}
    with pytest.raises(UserError, match="fit this network: it is another one"):
        provenn.train("little_attention", robot, weights=large, two_steps=True, **other)
    with pytest.raises(UserError, match="nothing to resume"):
        provenn.train("little_attention", robot, weights=large, two_steps=True, resume=True, **given)
    with pytest.raises(UserError, match="one process"):
        provenn.train("little_attention", robot, weights=large, two_steps=True, devices=2, **given)


def test_checkpoints_of_another_training_are_not_gone_on_from(robot, large, tmp_path):
    out = tmp_path / "out"
    (out / "all").mkdir(parents=True)
    (out / "all" / "last.ckpt").write_bytes(b"of another training")
    (out / "weights.safetensors").write_bytes((large / "weights.safetensors").read_bytes())
    assert main(command(robot, large, out)) == 0
    assert (out / "all" / "last.ckpt").read_bytes()[:2] == b"PK"


def test_pruned_weights_are_tuned_as_a_whole(tmp_path):
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    provenn.train("dimap", "digits", recipe=SHORT, overrides={"dim": 8, "depths": [1, 2]}, out=dense)
    assert main(["prune", str(dense), "--method", "dimap", "--ratio", "0.4", "-o", str(sparse)]) == 0
    with pytest.raises(UserError, match="pruned weights are tuned as a whole"):
        provenn.train("dimap", "digits", weights=sparse, two_steps=True, recipe=SHORT, out=tmp_path / "out")

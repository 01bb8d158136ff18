"""Experiments at the budget paper, end to end, on miniature sets in the layout of the real ones."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import miniature
import provenn
from provenn import catalog
from provenn.catalog import Card, Experiment, Figure
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.evidence import Verdict
from provenn.experiments.at_paper import TrainingOptions
from provenn.experiments.at_paper.program import in_own_program
from provenn.experiments.reproduce import reproduce
from provenn.testing.seeded import seeded_state
from provenn.training import Hardware, Recipe


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("PROVENN_DATA", str(folder))
    return folder


TINY_TITANS = {
    "dim": 8,
    "heads": 2,
    "memory_heads": 2,
    "layers": 1,
    "length": 16,
    "window": 8,
    "chunk": 4,
    "persistent": 1,
}


def small(slug: str, experiment: str, *, recipe: dict, preset: str | None = None, **overrides) -> Card:
    """The paper with one experiment, its `at_paper` made small; of presets the one that it names."""
    card = catalog.card(slug)
    asked = card.experiment(experiment)
    changed = {**asked.at_paper.overrides, **overrides.pop("overrides", {})}
    how = asked.at_paper.model_copy(
        update={
            "gpu": False,
            "overrides": changed,
            "recipe": {**asked.at_paper.recipe, **recipe} if asked.at_paper.recipe else {},
            **({"preset": preset} if preset else {}),
            **overrides,
        }
    )
    chosen = card.preset(how.preset)
    return card.model_copy(
        update={
            "experiments": [asked.model_copy(update={"at_paper": how})],
            "presets": [
                chosen.model_copy(update={"recipe": {**chosen.recipe, **recipe}}),
                *([card.preset(how.start)] if how.start not in (None, how.preset) else []),
            ],
        }
    )


def published(card: Card, value: float) -> Card:
    experiment: Experiment = card.experiments[0]
    return card.model_copy(
        update={
            "experiments": [
                experiment.model_copy(
                    update={"published": Figure(value=value, unit=experiment.published.unit, source="a test")}
                )
            ]
        }
    )


def authors_mobilenet(file) -> None:
    """Random weights under the names that the authors' model has."""
    model = provenn.paper("eca_net").build("eca_mobilenet_v2", num_classes=3)
    ours = {re.sub(r"^layers\.", "features.", name): tensor for name, tensor in model.state_dict().items()}
    theirs = {re.sub(r"(features\.\d+)\.gate\.", r"\1.conv.9.", name): tensor for name, tensor in ours.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": theirs}, file)


def test_the_authors_weights_are_held_to_the_published_figure(data, tmp_path, capsys):
    miniature.write("imagenet-1k", data)
    authors_mobilenet(tmp_path / "their.pth.tar")
    line = (
        "reproduce eca_net --experiment imagenet_mobilenet --budget paper --device cpu --json "
        f"--out {tmp_path / 'run'} --data eca_net:eca_mobilenet_v2={tmp_path / 'their.pth.tar'}"
    )
    assert main(shlex.split(line)) == 0
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    measured = finding["record"]["measurement"]
    evaluation = provenn.evaluate("eca_net", data / "imagenet-1k", weights=tmp_path / "their.pth.tar", device="cpu")
    assert measured["value"] == pytest.approx(100 * evaluation.metrics["accuracy"]) and evaluation.examples == 6
    assert measured["at_paper_setting"] and measured["method"] == "the published test set, whole"
    assert str(tmp_path) not in json.dumps(finding["record"])
    assert finding["record"]["verdict"] == "contradicted"  # of a figure of 72.56 %

    card = published(small("eca_net", "imagenet_mobilenet", recipe={}), measured["value"] + 0.1)
    paths = {"eca_net:eca_mobilenet_v2": tmp_path / "their.pth.tar"}
    (finding,) = reproduce(card, budget="paper", device="cpu", out=tmp_path / "other", data=paths)
    assert finding.verdict is Verdict.REPRODUCED


def test_photographs_of_a_benchmark_are_restored_by_the_authors_weights(data, tmp_path):
    miniature.write("set5", data)
    with open("tests/papers/craft/golden.json") as file:
        case = next(case for case in json.load(file)["cases"] if case["preset"] == "craft_x2")
    state = seeded_state({name: tuple(shape) for name, shape in case["shapes"].items()}, case["seed"])
    (data / "weights" / "craft").mkdir(parents=True)
    torch.save({"params_ema": state}, data / "weights" / "craft" / "craft_x2.pth")
    (finding,) = reproduce(
        catalog.card("craft"), experiments="set5_x2", budget="paper", device="cpu", out=tmp_path / "run"
    )
    evaluation = provenn.evaluate("craft", data / "set5" / "HR", weights=data / "weights" / "craft" / "craft_x2.pth")
    assert finding.measurement.value == pytest.approx(evaluation.metrics["psnr"]) and evaluation.examples == 2
    assert finding.measurement.data == "all of set5"
    assert evaluation.published["psnr"][0] == "38.23 dB PSNR-Y (the authors' README) on set5"


TINY = {"dim": 8, "heads": 2, "layers": 1, "feedforward": 8}
TRAINED = {
    "classification": (
        "uea",
        small,
        "aaren",
        "classification_paper",
        {"overrides": TINY, "data": ["uea/Handwriting", "uea/PEMS-SF"]},
    ),
    "forecasting": (
        "forecasting",
        small,
        "aaren",
        "forecasting_paper",
        {
            "overrides": {**TINY, "context": 12, "horizon": 4},
            "data": ["forecasting/weather.csv", "forecasting/traffic.csv"],
        },
    ),
    "events": (
        "events",
        small,
        "aaren",
        "events_paper",
        {"overrides": TINY, "data": ["events/mimic.csv", "events/taxi.csv"]},
    ),
    "sequences": ("lra", small, "hedgehog", "lra", {"overrides": {**TINY, "longest": 24}}),
    "depth": ("cifar-10", small, "residual_depth", "cifar10", {"preset": "scaled_resnet20"}),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_system_and_its_baseline_are_trained_on_the_papers_sets(name, data, tmp_path):
    where, make, slug, experiment, overrides = TRAINED[name]
    miniature.write(where, data)
    card = make(slug, experiment, recipe={"max_steps": 2, "epochs": 1, "batch_size": 8}, **overrides)
    how = card.experiments[0].at_paper

    def measure(**more):
        return reproduce(card, budget="paper", seeds=3, device="cpu", out=tmp_path / "run", **more)[0]

    finding = measure()
    assert not finding.measurement.failed and not finding.measurement.needs
    measured = finding.measurement
    assert len(measured.values) == len(measured.baselines) == 3 and measured.values != measured.baselines
    assert measured.sides[0] == how.preset and next(iter(how.against)) in measured.sides[1]
    assert [skill.variant for skill in measured.skills] == list(measured.sides)
    assert measured.at_paper_setting != bool(how.departs) and measured.setting["at_paper"]["metric"] == how.metric
    ledger = json.loads((tmp_path / "run" / slug / "ledger.json").read_text())
    assert len(ledger["trials"]) == 2 * 3 * len(how.sets)
    assert not any((tmp_path / "run" / slug / "trainings").iterdir())
    (tmp_path / "run" / slug / "evidence.json").unlink()
    again = measure(resume=True)  # every trial is known
    assert again.measurement.values == measured.values and again.record.wall_seconds >= 0
    assert json.loads((tmp_path / "run" / slug / "ledger.json").read_text()) == ledger


def authors(slug: str, preset: str, file, rename=lambda name: name, **options) -> dict:
    """Random weights of a preset under the names that the authors' model has; returns ours."""
    torch.manual_seed(1)
    state = provenn.paper(slug).build(preset, **options).state_dict()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({rename(name): tensor for name, tensor in state.items()}, file)
    return state


def test_a_detector_starts_from_the_authors_backbone_and_leaves_parts_of_it_alone(data, tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    from provenn.experiments.at_paper import trained as training

    miniature.write("coco-2017", data)
    overrides = {"size": 48, "val_share": 0.25}
    recipe = {"max_steps": 2, "warmup_steps": 0, "batch_size": 2, "lr": 1e-3}
    card = small("eca_net", "coco_faster_rcnn", recipe=recipe, overrides=overrides)

    def measure():
        return reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")[0]

    assert "the authors' weights of eca_resnet50" in measure().reason
    file = data / "weights" / "eca_net" / "eca_resnet50.pth"
    theirs = authors("eca_net", "eca_resnet50", file, lambda name: name.replace(".gate.", ".eca."), num_classes=5)
    trained = []
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *given, **named: trained.append(fit(*given, **named)) or trained[-1])
    finding = measure()
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert 0 <= measured.values[0] <= 100 and not measured.at_paper_setting and finding.verdict is not None
    kept = {name: torch.equal(x, theirs[name]) for name, x in trained[0].model.backbone.state_dict().items()}
    stem = {name for name in kept if name.startswith(("conv1", "bn1", "layer1"))}
    statistics = {name for name in kept if "running_" in name}
    assert all(kept[name] for name in stem | statistics)
    assert not kept["layer2.0.conv1.weight"] and not kept["layer4.2.bn3.weight"]
    assert measured.setting["weights"] and "fc.weight" not in kept

    authors("eca_net", "eca_resnet50", file, lambda name: name.replace(".gate.", ".eca."), kernel_size="3377")
    assert "layer2.0.gate.conv.weight is [1, 1, 3] where the model has [1, 1, 5]" in measure().reason


@pytest.mark.parametrize(("experiment", "trainings"), [("coco_faster_rcnn", 1), ("coco_keys", 2)])
def test_a_detector_with_bvr_starts_from_weights_of_imagenet(data, tmp_path, monkeypatch, experiment, trainings):
    pytest.importorskip("pycocotools")
    from provenn.experiments.at_paper import trained as training
    from provenn.papers.relationnet_pp import bridge

    monkeypatch.setattr(bridge, "POINTED", 3)  # of a hundred regions, which take a minute
    miniature.write("coco-2017", data)
    file = data / "weights" / "relationnet_pp" / "resnet50.pth"
    theirs = authors("relationnet_pp", "resnet50", file, num_classes=5)
    # As torchvision's first files have it: norms do not count their batches.
    torch.save({name: x for name, x in theirs.items() if not name.endswith("num_batches_tracked")}, file)
    recipe = {"max_steps": 1, "warmup_steps": 0, "batch_size": 2, "lr": 1e-4}
    card = small("relationnet_pp", experiment, recipe=recipe, overrides={"size": 48, "val_share": 0.25})
    trained = []
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *given, **named: trained.append(fit(*given, **named)) or trained[-1])
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert len(trained) == trainings and not measured.at_paper_setting and measured.sides == card.experiments[0].sides
    for each in trained:
        assert torch.equal(each.model.backbone.state_dict()["layer1.0.conv1.weight"], theirs["layer1.0.conv1.weight"])
        assert not torch.equal(each.model.backbone.state_dict()["layer4.2.bn3.weight"], theirs["layer4.2.bn3.weight"])
    if trainings == 2:
        bridges = [each.model.head.bridge for each in trained]
        assert [bridge.classification for bridge in bridges] == [None, None]
        assert [bridge.regression.key_types for bridge in bridges] == [("top_left", "bottom_right"), ("centre",)]


def test_figures_of_shares_are_published_in_hundredths():
    """A share is measured between 0 and 1, and reported in hundredths where the figure's unit begins with a %."""
    for card in catalog.cards().values():
        for experiment in card.experiments:
            if (
                experiment.at_paper is not None
                and experiment.at_paper.metric in ("AP", "miou", "accuracy")
                and experiment.published
            ):
                unit, value = experiment.published.unit, experiment.published.value
                assert unit.startswith("%") or value < 1, f"{card.slug} {experiment.id}: {value} {unit}"


def test_a_detector_starts_from_a_backbone_without_a_map_of_stride_4(data, tmp_path):
    pytest.importorskip("pycocotools")
    miniature.write("coco-2017", data)
    with open("tests/papers/shvit/golden.json") as file:
        case = next(case for case in json.load(file)["cases"] if case["preset"] == "shvit_s1")
    state = seeded_state({name: tuple(shape) for name, shape in case["shapes"].items()}, case["seed"])
    (data / "weights" / "shvit").mkdir(parents=True)
    torch.save(state, data / "weights" / "shvit" / "shvit_s1.pth")
    recipe = {"max_steps": 1, "warmup_steps": 0, "batch_size": 2, "accumulate": 1, "lr": 1e-6}
    card = small(
        "shvit",
        "coco_retinanet",
        recipe=recipe,
        start="shvit_s1",
        overrides={"variant": "s1", "size": 64, "val_share": 0.25},
    )
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert 0 <= measured.values[0] <= 100 and measured.setting["weights"] and not measured.at_paper_setting


def test_a_segmenter_starts_from_the_authors_backbone_and_trains_all_of_it(data, tmp_path, monkeypatch):
    from provenn.experiments.at_paper import trained as training

    miniature.write("ade20k", data)
    with open("tests/papers/emov2/golden.json") as file:
        case = next(case for case in json.load(file)["cases"] if case["preset"] == "emov2_5m")
    state = seeded_state({name: tuple(shape) for name, shape in case["shapes"].items()}, case["seed"])
    (data / "weights" / "emov2").mkdir(parents=True)
    torch.save(state, data / "weights" / "emov2" / "emov2_5m.pth")
    recipe = {"max_steps": 1, "warmup_steps": 0, "batch_size": 2, "lr": 1e-3}
    card = small("emov2", "ade20k_fpn", recipe=recipe, overrides={"size": 64, "val_share": 0.25})
    trained = []
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *given, **named: trained.append(fit(*given, **named)) or trained[-1])
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert 0 <= measured.values[0] <= 100
    model = trained[0].model
    first = state["stage0.0.conv.weight"]
    moved = (model.backbone.stem[0].weight.detach() - first).abs().max()
    assert 0 < moved < 0.01 and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("experiment", "where", "classes", "file"),
    [
        ("cityscapes_s", "cityscapes", 19, "bevanet_s"),
        ("camvid_s", "camvid", 11, "bevanet_s_camvid"),
    ],
)
def test_masks_are_told_by_the_authors_weights(experiment, where, classes, file, data, tmp_path):
    miniature.write(where, data)
    with open("tests/papers/bevanet/golden.json") as golden:
        case = next(case for case in json.load(golden)["cases"] if case["preset"] == "bevanet_s")
    shapes = {name: tuple(shape) for name, shape in case["shapes"].items()}
    heads = [name for name in shapes if re.search(r"^(model\.)?(seghead_ds|head)\.conv2\.", name)]
    shapes |= {name: (classes, *shapes[name][1:]) for name in heads}
    weights = data / "weights" / "bevanet" / f"{file}.pth"
    weights.parent.mkdir(parents=True)
    torch.save(seeded_state(shapes, case["seed"]), weights)
    card = small("bevanet", experiment, recipe={})
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    evaluation = provenn.evaluate("bevanet", data / where, weights=weights, device="cpu")
    assert measured.value == pytest.approx(100 * evaluation.metrics["miou"]) and evaluation.examples == 2
    assert measured.at_paper_setting and finding.verdict is Verdict.CONTRADICTED
    figure = catalog.card("bevanet").experiment(experiment).published.value
    assert evaluation.published["miou"][0].startswith(f"{figure} %")
    line = f"data --json --data bevanet:{file}={weights}"
    assert main(shlex.split(line)) == 0


def test_a_policy_plays_in_the_environment_that_the_registry_names(data, tmp_path, monkeypatch):
    pytest.importorskip("h5py")
    from provenn.tasks import datasets

    miniature.write("d4rl", data)
    entry = datasets.get("d4rl").model_copy(update={"options": {"hopper*": {"environment": "Pendulum-v1"}}})
    monkeypatch.setitem(datasets.known(), "d4rl", entry)
    overrides = {**TINY, "test": 1, "validation": 1, "context": 4}
    sets = ["d4rl/hopper_medium-v2.hdf5"]
    card = small("aaren", "d4rl", recipe={"max_steps": 1, "epochs": 1}, overrides=overrides, data=sets)
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    assert not finding.measurement.failed and len(finding.measurement.values) == 1
    assert finding.measurement.skills[0].values != finding.measurement.values  # returns, and scores


def test_a_figure_of_validation_data_is_held_to_validation_data(data, tmp_path):
    miniature.write("wikitext-103", data)
    tiny = {"dim": 8, "heads": 2, "layers": 1, "features": 4, "length": 16}
    recipe = {"max_steps": 3, "warmup_steps": 0, "batch_size": 4}
    card = small("nprf", "wikitext103", recipe=recipe, overrides=tiny)
    (finding,) = reproduce(card, budget="paper", seeds=3, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed, measured.failed
    assert len(measured.values) == 3 and 1 < min(measured.values) < 60
    other = card.model_copy(
        update={
            "experiments": [
                card.experiments[0].model_copy(
                    update={"at_paper": card.experiments[0].at_paper.model_copy(update={"split": "test"})}
                )
            ]
        }
    )
    (tested,) = reproduce(other, budget="paper", seeds=3, device="cpu", out=tmp_path / "other")
    assert tested.measurement.values != measured.values


def authors_rat(preset, file) -> None:
    """Weights drawn from a seed, of 300 tokens, under the names that the authors' model has."""
    with open("tests/papers/rat/golden.json") as golden:
        case = next(case for case in json.load(golden)["cases"] if case["preset"] == preset)
    shapes = {name: (300, 128) if tuple(shape) == (50, 128) else tuple(shape) for name, shape in case["shapes"].items()}
    state = seeded_state(shapes, case["seed"])
    state |= {name: state["embedding.wte.weight"] for name in state if name == "head.lm_head.weight"}
    file.parent.mkdir(parents=True)
    torch.save(state, file)


@pytest.mark.parametrize(
    ("experiment", "preset"), [("perplexity_rat", "rat_small"), ("perplexity_hybrid", "rat_swa_small")]
)
def test_language_models_of_the_authors_are_held_to_the_published_perplexity(experiment, preset, data, tmp_path):
    pytest.importorskip("tokenizers")
    miniature.write("fineweb-edu", data)
    authors_rat(preset, data / "weights" / "rat" / f"{preset}.pth")
    card = small("rat", experiment, recipe={}, preset=preset, overrides={"length": 16, "eval_tokens": 64})
    assert card.experiments[0].at_paper.checkpoint == preset
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    options = {"tokenizer": "tokenizer.json", "length": 16, "eval_tokens": 64}
    evaluation = provenn.evaluate(
        "rat",
        data / "fineweb-edu",
        weights=data / "weights" / "rat" / f"{preset}.pth",
        overrides={
            **options,
            **{key: value for key, value in card.experiments[0].at_paper.overrides.items() if key not in options},
        },
    )
    assert measured.value == pytest.approx(evaluation.metrics["perplexity"], rel=1e-4) and measured.at_paper_setting


QUESTIONS = ("questions/piqa", "questions/hellaswag", "questions/lambada")


@pytest.mark.parametrize(
    ("experiment", "preset"), [("commonsense_rat", "rat_small"), ("commonsense_hybrid", "rat_swa_small")]
)
def test_language_models_of_the_authors_answer_questions(experiment, preset, data, tmp_path):
    pytest.importorskip("tokenizers")
    place = miniature.write("questions", data)
    authors_rat(preset, data / "weights" / "rat" / f"{preset}.pth")
    card = small("rat", experiment, recipe={}, preset=preset, overrides={"length": 64})
    assert len(card.experiments[0].at_paper.sets) == 6
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    overrides = {**card.experiments[0].at_paper.overrides, "tokenizer": str(place / "tokenizer.json")}
    weights = data / "weights" / "rat" / f"{preset}.pth"
    evaluation = [
        provenn.evaluate("rat", data / name, weights=weights, overrides=overrides)
        for name in card.experiments[0].at_paper.sets
    ]
    assert measured.value == pytest.approx(100 * sum(each.metrics["score"] for each in evaluation) / 6)
    assert "questions/hellaswag: score" in measured.note and "accuracy_norm" in measured.note


@pytest.mark.parametrize(("experiment", "preset"), [("code_rat", "rat_small"), ("code_hybrid", "rat_swa_small")])
def test_language_models_of_the_authors_complete_code(experiment, preset, data, tmp_path):
    pytest.importorskip("tokenizers")
    miniature.write("longbench", data)
    authors_rat(preset, data / "weights" / "rat" / f"{preset}.pth")
    card = small("rat", experiment, recipe={}, preset=preset, overrides={"length": 80})
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert 0 <= measured.value <= 100 and measured.at_paper_setting and finding.verdict is not None
    assert "2 prompts of LCC (LongBench); 2 prompts of RepoBench-P (LongBench)" in measured.data


@pytest.mark.parametrize(
    ("experiment", "preset"), [("summaries_rat", "rat_small"), ("summaries_hybrid", "rat_swa_small")]
)
def test_language_models_of_the_authors_are_tuned_and_write_summaries(experiment, preset, data, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    from provenn.experiments.at_paper import trained as training

    miniature.write("qmsum", data)
    authors_rat(preset, data / "weights" / "rat" / f"{preset}.pth")
    recipe = {"max_steps": 1, "warmup_steps": 0, "batch_size": 2, "accumulate": 1, "precision": "32-true", "lr": 1e-7}
    card = small("rat", experiment, recipe=recipe, preset=preset, start=preset, overrides={"length": 400})
    trained = []
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *given, **named: trained.append(fit(*given, **named)) or trained[-1])
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert 0 <= measured.values[0] <= 100 and not measured.at_paper_setting and finding.verdict is not None
    theirs = torch.load(data / "weights" / "rat" / f"{preset}.pth")["embedding.wte.weight"]
    moved = (trained[0].model.embed.weight.detach() - theirs).abs().max()
    assert 0 < moved < 1e-6, "it started from the authors' weights, and learned"
    assert "3 prompts of QMSum with answers" in measured.data


def test_a_language_model_is_trained_and_looks_for_a_needle(data, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    from provenn.tasks import prompted

    miniature.write("fineweb-edu", data)
    miniature.write("ruler", data)
    recipe = {"max_steps": 1, "warmup_steps": 0, "batch_size": 4, "accumulate": 1, "precision": "32-true"}
    overrides = {**TINY_TITANS, "eval_tokens": 64, "prompt_length": 160}
    card = small("titans", "needle_16k", recipe=recipe, preset="titans_mac_small", overrides=overrides)
    lengths = []
    ends = prompted._ends
    monkeypatch.setattr(prompted, "_ends", lambda *given: lengths.append(given[1]) or ends(*given))
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert lengths == [160 - 128] * 2, "of a prompt with its answer, not the window of the training"
    assert 0 <= measured.values[0] <= 100 and not measured.at_paper_setting


def test_a_language_model_is_trained_and_then_asked(data, tmp_path):
    pytest.importorskip("tokenizers")
    miniature.write("redpajama", data)
    recipe = {"max_steps": 2, "warmup_steps": 0, "batch_size": 4, "accumulate": 1, "precision": "32-true"}
    tiny = {"length": 16, "vocab_size": 300, "eval_tokens": 64, "shared": 2, "top_k": 1}
    card = small("moh", "language_models", recipe=recipe, preset="moh_small", overrides=tiny)
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    assert "Questions with choices" in finding.reason
    miniature.write("questions", data)
    (finding,) = reproduce(card, budget="paper", seeds=3, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    trials = json.loads((tmp_path / "run" / "moh" / "ledger.json").read_text())["trials"]
    assert measured.values == [pytest.approx(100 * trial["value"]["score"]) for trial in trials] and len(trials) == 3
    assert measured.skills[0].values == [trial["value"]["bits_per_byte"] for trial in trials], "of the text"


def test_a_language_model_is_tested_on_another_set_by_its_words(data, tmp_path):
    pytest.importorskip("tokenizers")
    miniature.write("fineweb-edu", data)
    recipe = {"max_steps": 2, "warmup_steps": 0, "batch_size": 4, "accumulate": 1, "precision": "32-true"}
    card = small(
        "titans",
        "language_760m",
        recipe=recipe,
        preset="titans_mag_small",
        overrides={**TINY_TITANS, "eval_tokens": 320},
    )
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    assert "WikiText-103, raw" in finding.reason, "both sets are asked for"
    miniature.write("wikitext-103-raw", data)
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    (trial,) = json.loads((tmp_path / "run" / "titans" / "ledger.json").read_text())["trials"]
    value, text = trial["value"], (data / "wikitext-103-raw" / "wiki.test.raw").read_text()
    words, letters = len(text.split()), len(text.encode())
    assert value["word_perplexity"] == pytest.approx(2 ** (value["bits_per_byte"] * letters / words), rel=1e-3)
    assert measured.values == [pytest.approx(value["word_perplexity"])]


def test_translations_are_compared_by_bleu_over_all_languages(data, tmp_path):
    miniature.write("iwslt14", data)
    tiny = {"dim": 8, "heads": 2, "layers": 1, "hidden": 8, "features": 2, "decoder_features": 2, "max_length": 16}
    recipe = {"max_steps": 2, "warmup_steps": 1, "batch_size": 8}
    card = small("nprf", "iwslt14", recipe=recipe, overrides=tiny, data=["iwslt14/de-en", "iwslt14/en-fr"])
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert measured.unit == "bleu" and 0 <= measured.values[0] <= 100
    assert "iwslt14/de-en: pairs of sentences: 40 train, 6 valid, 8 test; 11 words" in measured.data
    assert measured.setting["recipe"]["label_smoothing"] == 0.1


def test_nucleotides_are_told_apart(data, tmp_path):
    miniature.write("genomics", data)
    recipe = {"max_steps": 20, "epochs": 20, "batch_size": 4}
    card = small("titans", "genomics", recipe=recipe, overrides={"dim": 16, "layers": 1})
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert measured.values == [100.0] and not measured.at_paper_setting, "in per cent, and from scratch"
    assert "sequences of up to 17 nucleotides" in measured.data


def test_where_the_setting_departs_nothing_is_said_to_be_the_papers(data, tmp_path):
    miniature.write("forecasting", data)
    overrides = {"overrides": {"dim": 8, "context": 12, "horizon": 4}, "data": "forecasting/weather.csv"}
    card = small("titans", "forecasting_paper", recipe={"max_steps": 2, "epochs": 1}, **overrides)
    experiment = card.experiments[0]
    recipe = experiment.at_paper.recipe
    assert recipe["schedule"] == "multistep" and recipe["patience"] == 3, "of the paper's recipes, by name"
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    assert not finding.measurement.failed and finding.measurement.setting["recipe"]["max_steps"] == 2
    assert not finding.measurement.at_paper_setting and "where the paper has SiMBA" in finding.measurement.note
    with pytest.raises(ValueError, match="forecasting_paper: at_paper departs from the paper: say with expects"):
        Card.model_validate(
            {**card.model_dump(), "experiments": [{**experiment.model_dump(), "expects": None}], "claims": []}
        )


def test_a_decoder_of_a_frozen_encoders_layers_is_trained_session_by_session(data, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("PROVENN_CACHE", str(tmp_path / "cache"))
    miniature.write("iemocap", data)
    recipe = {"max_steps": 2, "epochs": 1, "batch_size": 4, "precision": "32-true"}
    sessions = ["iemocap/Session1", "iemocap/Session4"]
    card = small("gaam", "iemocap", recipe=recipe, data=sessions, overrides={"heads": 2, "hidden": 4, "seconds": 0.1})

    def measure():
        return reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")[0]

    assert "the folder of the pretrained model wavlm-large at" in measure().reason
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    of_sound = {"conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 5], "num_feat_extract_layers": 2}
    of_place = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = transformers.WavLMConfig(**sizes, **of_sound, **of_place)
    transformers.WavLMModel(config).save_pretrained(data / "weights" / "gaam" / "wavlm-large")
    finding = measure()
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert not measured.at_paper_setting and 0 <= measured.values[0] <= 100
    trials = json.loads((tmp_path / "run" / "gaam" / "ledger.json").read_text())["trials"]
    assert len(trials) == 2 and measured.values[0] == pytest.approx(50 * sum(t["value"]["accuracy"] for t in trials))
    assert len(list((tmp_path / "cache" / "stacks").iterdir())) == 2
    assert measured.setting["weights"] and str(tmp_path) not in json.dumps(finding.record.model_dump(mode="json"))


def test_a_pretrained_model_is_converted_tuned_and_tested(data, tmp_path):
    transformers = pytest.importorskip("transformers")
    miniature.write("wikitext-103-raw", data)
    card = small("hedgehog", "gpt2_wikitext103", recipe={}, overrides={"length": 16, "prepare_steps": 2, "steps": 2})

    def measure():
        return reproduce(card, budget="paper", seeds=3, device="cpu", out=tmp_path / "run")[0]

    assert "the folder of the pretrained model gpt2 at" in measure().reason
    folder = data / "weights" / "hedgehog" / "gpt2"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(data / "wikitext-103-raw" / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=32, vocab_size=300)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    finding = measure()
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert len(measured.values) == 3 and all(1 < value < 600 for value in measured.values)
    assert "tuned" in measured.note and "prepared" in measured.note and measured.at_paper_setting
    assert str(tmp_path) not in json.dumps(finding.record.model_dump(mode="json"))


def pretrained_bert(folder, vocab=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), positions=48) -> None:
    """A small BERT that predicts masked tokens, with WordPiece tokens and random weights."""
    import transformers

    words = [*vocab, *dict.fromkeys(word.lower() for word in miniature.WORDS if word.isalpha()), *"0123456789"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)


GLUE = ("glue/STS-B", "glue/MNLI")


@pytest.mark.parametrize(("experiment", "sides"), [("bert_glue_kept", 1), ("bert_glue", 2)])
def test_a_pretrained_model_is_fine_tuned_on_sentences_and_then_converted(experiment, sides, data, tmp_path):
    pytest.importorskip("transformers")
    miniature.write("glue", data)
    pretrained_bert(data / "weights" / "hedgehog" / "bert-base-uncased")
    overrides = {"length": 32, "batch_size": 8, "passes": 8, "lr": 1e-2}
    card = small("hedgehog", experiment, recipe={}, data=list(GLUE), overrides=overrides)
    (finding,) = reproduce(card, budget="paper", seeds=3, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    assert measured.at_paper_setting and len(measured.values) == 3 and len(measured.baselines) == 3 * (sides - 1)
    trials = json.loads((tmp_path / "run" / "hedgehog" / "ledger.json").read_text())["trials"]
    assert len(trials) == len(GLUE) * 3 * sides and "the first seed, hedgehog on glue/MNLI: before" in measured.note
    first = [trial["value"] for trial in trials[: len(GLUE)]]  # side by side, seed by seed, set by set
    before, after = (sum(stages[name] for stages in first) / len(GLUE) for name in ("before", "tuned"))
    assert measured.values[0] == pytest.approx(100 * (after / before if sides == 1 else after))
    assert before > 0.4, "fine-tuned: a word decides"
    if sides == 2:
        assert measured.sides == ("hedgehog", "hedgehog, feature_map=elu") and measured.values != measured.baselines


def pretrained_llama(folder) -> None:
    """A small Llama with a token a word and random weights."""
    import tokenizers
    import transformers

    words = [
        "Summarize",
        "this",
        "dialog",
        ":",
        "---",
        "Summary",
        "Anna",
        "Ben",
        "Carl",
        "Dora",
        "hello",
        "hi",
        "meets",
        ".",
    ]
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **named).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def test_a_converted_model_writes_summaries_that_are_scored(data, tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    miniature.write("samsum", data)
    pretrained_llama(data / "weights" / "hedgehog" / "llama-2-7b")
    overrides = {"length": 48, "written": 6, "passes": 20, "batch_size": 8, "tuning": "full", "lr": 1e-2}
    card = small("hedgehog", "llama_samsum", recipe={}, overrides=overrides)
    (finding,) = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run")
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    trials = json.loads((tmp_path / "run" / "hedgehog" / "ledger.json").read_text())["trials"]
    assert measured.values[0] == trials[0]["value"]["tuned"] > 60 > trials[0]["value"]["before"]


def test_an_image_classifier_is_converted_tuned_and_tested(data, tmp_path):
    transformers = pytest.importorskip("transformers")
    miniature.write("imagenet-1k", data)
    overrides = {"passes": 30, "batch_size": 3, "lr": 1e-3}
    card = small("hedgehog", "vit_imagenet", recipe={}, overrides=overrides)

    def measure(**more):
        return reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / "run", **more)[0]

    assert "the folder of the pretrained model vit-base-patch16-224 at" in measure().reason
    folder = data / "weights" / "hedgehog" / "vit-base-patch16-224"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    assert "has 3 classes, the model predicts 4" in measure().reason
    config.num_labels = 3
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.3] * 3}))
    finding = measure()
    measured = finding.measurement
    assert not measured.failed and not measured.needs, measured.failed or measured.needs
    (trial,) = json.loads((tmp_path / "run" / "hedgehog" / "ledger.json").read_text())["trials"]
    assert set(trial["value"]) == {"before", "converted", "prepared", "tuned"}
    assert measured.values == [100 * trial["value"]["tuned"]] == [100.0], "brightness distinguishes the three"
    assert trial["value"]["before"] < 1 and not measured.at_paper_setting
    assert measured.note.startswith("passes and rate of the tuning are ours")


def test_what_is_not_there_is_said_and_nothing_is_run(data, tmp_path):
    card = catalog.card("eca_net")
    (finding,) = reproduce(card, experiments="imagenet_resnet50", budget="paper", device="cpu", out=tmp_path)
    assert finding.verdict is Verdict.NOT_MEASURED
    assert "ImageNet-1K" in finding.reason and "the authors' weights of eca_resnet50" in finding.reason
    (finding,) = reproduce(
        catalog.card("hedgehog"), experiments="bert_glue", budget="paper", device="cpu", out=tmp_path
    )
    assert finding.reason.count("GLUE, eight tasks") == 1 and "hedgehog:bert-base-uncased=FOLDER" in finding.reason
    miniature.write("imagenet-1k", data)
    (finding,) = reproduce(catalog.card("nprf"), experiments="imagenet", budget="paper", device="cpu", out=tmp_path)
    assert finding.reason == "needs a GPU (the device is cpu)"
    (finding,) = reproduce(card, experiments="imagenet_resnet50", budget="small", device="cpu", out=tmp_path)
    assert finding.reason == "needs ImageNet-1K, 4 GPUs, about 2 days"


def test_weights_of_another_system_fail_that_experiment_alone(data, tmp_path):
    miniature.write("imagenet-1k", data)
    authors_mobilenet(data / "weights" / "eca_net" / "eca_resnet50.pth")
    (finding,) = reproduce(
        catalog.card("eca_net"), experiments="imagenet_resnet50", budget="paper", device="cpu", out=tmp_path
    )
    assert "holds weights of eca_mobilenet_v2, not of eca_resnet50" in finding.reason


def test_at_another_setting_it_is_no_figure_of_the_paper(data, tmp_path):
    where, make, slug, experiment, overrides = TRAINED["events"]
    miniature.write(where, data)
    card = make(slug, experiment, recipe={"max_steps": 2, "epochs": 1, "batch_size": 8}, **overrides)
    settings: dict = {"budget": "paper", "seeds": 1, "device": "cpu", "out": tmp_path / "run"}
    (finding,) = reproduce(card, overrides={"max_steps": 1, "dim": 4}, **settings)
    assert finding.overrides == {"max_steps": 1, "dim": 4} and finding.measurement.setting["steps"] == 1
    assert not finding.measurement.at_paper_setting and finding.measurement.setting["at_paper"]["overrides"]["dim"] == 4
    with pytest.raises(UserError, match="has the option 'dims', did you mean 'dim'"):
        reproduce(card, overrides={"dims": 4}, **settings)


def test_two_processes_train_what_one_does(data, tmp_path, monkeypatch, capfd):
    """They divide a batch of the recipe, so that a step is the same."""
    from provenn.experiments.at_paper import job

    monkeypatch.setattr(job.shutil, "rmtree", lambda folder, **options: None)  # so that checkpoints can be looked at
    miniature.write("genomics", data)
    recipe = {"max_steps": 3, "epochs": 3, "batch_size": 4, "optimizer": "sgd"}
    card = small("titans", "genomics", recipe=recipe, overrides={"dim": 16, "layers": 1}, metric="cross_entropy")

    def measure(name: str, **options):
        finding = reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path / name, **options)[0]
        assert not finding.measurement.failed, finding.measurement.failed
        folders = (tmp_path / name / "titans" / "trainings").iterdir()
        return finding, [torch.load(folder / "last.ckpt", weights_only=True) for folder in folders]

    alone, _ = measure("alone")
    shared, checkpoints = measure("shared", training=TrainingOptions(Hardware(devices=2)))
    assert [(saved["processes"], saved["began"]["batch_size"]) for saved in checkpoints] == [(2, 2)]
    assert shared.measurement.values == pytest.approx(alone.measurement.values, rel=1e-4)
    assert shared.measurement.setting == {**alone.measurement.setting, "hardware": {"devices": 2}}
    assert shared.record.code == alone.record.code, "how it was trained is no other code"
    far = re.compile(r".+: \d+ of \d+(, [\d:]+ left)?")  # what a slow machine says
    assert not [line for line in capfd.readouterr().err.splitlines() if not far.fullmatch(line)]


def test_trainings_take_every_option_that_says_how(data, tmp_path, monkeypatch):
    from provenn.experiments.at_paper import trained

    seen = {}

    def fit(build, task, data, recipe, **options):
        seen.update(options, recipe=recipe)
        raise UserError("enough was seen")

    monkeypatch.setattr(trained, "fit", fit)
    miniature.write("genomics", data)
    card = small("titans", "genomics", recipe={"max_steps": 3, "batch_size": 4}, overrides={"dim": 16, "layers": 1})
    training = TrainingOptions(Hardware(workers=2), precision="bf16-mixed", save_every=7)
    reproduce(card, budget="paper", seeds=1, device="cpu", out=tmp_path, training=training)
    assert seen["hardware"] == Hardware("cpu", workers=2) and seen["recipe"].precision == "bf16-mixed"
    assert seen["saving"].save_every == 7 and seen["saving"].resume


def test_what_a_training_cannot_be_run_with_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="batch of 5 cannot be divided evenly among 2 processes"):
        TrainingOptions(Hardware(devices=2)).recipe_of_each(Recipe(batch_size=5))
    assert TrainingOptions(Hardware(devices=2, context_parallel=2)).recipe_of_each(Recipe(batch_size=5)).batch_size == 5
    for options, message in (({"precision": "8"}, "precision must be"), ({"save_every": 0}, "save_every must be")):
        with pytest.raises(UserError, match=message):
            TrainingOptions(**options)
    with pytest.raises(
        UserError, match="training is for the budget paper, but for its precision, got the budget smoke"
    ):
        reproduce("titans", budget="smoke", out=tmp_path, training=TrainingOptions(save_every=3))
    assert main(["reproduce", "titans", "--save-every", "3", "--out", str(tmp_path)]) == 2
    said = "provenn: --save-every is for --budget paper, got --budget small: leave it out\n"
    assert capsys.readouterr().err == said and not any(tmp_path.iterdir())


def test_the_command_line_passes_how_trainings_run(tmp_path, monkeypatch):
    from provenn.experiments import reproduce as module

    seen = {}

    def measure(cards, **options):
        seen.update(options)
        raise UserError("enough was seen")

    monkeypatch.setattr(module, "reproduce_many", measure)
    options = "--devices 2 --strategy ddp --workers 1 --precision bf16-mixed --context-parallel 2 --save-every 9"
    command = ["reproduce", "titans", "--budget", "paper", "--out", str(tmp_path), *options.split()]
    assert main([*command, "--context-method", "ulysses"]) == 2
    hardware = Hardware(devices=2, strategy="ddp", context_parallel=2, context_method="ulysses", workers=1)
    assert seen["training"] == TrainingOptions(hardware, precision="bf16-mixed", save_every=9)


def test_a_program_of_its_own_says_what_ended_it(tmp_path):
    assert in_own_program(partial(int, "7"), tmp_path) == 7
    with pytest.raises(RuntimeError, match="ValueError: invalid literal for int"):
        in_own_program(partial(int, "seven"), tmp_path)
    with pytest.raises(UserError, match="no paper"):
        in_own_program(partial(catalog.card, "nothing_of_the_kind"), tmp_path)
    with pytest.raises(UserError, match="ended with exit code 3; its checkpoints are kept: go on with --resume"):
        in_own_program(partial(os._exit, 3), tmp_path)


def test_a_program_ends_with_the_one_that_started_it(tmp_path):
    """So a training that goes on with --resume has its folder to itself."""
    code = "from functools import partial; from pathlib import Path; import sys, time\n"
    code += "from provenn.experiments.at_paper.program import in_own_program\n"
    code += "in_own_program(partial(time.sleep, 600), Path(sys.argv[1]))"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    (listing := Path(f"/proc/{parent.pid}/task/{parent.pid}/children")).exists() or pytest.skip("no /proc")
    wait_until(lambda: listing.read_text().split())
    child = int(listing.read_text())
    wait_until(lambda: b"torch" in Path(f"/proc/{child}/maps").read_bytes())
    parent.kill()
    parent.wait()
    wait_until(lambda: not Path(f"/proc/{child}").exists())


def wait_until(true: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)

"""How Wings' experiments tune and what they read off: stages, rates that count, prefixes; the router's picture."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

import provenn
from provenn.evidence import Run
from provenn.evidence.run import run_to_end
from provenn.papers.wings import experiments, studies, wings_small
from provenn.papers.wings.inspection import draw, inspect
from provenn.papers.wings.studies import MIXES, TASK, TUNING, Chat, Variant, prepared, rows, tuned
from provenn.tasks import TaskData
from provenn.training import Fit


@pytest.fixture(scope="module")
def data() -> TaskData:
    part = rows("V", 20, "train", 0)
    return TaskData("turns", part, part, part, "")


@pytest.fixture
def stages(monkeypatch) -> list[tuple]:
    """Of each stage that a tuning would train: name, epochs, rate, texts among its data, and what learns."""
    seen: list[tuple] = []

    def noted(model, planned, **options):
        for stage in planned:
            with stage.learning(model) as inside:
                learns = {name for name, p in inside.named_parameters() if p.requires_grad}
            texts = int((stage.data.train.tensors[4] == list(MIXES).index("T")).sum())
            seen.append((stage.name, stage.recipe.epochs, stage.recipe.lr, texts, learns))
        return [Fit(model, {})]

    weights = Chat(Variant("plain")).decoder.state_dict()
    monkeypatch.setattr(studies, "run_stages", noted)
    monkeypatch.setattr(studies, "taught", lambda seed, short, hardware: weights)
    return seen


def test_wings_learns_in_two_stages_and_at_once_where_that_is_asked(stages, data):
    model = tuned(partial(Chat, Variant("wings")), TASK, data, replace(TUNING, lr=0.5)).model
    names = {name for name, _ in model.named_parameters()}
    (first, alone, begin, _, some), (second, rest, rate, _, everything) = stages
    assert (first, second) == ("first", "second") and (alone, rest) == (4, 8) and TUNING.epochs == 12
    assert (begin, rate) == (3e-3, 0.5)
    assert some == {name for name in everything if name.startswith("projector.") or ".visual." in name}
    assert everything == names and any(".textual." in name for name in names - some)
    stages.clear()
    tuned(partial(Chat, Variant("wings", joint=True)), TASK, data, replace(TUNING, lr=0.5))
    assert [stage[:3] for stage in stages] == [("all", 12, 0.5)] and stages[0][4] == names


@pytest.mark.parametrize("kind", ["plain", "frozen", "lora", "prefix"])
def test_rivals_have_the_same_stages_and_the_projector_learns_first(stages, data, kind):
    tuned(partial(Chat, Variant(kind, replay=0.2 if kind == "plain" else 0.0)), TASK, data, replace(TUNING, lr=0.5))
    assert [stage[:3] for stage in stages] == [("first", 4, 3e-3), ("second", 8, 0.5)]
    assert all(name.startswith("projector.") for name in stages[0][4])
    assert [stage[3] for stage in stages] == ([4, 4] if kind == "plain" else [0, 0])
    decoder = {name for name in stages[1][4] if name.startswith("decoder.")}
    assert bool(decoder) is (kind != "frozen")


SEEN = {  # by rate, of two seeds: accuracy on pictures and on texts
    2e-4: [(0.5, 0.9), (0.6, 0.95)],
    1e-3: [(0.85, 0.6), (0.75, 0.7)],
    5e-3: [(0.95, 0.3), (0.9, 0.5)],
}


@pytest.fixture
def found(monkeypatch, tmp_path) -> Run:
    async def outcomes(run, way, rate, **changes):
        keys = ("image", "text", "text before", "shift", "drift")
        return [dict(zip(keys, (image, text, 1.0, 0.1, 0.2))) for image, text in SEEN[rate]]

    monkeypatch.setattr(experiments, "outcomes", outcomes)
    monkeypatch.setattr(experiments, "above_chance", lambda *_: [])
    return Run("wings", tmp_path, budget="smoke", seeds=(0, 1))


def test_a_seeds_best_text_is_of_rates_at_which_it_reads_pictures(found):
    assert run_to_end(experiments.frontier(found, "wings")) == ([0.6, 0.5], True)


def test_a_side_that_reads_no_pictures_at_a_seed_is_not_compared(found, monkeypatch):
    assert run_to_end(experiments.at_equal_images(found, "lora")).needs is None
    monkeypatch.setattr(experiments, "ENOUGH", 0.92)  # the first seed reads as much at 5e-3, the second nowhere
    assert run_to_end(experiments.frontier(found, "wings")) == ([0.3, 0.0], False)
    measured = run_to_end(experiments.at_equal_images(found, "lora"))
    assert (
        measured.needs == "a rate at which each seed of Wings and LoRA reads 80% of the pictures"
        and measured.seeds == [0, 1]
    )


def test_what_is_forgotten_is_the_least_of_rates_that_read_pictures_in_the_mean(found, monkeypatch):
    measured = run_to_end(experiments.forgotten(found, "plain"))
    assert measured.effect == pytest.approx((0.4 + 0.3) / 2)  # not at 2e-4, which reads 55 %
    assert measured.needs is None
    monkeypatch.setattr(experiments, "ENOUGH", 0.99)
    measured = run_to_end(experiments.forgotten(found, "plain"))
    assert measured.effect == pytest.approx((0.1 + 0.05) / 2) and measured.needs.startswith("a rate at which")


def test_a_prefix_is_seen_by_all_and_words_by_those_after_them():
    model = prepared(Variant("prefix"), Chat(Variant("plain")).decoder.state_dict()).eval()
    block = model.decoder.blocks[0]
    with torch.no_grad():
        block.attention.keys.normal_()
        block.attention.values.normal_()
        reading = model.decoder.read(torch.randn(2, 7, 48), layers=True)
        x = block.norm1(reading.layers[0])
        actual, _ = block.attention(x, reading.context)
        q, k, v = block.attention.attention.project(x, reading.context)
        k, v = (
            torch.cat([learned.expand(2, -1, -1, -1), part], dim=2)
            for learned, part in ((block.attention.keys, k), (block.attention.values, v))
        )
        count = k.shape[2] - 7
        later = torch.arange(count + 7) - count > torch.arange(7)[:, None]
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        expected = block.attention.attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert count == studies.PREFIX
    assert torch.allclose(actual, expected, atol=1e-5)


def test_the_picture_has_a_line_of_each_layer_and_shades_the_picture():
    torch.manual_seed(0)
    system = wings_small(12, 5, dim=16, layers=3, heads=2, image_size=16, rank=2, max_len=64).eval()
    x, axes = torch.randn(1, 3, 16, 16), Figure().subplots()
    draw(system, x, {}, axes)
    weights = inspect(system, x)
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines() if line.get_label() in weights}
    assert list(lines) == ["layer 1", "layer 2", "layer 3"]
    assert all((torch.as_tensor(y) == weights[name]).all() for name, y in lines.items())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["<start>", "<user>", "<assistant>"]
    assert axes.get_xticks().tolist() == [0, 1, 6]  # 2 × 2 patches between


def test_the_second_stage_goes_on_from_the_first_on_pictures_of_any_size(tmp_path):
    """The commands of the README. A picture is read at 64 pixels, else it has more tokens than the router takes."""
    talks = []
    for number in range(12):
        Image.fromarray(np.full((150, 200, 3), 20 * number, np.uint8)).save(tmp_path / f"{number}.png")
        said = [{"from": "human", "value": "<image> is it dark ?"}, {"from": "gpt", "value": ("no", "yes")[number < 6]}]
        talks.append({"image": f"{number}.png", "conversations": said})
    (tmp_path / "chat.json").write_text(json.dumps(talks))
    short = {"max_steps": 3, "warmup_steps": 0, "batch_size": 4}
    sizes = {"dim": 16, "layers": 1, "heads": 2, "rank": 2}
    first, _ = provenn.train(
        "wings", tmp_path / "chat.json", overrides={"stage": 1, **sizes}, recipe=short, out=tmp_path / "first"
    )
    second, _ = provenn.train(
        "wings",
        tmp_path / "chat.json",
        weights=first,
        two_steps=True,
        overrides={"stage": 2, **sizes},
        recipe=short,
        out=tmp_path / "second",
    )
    before, after = (load_file(folder / "weights.safetensors") for folder in (first, second))
    assert not any(".textual." in name or ".router." in name for name in before)
    new = [name for name in after if ".textual.out.up." in name or ".router.linear." in name]
    assert len(new) == 3 and all(after[name].any() for name in new)
    tower = [name for name in before if ".vision." in name]
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)  # it never learns

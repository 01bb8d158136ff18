"""The four stages: what each reads and trains, and how they are reached and resumed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import provenn
from provenn.core.errors import UserError
from provenn.nn.decoder import Decoder
from provenn.nn.towers import VisionConfig
from provenn.nn.vision_language import ImageChat
from provenn.papers.falcon import CropEncoder, Falcon, RegisterViT
from provenn.papers.falcon.training import four_stages
from provenn.tasks import TaskData, get_task
from provenn.training import Batches, Recipe

NOTHING = TaskData("nothing", *(Batches.of([]) for _ in range(3)), fingerprint="")


def chat(*, layout: str = "clip", interact: bool = True, **options) -> ImageChat:
    torch.manual_seed(0)
    vit = RegisterViT(
        VisionConfig(layout, 16, 2, 2, hidden=24, image=12, patch=4), registers=2, limit=4, interact=interact
    )
    return ImageChat(Falcon(Decoder(12, 16, 1, 2), CropEncoder(vit, **options), image_token=7))


def stages_of(model: ImageChat, **recipe) -> list:
    return four_stages(model, get_task("visual-question-answering"), NOTHING, Recipe(**{"epochs": 4, **recipe}))


def test_each_stage_reads_and_trains_what_the_paper_says():
    model = chat()
    encoder, found = model.model.vision, {}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    interact = encoder.vit.interact
    for stage in stages_of(model):
        with stage.learning(model) as inside:
            learns = {name for name, p in inside.named_parameters() if p.requires_grad}
            tower = any(".tower." in name for name in learns)
            found[stage.name] = (encoder.low_resolution, tower, any(".interact." in name for name in learns))
            assert {"model.vision.vit.registers.registers", "model.projector.linear1.weight"} <= learns
            assert "model.vision.vit.registers.rows.weight" in learns and "model.decoder.embed.weight" in learns
            assert not any("post_layernorm" in name for name in learns)  # of CLIP's class token, which nobody reads
            assert (encoder.vit.interact is None) == (stage.name != "exchange")
        assert not encoder.low_resolution and encoder.vit.interact is interact
        assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert found == {
        "alignment": (True, False, False),
        "whole": (True, True, False),
        "crops": (False, True, False),
        "exchange": (False, False, True),
    }


def test_reatten_begins_as_a_copy_of_what_the_stages_before_left():
    model = chat()
    vit = model.model.vision.vit
    *_, crops, exchange = stages_of(model)
    with crops.learning(model), torch.no_grad():
        vit.blocks[0].self_attn.q_proj.weight.fill_(0.25)
    assert (vit.interact[0].attention.q_proj.weight == 0.25).all()
    with exchange.learning(model), torch.no_grad():
        vit.interact[0].attention.q_proj.weight.fill_(0.5)
    assert (vit.interact[0].attention.q_proj.weight == 0.5).all()  # what it learned stays


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"interact": False}, ["alignment", "whole", "crops"]),
        ({"low_resolution": True}, ["alignment", "whole"]),
        ({}, ["alignment", "whole", "crops", "exchange"]),
    ],
)
def test_models_without_crops_or_exchange_have_fewer_stages_of_equal_length(options, names):
    planned = stages_of(chat(**options), epochs=12, max_steps=24)
    assert [stage.name for stage in planned] == names
    assert {stage.recipe.epochs for stage in planned} == {12 // len(names)}
    assert {stage.recipe.max_steps for stage in planned} == {24 // len(names)}
    assert {stage.recipe.epochs for stage in stages_of(chat(**options), epochs=1, max_steps=1)} == {1}


def questions_about_pictures(folder: Path) -> Path:
    """Sixteen pictures of several shapes, each with a question."""
    lines = []
    for number in range(16):
        colour = number % 2
        pixels = np.full((40 + 10 * (number % 3), 60, 3), 200 * colour, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": "is it dark ?", "answer": ("yes", "no")[colour]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "data.jsonl"


def test_one_command_trains_all_four_on_pictures_of_any_shape(tmp_path: Path):
    data = questions_about_pictures(tmp_path)
    folder, metrics = provenn.train(
        "falcon",
        data,
        preset="falcon_stages",
        overrides={"size": 64, "dim": 32, "layers": 1},
        recipe={"max_steps": 4, "warmup_steps": 0, "batch_size": 4},
        out=tmp_path / "run",
    )
    assert 0 <= metrics["accuracy"] <= 1
    run = json.loads((folder / "run.json").read_text())
    assert run["steps"] == 4 and run["preset"] == "falcon_stages"
    weights = load_file(folder / "weights.safetensors")
    copied, learned = (
        weights[f"model.vision.vit.{name}.q_proj.weight"]
        for name in ("tower.encoder.layers.0.self_attn", "interact.0.attention")
    )
    assert 0 < (learned - copied).abs().max() < 0.1  # one step away from the layer that it was copied from


def test_a_training_that_ends_in_its_last_stage_goes_on_as_if_it_had_not(tmp_path: Path, monkeypatch):
    """ReAtten is then what it was a step before, and no copy again."""
    data, features, seen = questions_about_pictures(tmp_path), Falcon.features, []

    def train(name: str, **options) -> dict[str, torch.Tensor]:
        folder, _ = provenn.train(
            "falcon",
            data,
            preset="falcon_stages",
            overrides={"size": 64, "dim": 32, "layers": 1},
            recipe={"max_steps": 12, "warmup_steps": 0, "batch_size": 4},
            out=tmp_path / name,
            save_every=1,
            **options,
        )
        return load_file(folder / "weights.safetensors")

    def breaks_off(model, images, grids=None):
        seen.extend([None] * model.training)
        if len(seen) == 12:
            raise KeyboardInterrupt
        return features(model, images, grids)

    whole = train("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Falcon, "features", breaks_off)
        train("broken")
    again = train("broken", resume=True)
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_epochs_and_steps_that_stages_do_not_divide_are_all_trained():
    assert [stage.recipe.epochs for stage in stages_of(chat(), epochs=6)] == [2, 2, 1, 1]
    assert [stage.recipe.epochs for stage in stages_of(chat(interact=False), epochs=5)] == [2, 2, 1]
    assert [stage.recipe.max_steps for stage in stages_of(chat(), max_steps=7)] == [2, 2, 2, 1]
    with pytest.raises(UserError, match="a training in 4 stages takes at least 4 epochs, one a stage, got 3"):
        stages_of(chat(), epochs=3)

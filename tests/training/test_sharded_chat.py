"""Wings whose weights are divided: two processes train as one, and hold what was counted on paper."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sharded_chat import RECIPE, Noted, build, load

import provenn
from provenn.distributed.shards import held_bytes
from provenn.training import fit


@pytest.fixture
def questions(tmp_path):
    """Questions about twelve pictures, each answered in one word."""
    lines = []
    for number in range(12):
        Image.fromarray(np.full((16, 16, 3), 20 * number, np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(
            {"image": f"{number}.png", "question": "what is it ?", "answer": "dark" if number < 6 else "light"}
        )
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_two_processes_that_divide_a_small_wings_train_as_one(questions, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    program = str(Path(__file__).with_name("sharded_chat.py"))
    done = subprocess.run(
        [sys.executable, program, str(out), str(questions)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    state, metrics, held = torch.load(out / "result.pt", weights_only=True)
    data = load(questions)
    alone = fit(lambda: build(data), Noted(), data, replace(RECIPE, batch_size=4))
    start = {name: p for name, p in alone.model.named_parameters() if not p.requires_grad}
    assert any(name.startswith("model.vision.") for name in start), "the tower is frozen"
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
    assert metrics == pytest.approx(alone.metrics, rel=1e-3)
    on_paper = held_bytes(build(data), 2)
    assert held == {"weights": on_paper.weights, "gradients": on_paper.gradients}
    assert held["weights"] < 0.55 * held_bytes(build(data), 1).weights


@pytest.mark.parametrize(("slug", "preset"), [("wings", "wings_qwen1_5_7b"), ("falcon", "falcon_8b")])
def test_large_presets_are_divided_on_paper(slug, preset):
    card = provenn.paper(slug)
    with torch.device("meta"):
        model = card.build(preset)
    every, learned = (sum(p.nbytes for p in model.parameters() if p.requires_grad or which) for which in (True, False))
    for processes in (1, 8, 64):
        held = held_bytes(model, processes)
        for part, whole in ((held.weights, every), (held.gradients, learned), (held.moments, 2 * learned)):
            assert whole / processes <= part < 1.01 * whole / processes
        assert held.gathered == every + learned and held.most == sum(held)


def test_a_number_of_processes_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        held_bytes(torch.nn.Linear(2, 2), 0)

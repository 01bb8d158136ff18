"""`provenn train --freeze` and `--checkpointing`: what does not learn, and what is computed again."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import provenn
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.nn import decoder, towers

SMALL = {"size": 16, "dim": 16, "layers": 2, "heads": 2, "rank": 2, "max_len": 64}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Questions about six pictures."""
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for number in range(6):
        Image.fromarray(np.full((16, 16, 3), 40 * number, np.uint8)).save(folder / f"{number}.png")
        lines.append(
            {"image": f"{number}.png", "question": "what is it ?", "answer": "dark" if number < 3 else "light"}
        )
    file = folder / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def command(questions, out, *more, slug="wings"):
    sizes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    return ["train", slug, "--data", str(questions), "--steps", "2", "-o", str(out), *sizes, *more]


@pytest.fixture
def repeated(monkeypatch):
    """The blocks that run under a checkpoint."""
    blocks = []
    for module in (decoder, towers):
        plain = module.checkpoint
        monkeypatch.setattr(
            module,
            "checkpoint",
            lambda block, *given, plain=plain, **o: (blocks.append(block), plain(block, *given, **o))[1],
        )
    return blocks


def test_named_parameters_stay_and_activations_are_computed_again(questions, tmp_path, repeated):
    more = ("--freeze", "model.vision", "--freeze", "*.norm1.*")
    assert main(command(questions, tmp_path / "kept", *more)) == 0
    assert not repeated
    assert main(command(questions, tmp_path / "again", *more, "--checkpointing")) == 0
    assert {type(block).__name__ for block in repeated} == {"WingsBlock", "Block"}
    kept, again = (load_file(tmp_path / run / "weights.safetensors") for run in ("kept", "again"))
    assert all(torch.equal(kept[name], again[name]) for name in kept), "the same values in less memory"
    model, label = provenn.paper("wings").load(tmp_path / "kept")
    torch.manual_seed(0)
    start = provenn.paper("wings").build("wings_small", **label.options).state_dict()
    stayed = {name for name in kept if torch.equal(kept[name], start[name])}
    frozen = {name for name in kept if name.startswith("model.vision.") or ".norm1." in name}
    assert frozen and frozen <= stayed
    learned = dict(model.named_parameters()).keys() - stayed
    assert any("projector" in name for name in learned) and any("attention" in name for name in learned)
    words = shlex.split(json.loads((tmp_path / "again" / "run.json").read_text())["trained_on"]["command"])
    assert [words[k + 1] for k, word in enumerate(words) if word == "--freeze"] == ["model.vision", "*.norm1.*"]
    assert "--checkpointing" in words


def test_a_training_goes_on_with_what_it_froze(questions, tmp_path, capsys):
    given = dict(preset="wings_small", overrides=SMALL, out=tmp_path / "run")
    provenn.train("wings", questions, recipe={"epochs": 1}, freeze="model.vision", **given)
    for freeze in ((), ("model.decoder",)):
        with pytest.raises(UserError, match="started with another --freeze: resume with the same"):
            provenn.train("wings", questions, recipe={"epochs": 2}, freeze=freeze, resume=True, **given)
    provenn.train("wings", questions, recipe={"epochs": 2}, freeze="model.vision", resume=True, **given)


@pytest.mark.parametrize(
    ("slug", "more", "message"),
    [
        ("wings", ("--freeze", "nowhere"), "no parameter is called 'nowhere'; there are model.vision, model.projector"),
        ("wings", ("--freeze", "*"), "nothing to train, Wings has no parameters that need a gradient"),
        ("eca_net", ("--checkpointing",), "has no blocks whose activations can be computed again"),
        (
            "falcon",
            ("--preset", "falcon_stages", "--freeze", "model"),
            "falcon_stages has stages of its own, which say",
        ),
    ],
)
def test_what_cannot_be_frozen_or_repeated_is_said_in_a_line(questions, tmp_path, capsys, slug, more, message):
    words = command(questions, tmp_path / "run", *more, slug=slug)
    if slug == "eca_net":
        words = ["train", slug, "--data", "digits", "--steps", "1", "-o", str(tmp_path / "run"), *more]
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if line.startswith("provenn:") or message in line]) == 1 and message in said[-1]

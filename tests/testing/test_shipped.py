"""Weights that ship: they are there, they are found, and what they say of themselves is so."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import provenn
from provenn.catalog import cards, read_card
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.inference.train import train
from provenn.testing import FailedCheck, checks_of
from provenn.training import weights

# That each file keeps its metric, tests/test_common_checks.py asks.
SHIPPED = [(slug, preset) for slug, card in cards().items() for preset in card.shipped]


def test_every_paper_with_a_system_ships_weights():
    """But where the system itself has none, as one that joins models; the small ones that it joins ship elsewhere."""
    ours = {slug: card for slug, card in cards().items() if card.package.startswith("provenn.")}
    without = {slug for slug, card in ours.items() if card.presets and not card.shipped}
    assert not {slug for slug in without if list(provenn.paper(slug).build().parameters())}


@pytest.mark.parametrize("slug, preset", SHIPPED)
def test_a_pretrained_system_is_the_one_in_the_file(slug: str, preset: str):
    paper = provenn.paper(slug)
    model = paper.build(preset, pretrained=True)
    state, label = weights.read(paper.card.shipped[preset])
    assert label is not None and not model.training
    own = model.state_dict()
    assert all(torch.equal(own[name], value.to(own[name].dtype)) for name, value in state.items())
    fresh = paper.build(preset, **label.options).state_dict()
    assert any(not torch.equal(own[name], fresh[name]) for name in state)


def test_a_pretrained_system_takes_no_other_options():
    paper = provenn.paper("eca_net")
    assert paper.build(pretrained=True, num_classes=10) is not None
    with pytest.raises(UserError, match="eca_resnet20 were trained with num_classes = 10, got 7"):
        paper.build("eca_resnet20", pretrained=True, num_classes=7)
    with pytest.raises(UserError, match="no weights of eca_resnet50 come with eca_net; there are some of eca_resnet20"):
        paper.build("eca_resnet50", pretrained=True)


def said(capsys: pytest.CaptureFixture, line: str) -> tuple[str, str]:
    code = main(shlex.split(line))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def test_photographs_are_enlarged_better_than_by_bicubic(tmp_path, capsys):
    """On one that it was not trained on: the flower, of which a half is enlarged."""
    from provenn.data.photographs import photograph
    from provenn.tasks.super_resolution import degrade, enlarge, psnr

    sharp = torch.from_numpy(photograph("flower")[100:228, 200:328].copy()).permute(2, 0, 1)
    small = degrade(sharp, 2)
    Image.fromarray(small.permute(1, 2, 0).numpy().astype(np.uint8)).save(tmp_path / "small.png")
    _, err = said(capsys, f"predict craft {tmp_path}/small.png -o {tmp_path}/x2.png")
    assert err.startswith("with the weights that ship: craft_small, trained on photographs (psnr ")
    ours = torch.from_numpy(np.array(Image.open(tmp_path / "x2.png"))).permute(2, 0, 1)
    assert psnr(ours, sharp, border=2) > psnr(enlarge(small, 2), sharp, border=2)


def test_a_series_of_the_users_own_is_forecast(tmp_path, capsys):
    series = [f"{100 + 10 * np.sin(i * np.pi / 6):.3f}" for i in range(60)]
    (tmp_path / "mine.csv").write_text("\n".join(["sales", *series]))
    out, err = said(capsys, f"predict aaren {tmp_path}/mine.csv")
    assert "with the weights that ship: aaren_forecaster" in err and "sales forecast one by one" in err
    ahead = [float(line.split()[1]) for line in out.strip().splitlines()[1:]]
    assert ahead and all(50 < value < 150 for value in ahead)


@pytest.mark.parametrize("slug, preset", [("rat", "rat_small"), ("titans", "titans_lmm_small")])
def test_words_go_on(slug, preset, capsys):
    out, err = said(capsys, f"predict {slug} 'def ' --set tokens=20")
    assert err.startswith(f"with the weights that ship: {preset}, trained on stdlib") and len(out) > 20


def test_the_other_verbs_take_them_too(tmp_path, capsys):
    out, err = said(capsys, "evaluate eca_net --data digits")
    assert "accuracy" in out and err.startswith("with the weights that ship: eca_resnet20, trained on digits (accuracy")
    assert "the test split of digits" in out.replace("\n", " ")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    out, err = said(capsys, f"inspect eca_net {tmp_path}/a.png")
    assert "eca_resnet20 (the weights that ship) on a.png" in out and "random" not in err
    said(capsys, f"inspect eca_net {tmp_path}/a.png --preset eca_resnet18")
    assert "trained on digits (accuracy" in said(capsys, "show eca_net")[0].replace("\n", " ")


def test_a_run_says_how_it_was_trained_and_the_command_trains_the_same_weights(tmp_path):
    given = {"recipe": {"max_steps": 2, "batch_size": 8, "lr": 0.01, "ema": 0.9}, "seed": 3, "out": tmp_path / "first"}
    folder, metrics = train("aaren", "airline", preset="aaren_forecaster", overrides={"horizon": 3, "dim": 8}, **given)
    state, label = weights.read(folder)
    assert label is not None and label.metrics == metrics and label.trained_on["recipe"]["max_steps"] == 2
    assert main([*shlex.split(label.trained_on["command"])[1:], "--out", str(tmp_path / "again")]) == 0
    again, other = weights.read(tmp_path / "again")
    assert other == label and all(torch.equal(state[name], again[name]) for name in state)


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    """A copy of a paper's facts with a weight file to spoil: (card, file, state, label)."""
    original = cards()["eca_net"]
    folder = tmp_path / "eca_net"
    (folder / "weights").mkdir(parents=True)
    (folder / "paper.toml").write_text((original.folder / "paper.toml").read_text())
    file = folder / "weights" / "eca_resnet20.safetensors"
    state, label = weights.read(original.shipped["eca_resnet20"])
    return read_card(folder, original.package, "eca_net"), file, state, label


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda label: {}, ""),
        (lambda label: {"metrics": {"accuracy": 0.9}}, r"accuracy is 0\.\d+, it says 0\.9"),
        (lambda label: {"metrics": {}}, "does not say its accuracy"),
        (lambda label: {"preset": "eca_resnet18"}, "says that it is of eca_net, eca_resnet18"),
        (lambda label: {"trained_on": {**label.trained_on, "command": None}}, "does not say of its training: command"),
        (lambda label: {"trained_on": {"seed": 0}}, "does not say of its training: command, data, recipe"),
    ],
)
def test_a_label_that_is_not_so_is_caught(gallery, spoil, complaint):
    card, file, state, label = gallery
    model = provenn.paper("eca_net").build("eca_resnet20", **label.options)
    weights.load_into(model, state, "it")
    weights.save(model, file, replace(label, **spoil(label)))
    check = checks_of(card)["eca_net weights/eca_resnet20.safetensors"]
    if not complaint:
        return check()
    with pytest.raises(FailedCheck, match=rf"eca_net weights/eca_resnet20\.safetensors\n  {complaint}"):
        check()


def test_weights_that_learned_nothing_or_lie_wrongly_are_caught(gallery):
    card, file, _, label = gallery
    torch.manual_seed(0)
    model = provenn.paper("eca_net").build("eca_resnet20", **label.options).eval()
    wrong = {**label.trained_on, "fingerprint": "of other data", "command": "provenn train …"}
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    weights.save(model, file, replace(label, trained_on=wrong))
    with pytest.raises(FailedCheck, match="without having learned anything"):
        checks_of(card)["eca_net weights/eca_resnet20.safetensors"]()
    file.rename(file.with_stem("eca_resnet21"))
    with pytest.raises(FailedCheck, match="is not called PRESET"):
        checks_of(card)["eca_net weights/eca_resnet21.safetensors"]()
    (file.parent / "large.bin").write_bytes(bytes(2 * 10**6 + 1))
    with pytest.raises(FailedCheck, match="2,000,001 bytes; at most 2,000,000"):
        checks_of(card)["eca_net weights/large.bin"]()

import json
import os
from dataclasses import fields

import jaxtyping
import pytest
import torch

import provenn
from provenn import catalog
from provenn.core.errors import UserError
from provenn.core.settings import arguments_of
from provenn.inference.train import TrainOptions
from provenn.training import Hardware, Saving, weights

pytestmark = pytest.mark.usefixtures("third_party")


def test_papers_are_listed_and_found_by_name():
    assert [paper.card.slug for paper in provenn.papers()] == list(catalog.cards())
    assert provenn.paper("Tiny-Gate").card.title == "Tiny Gates: A Third Party's Paper"
    assert "tiny_gate" not in dir(provenn) and {"paper", "papers", "train", "swap"} <= set(dir(provenn))
    with pytest.raises(AttributeError, match="no attribute 'pape'"):
        provenn.pape  # noqa: B018
    with pytest.raises(UserError, match="did you mean 'tiny_gate'"):
        provenn.paper("tiny_gait")
    assert repr(provenn.paper("tiny_gate")) == "provenn.paper('tiny_gate')"


def test_a_name_that_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match="named by a string, its slug or arXiv number, got 3"):
        provenn.paper(3)  # type: ignore[arg-type]


def test_a_training_that_did_not_end_is_not_overwritten(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"hours of work")
    with pytest.raises(UserError, match="holds a training that did not end: go on with --resume"):
        provenn.train("tiny_gate", "digits", out=tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == b"hours of work"


def test_two_trainings_in_one_folder_are_refused_and_name_who_was_first(tmp_path):
    from provenn.core.files import LOCK, alone_in

    folder = tmp_path / "run"
    with (
        alone_in(folder),
        pytest.raises(UserError, match=rf"another process is writing .*\(process {os.getpid()} on .*choose another"),
    ):
        provenn.train("tiny_gate", "digits", out=folder, overrides={"in_channels": 1})
    assert not list(folder.iterdir())
    (folder / LOCK).write_text("process 1 on another machine")  # what a killed one leaves behind
    with alone_in(folder):
        assert str(os.getpid()) in (folder / LOCK).read_text()


def test_a_training_that_another_process_is_at_is_not_called_broken_off(tmp_path):
    from provenn.core.files import alone_in

    (tmp_path / "last.ckpt").write_bytes(b"hours of work")
    with alone_in(tmp_path), pytest.raises(UserError, match="another process is writing"):
        provenn.train("tiny_gate", "digits", out=tmp_path)


def test_a_system_is_built_with_its_options_and_the_user_s():
    paper = provenn.paper("tiny_gate")
    assert paper.build()[-1].out_features == 4  # the card's example
    assert paper.build("tiny_large", num_classes=7)[-1].out_features == 7
    with pytest.raises(UserError, match=r"tiny_small of tiny_gate: .*'classes'; it takes: num_classes, in_channels"):
        paper.build(classes=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, r"tiny_small of tiny_gate: num_classes must not be negative, got -1$"),
        ({"num_classes": "ten"}, r"tiny_small of tiny_gate: cannot be built with num_classes='ten': "),
    ],
)
def test_a_value_that_nothing_can_be_built_with_is_named(monkeypatch, options, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match=message) as error:
        provenn.paper("tiny_gate").build(**options)
    assert "\n" not in str(error.value)


def test_experiments_are_measured_from_python(tmp_path):
    found = provenn.reproduce("tiny_gate", experiments="parameters", out=tmp_path)
    assert [(finding.experiment.id, str(finding.verdict)) for finding in found] == [("parameters", "verified")]


def test_what_was_trained_is_what_is_loaded(tmp_path):
    folder, metrics = provenn.train("tiny_gate", "digits", out=tmp_path / "run", recipe={"epochs": 2})
    assert 0 <= metrics["accuracy"] <= 1
    model, label = provenn.paper("tiny_gate").load(folder)
    assert not model.training and label.options == {"num_classes": 10, "in_channels": 1}
    run = json.loads((folder / "run.json").read_text())
    assert run["metrics"] == metrics and run["recipe"]["epochs"] == 2 and len(run["curve"]) == 2
    assert run["fingerprint"] and run["data"] == "digits" and run["version"] == provenn.__version__
    again, _ = provenn.train("tiny_gate", "digits", out=tmp_path / "again", recipe={"epochs": 2})
    states = [provenn.paper("tiny_gate").load(place)[0].state_dict() for place in (folder, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_author_s_checkpoint_is_recognised(site, tmp_path):
    (site / "tiny_gate" / "official.py").write_text(
        "def convert(state):\n"
        "    classes = len(state['head.bias'])\n"
        "    ours = {'0.weight': 'gate', '3.weight': 'head.weight', '3.bias': 'head.bias'}\n"
        "    return 'tiny_small', {'num_classes': classes}, {name: state[old] for name, old in ours.items()}\n"
    )
    torch.manual_seed(0)
    theirs = {"gate": torch.rand(3), "head.weight": torch.rand(5, 3), "head.bias": torch.rand(5)}
    torch.save({"state_dict": {f"module.{name}": value for name, value in theirs.items()}}, tmp_path / "theirs.pth")
    model = provenn.from_official("tiny_gate", tmp_path / "theirs.pth")
    x = torch.rand(2, 3, 4, 4)
    expected = (x * theirs["gate"][:, None, None]).mean((2, 3)) @ theirs["head.weight"].T + theirs["head.bias"]
    assert torch.allclose(model(x), expected)
    _, label = provenn.paper("tiny_gate").load(tmp_path / "theirs.pth")
    assert label.preset == "tiny_small" and len(label.meta["classes"]) == 5


def test_inspecting_leaves_the_generator_alone(tmp_path):
    from PIL import Image

    Image.new("RGB", (9, 9), (255, 0, 128)).save(tmp_path / "a.png")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = provenn.inspect("tiny_gate", tmp_path / "a.png")
    assert torch.equal(torch.rand(1), expected) and found.layers["0"].shape == (3,)
    assert found.table().rows[0][:2] == ["0", 3]


@pytest.mark.parametrize("count", [1, 3, 5, 16])
def test_an_inspection_draws_every_layer(count):
    from provenn.inference.inspection import Inspection

    figure = Inspection("title", "caption", {f"layer{i}": torch.rand(4 + i) for i in range(count)}).picture()
    drawn = [axes for axes in figure.axes if axes.lines]
    assert [len(axes.lines[0].get_ydata()) for axes in drawn] == [4 + i for i in range(count)]
    assert all(not axes.axison for axes in figure.axes if axes not in drawn)


def test_an_inspection_that_draws_itself_has_no_lines(site, tmp_path):
    from PIL import Image

    (site / "tiny_gate" / "inspection.py").write_text(
        "def inspect(model, x):\n"
        '    """What it is."""\n'
        "    return {'0': x[0, :, 0, 0]}\n"
        "def draw(model, x, meta, axes):\n"
        "    axes.imshow(x[0, 0]); axes.set_title(meta['classes'][0])\n"
    )
    Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
    found = provenn.inspect("tiny_gate", tmp_path / "a.png")
    (axes,) = found.picture().axes
    assert len(axes.images) == 1 and not axes.lines and axes.get_title()
    found.save(tmp_path / "b.png")
    assert Image.open(tmp_path / "b.png").size[0] > 500


def test_weights_and_label_come_back(tmp_path):
    model = provenn.paper("tiny_gate").build()
    label = weights.Label(
        "tiny_gate", "tiny_small", "image-classification", {"num_classes": 4}, {"classes": ["é"]}, "1"
    )
    weights.save(model, tmp_path / "deep" / "w.safetensors", label)
    state, again = weights.read(tmp_path / "deep" / "w.safetensors")
    assert again == label and all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["w.safetensors"]
    assert (tmp_path / "deep" / "w.safetensors").stat().st_mode & 0o777 == 0o644


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(3, 2)
        self.head = torch.nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_are_saved_once_and_loaded_twice(tmp_path):
    torch.manual_seed(0)
    model, fresh = Tied(), Tied()
    weights.save(model, tmp_path / "w.safetensors", weights.Label("p", "q", "t"))
    state, _ = weights.read(tmp_path / "w.safetensors")
    assert len(state) == 1
    weights.load_into(fresh, state, "w.safetensors")
    assert torch.equal(fresh.head.weight, model.head.weight) and fresh.head.weight is fresh.embedding.weight


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda state: state.pop("3.bias"), "lacks 3.bias"),
        (lambda state: state.update(more=torch.ones(1)), "has unknown more"),
        (lambda state: state.update({"0.weight": torch.ones(9)}), r"0.weight is \[9\] where the model has \[3\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(change, says):
    model = provenn.paper("tiny_gate").build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    change(state)
    with pytest.raises(UserError, match=f"a file does not fit this model: .*{says}"):
        weights.load_into(model, state, "a file")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrapper", [*weights.WRAPPERS, None])
def test_a_state_dict_is_found_inside_a_checkpoint(tmp_path, wrapper):
    state = {"module.a": torch.ones(1), "module.b": torch.zeros(2)}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "c.pt")
    read, label = weights.read(tmp_path / "c.pt")
    assert label is None and set(read) == {"a", "b"}


def test_changes_reach_the_data_and_the_system_by_name(tmp_path):
    overrides = {"context": 12, "horizon": 3, "dim": 16}
    folder, _ = provenn.train(
        "aaren",
        "airline",
        task="series-forecasting",
        out=tmp_path / "run",
        device="cpu",
        overrides=overrides,
        recipe={"epochs": 1},
    )
    _, label = provenn.paper("aaren").load(folder)
    assert {name: label.options[name] for name in overrides} == overrides


def test_a_change_of_what_does_not_exist_says_what_does(tmp_path):
    with pytest.raises(UserError, match=r"nothing here is called 'horizn'.*horizon.*dim"):
        provenn.train(
            "aaren", "airline", task="series-forecasting", out=tmp_path / "run", overrides={"horizn": 3}, device="cpu"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"horizon": "soon"}, "horizon: .*valid integer.*'soon'"),
        ({"dim": "wide"}, "dim: .*valid integer.*'wide'"),
        ({"dim": 30, "heads": 4}, "heads must divide dim"),
    ],
)
def test_a_change_that_cannot_be_is_one_line(tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        provenn.train(
            "aaren", "airline", task="series-forecasting", out=tmp_path / "run", overrides=change, device="cpu"
        )


def test_what_can_be_set_of_a_preset_that_is_a_partial_is_what_the_whole_takes():
    vit, translator = (catalog.card("nprf").resolve(f"model:{name}") for name in ("nprf_vit_tiny", "Translator"))
    assert {"dropout", "num_classes"} <= arguments_of(vit, but=()).keys()
    assert arguments_of(vit, but=())["dim"] is arguments_of(translator, but=())["dim"] is int


def test_train_takes_every_option_of_hardware_and_saving_and_no_other(tmp_path):
    """So that none is lost on the way; the folder is called `out`; what begins and saves a model is train's own."""
    taken = {field.name for options in (Hardware, Saving) for field in fields(options)} - {"folder", "save"}
    assert set(TrainOptions.__annotations__) == taken | {"out", "weights", "two_steps", "freeze", "checkpointing"}
    said = r"no option 'devces', did you mean 'devices'\?; it has: weights, two_steps, freeze, "
    with pytest.raises(UserError, match=said):
        provenn.train("tiny_gate", "digits", out=tmp_path / "run", devces=2)
    with pytest.raises(UserError, match="strategy must be one of auto, ddp, fsdp, got 'dp'"):
        provenn.train("tiny_gate", "digits", out=tmp_path / "run", strategy="dp")
    assert not (tmp_path / "run").exists()


def test_what_may_be_set_at_use_is_an_argument_of_the_preset():
    for paper in provenn.papers():
        for preset in paper.card.presets:
            assert set(preset.at_use) <= set(arguments_of(paper.card.resolve(preset.build))), preset.name

"""Weight files: what is saved comes back with its label, what could run code or does not fit is refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from provenn.core.errors import UserError
from provenn.training import weights

LABEL = weights.Label(
    "aaren", "classifier", "series-classification", {"channels": 2}, {"classes": ["a", "ß"], "mean": [0.1, 1e-9]}, "0.1"
)


class Tied(nn.Module):
    """Two names for one matrix, a counter and a normalisation's buffers."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.norm = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Tied()
    made(torch.randn(8, 4))  # the running statistics move
    return made.eval()


def test_safetensors_bring_back_every_bit_and_the_label(tmp_path, model):
    file = tmp_path / "run" / weights.FILE
    weights.save(model, file, LABEL)
    state, label = weights.read(file)
    assert label == LABEL
    other = Tied().eval()
    weights.load_into(other, state, "file")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert other.second.weight is other.first.weight
    assert [f.name for f in file.parent.iterdir()] == [weights.FILE], "nothing half-written stays"
    assert weights.read(file.parent)[1] == LABEL, "a run's folder stands for its file"


def test_a_failed_write_leaves_the_old_file(tmp_path, model, monkeypatch):
    file = tmp_path / weights.FILE
    weights.save(model, file, LABEL)
    before = file.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"cannot write .*weights\.safetensors: disk full"):
        weights.save(Tied(), file, LABEL)
    assert file.read_bytes() == before


@pytest.mark.parametrize("wrapper", [None, *weights.WRAPPERS])
def test_plain_checkpoints_are_unwrapped(tmp_path, model, wrapper):
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "a.pth")
    read, label = weights.read(tmp_path / "a.pth")
    assert label is None and list(read) == list(model.state_dict())


def test_a_state_alone_under_a_name_of_its_authors_is_unwrapped(tmp_path, model):
    torch.save({"MyNet": model.state_dict()}, tmp_path / "a.pth")
    assert list(weights.read(tmp_path / "a.pth")[0]) == list(model.state_dict())
    torch.save({"MyNet": model.state_dict(), "other": {}}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="expected a state dict of tensors"):
        weights.read(tmp_path / "b.pth")


class Code:
    """A pickle that would leave a file behind when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"state_dict": {"w": torch.ones(1)}, "more": Code(trace)}, tmp_path / "a.pth")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(Code(trace)))
    torch.save(nn.Linear(1, 1), tmp_path / "c.pt")
    for name in ("a.pth", "b.pkl", "c.pt"):
        with pytest.raises(UserError, match="refused") as error:
            weights.read(tmp_path / name)
        assert "\n" not in str(error.value) and "could run code" in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.pth", b"", "no torch checkpoint, or damaged"),
        ("a.pth", b"PK\x03\x04 cut off", "no torch checkpoint, or damaged"),
        ("a.txt", b"hello", "no torch checkpoint, or damaged"),
        ("a.safetensors", b"", "no readable safetensors file"),
        ("a.safetensors", b"\xff" * 64, "no readable safetensors file"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        weights.read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_cut_off_safetensors_is_refused(tmp_path, model):
    weights.save(model, tmp_path / weights.FILE, LABEL)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / weights.FILE).read_bytes()[:-10])
    with pytest.raises(UserError, match="no readable safetensors file"):
        weights.read(tmp_path / "cut.safetensors")


def test_what_holds_no_tensors_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(UserError, match="expected a state dict of tensors, got list"):
        weights.read(tmp_path / "a.pth")


def test_missing_files_and_folders_say_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"holds no weights\.safetensors"):
        weights.read(tmp_path)
    with pytest.raises(UserError, match="no weights at"):
        weights.read(tmp_path / "none.pth")


def test_a_folder_of_hugging_face_is_read_with_all_its_shards_and_its_config(tmp_path, model):
    config = {"model_type": "other", "heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has no weights: expected model\.safetensors"):
        weights.read_foreign(tmp_path)
    state = {name: value for name, value in model.state_dict().items() if name != "second.weight"}
    shards = {name: f"model-{k % 2}.safetensors" for k, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({name: state[name] for name in state if shards[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert weights.label_of(tmp_path) is None
    read = weights.read_foreign(tmp_path)
    assert read.config == config and read.label is None and read.state.keys() == state.keys()
    assert all(torch.equal(read.state[name], value) for name, value in state.items())
    # Of a file that is given in the folder's place, the config beside it is read as well.
    for name, write in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        write(state, tmp_path / name)
        read = weights.read_foreign(tmp_path / name)
        assert read.config == config and read.state.keys() == state.keys()
    torch.save({"state_dict": state, "opt": {"heads": 4}}, tmp_path / "pytorch_model.bin")
    assert weights.read_foreign(tmp_path / "pytorch_model.bin").config == {"heads": 4}, "its own config comes first"
    # A run's folder stays one, whatever else lies in it.
    weights.save(model, tmp_path / weights.FILE, LABEL)
    assert weights.read(tmp_path)[1] == LABEL
    save_file(state, tmp_path / "model.safetensors")
    assert weights.read_foreign(tmp_path / "model.safetensors").config == {}


def test_weights_that_do_not_fit_name_the_first_difference(model):
    state = dict(model.state_dict())
    with pytest.raises(UserError, match=r"first\.weight is \[4, 4\] where the model has \[5, 5\]"):
        weights.load_into(Tied(5), state, "a.pth")
    state.pop("norm.bias")
    with pytest.raises(UserError, match=r"a\.pth does not fit this model: lacks norm\.bias; has unknown extra"):
        weights.load_into(Tied(), {**state, "extra": torch.ones(1)}, "a.pth")


def test_numbers_that_are_none_are_refused_and_an_infinite_constant_is_not(model):
    model.register_buffer("hidden", torch.full((2,), -torch.inf))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    weights.load_into(model, state, "a.pth")
    for bad in (torch.nan, torch.inf):
        spoiled = {**state, "norm.bias": torch.full_like(state["norm.bias"], bad)}
        with pytest.raises(UserError, match=r"a\.pth: norm\.bias holds values that are no finite numbers"):
            weights.load_into(model, spoiled, "a.pth")


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("no JSON", "its label is no JSON"),
        ("[" * 100_000, "its label is no JSON"),
        ("[1]", "its label cannot be read: the whole"),
        ('{"paper": "a", "preset": "b"}', "its label cannot be read: task: Field required"),
        ('{"paper": "a", "preset": "b", "task": "c", "options": [1]}', "its label cannot be read: options"),
    ],
)
def test_a_label_of_another_form_is_refused_in_one_line(tmp_path, label, says):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {weights.KEY: label})
    with pytest.raises(UserError, match=says) as error:
        weights.read(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)

"""No answer is made of what is no finite number: the weights, the layer or the input are named in one line."""

import json
import shlex
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import provenn
from provenn import catalog
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.core.finite import check_answer, finite_outputs, is_finite
from provenn.inference.evaluation import Evaluation
from provenn.tasks import face_of
from provenn.training import weights
from provenn.web import worker

SHIPPED = [(slug, preset) for slug, card in catalog.cards().items() for preset in card.shipped]
# One shows nothing.
INSPECTED = [pair for pair in SHIPPED if catalog.card(pair[0]).has("inspection") and pair[1] != "draft_tiny"]
INPUTS = {  # of each kind of work: what is given, and where the answer goes
    "series-forecasting": ("series.csv", "answer.csv"),
    "audio-classification": ("sound.wav", "answer.csv"),
    "graph-regression": ("graph.jsonl", "answer.csv"),
    "image-generation": ("3", "answer.png"),
    "image-editing": ("image.png", "answer.png"),
    "image-classification": ("image.png", "answer.csv"),
    "object-detection": ("image.png", "answer.json"),
    "semantic-segmentation": ("image.png", "answer.png"),
    "super-resolution": ("image.png", "answer.png"),
    "language-modelling": ("words", "answer.txt"),
    "accelerated-language-modelling": ("words", "answer.txt"),
    "pansharpening": ("ms.npy pan.npy", "answer.npy"),
    "image-compression": ("image.png", "answer.s2l"),
    "spectra-regression": ("spectra.npy", "answer.csv"),
    "wound-segmentation": ("image.png", "answer.png"),
    "event-video": ("events.txt", "answer.npy"),
    "volume-segmentation": ("image.png", "answer.png"),
    "fine-grained": ("image.png", "answer.csv"),
    "re-identification": ("image.png", "answer.csv"),
    "batch-recognition": ("image.png", "answer.csv"),
    "image-text-retrieval": ("image.png", "answer.csv"),
    "anomaly-detection": ("image.png", "answer.csv"),
    "multimodal-chat": ("image.png", "answer.csv"),
    "visual-question-answering": ("image.png", "answer.csv"),
    "scene-question-answering": ("room.ply", "answer.csv"),
    "region-context-questions": ("image.png", "answer.csv"),
}
QUESTION = "what colour is the disc ?"
ASKED = "remove the seven"
REGIONS = "digit (5,5,15,20): it cost 25 coins . / what did the red two cost ?"
MORE = {  # of `predict` alone
    "re-identification": " --gallery people",
    "image-text-retrieval": " --texts words",
    "multimodal-chat": f" '{QUESTION}'",
    "visual-question-answering": f" '{QUESTION}'",
    "image-editing": f" '{ASKED}'",
    "scene-question-answering": f" '{QUESTION}'",
    "region-context-questions": f" '{REGIONS}'",
}
# Of `inspect` alone.
WORDS = {"image-text-retrieval": " 'a red disc'", "scene-question-answering": f" '{QUESTION}'"}
TRIED = {  # in the browser, where that is something else
    "pansharpening": "image.png",
    "event-video": "image.png",
    "image-text-retrieval": "words",
    "scene-question-answering": "points.csv",
}
TYPED = {  # there, beside a file or in place of one
    "image-generation": {"classes": ["3"], "seed": 0},
    "image-editing": {"question": ASKED, "seed": 0},
    "multimodal-chat": {"question": QUESTION},
    "visual-question-answering": {"question": QUESTION},
    "scene-question-answering": {"question": QUESTION},
    "region-context-questions": {"question": REGIONS},
}
# A factor under which every parameter has a square in float32, and every model that ships runs out of its range.
FACTOR, BOUND = 1e18, 1e19


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A file for each kind of work."""
    folder = tmp_path_factory.mktemp("inputs")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / "image.png")
    (folder / "people").mkdir()
    for number in range(3):
        picture = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "people" / f"{number}.png")
    (folder / "series.csv").write_text("\n".join(["sales", *(str(100 + index % 12) for index in range(60))]))
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes((8000 * np.sin(np.arange(4000) / 10)).astype("<i2").tobytes())
    graph = {"nodes": ["node"] * 3, "edges": [[0, 1], [1, 2]]}
    (folder / "graph.jsonl").write_text(json.dumps(graph) + "\n")
    np.save(folder / "spectra.npy", np.random.default_rng(0).random((3, 1440), dtype=np.float32))
    for name, bands, side in (("ms", 3, 32), ("pan", 1, 128)):
        np.save(folder / f"{name}.npy", np.random.default_rng(0).random((bands, side, side), dtype=np.float32))
    events = [f"{0.001 * i:.3f} {i % 20} {i % 16} {i % 2}" for i in range(80)]
    (folder / "events.txt").write_text("\n".join(["20 16", *events]))
    points = [f"{i % 5}.5 {i % 7}.25 {i % 3}.0 {i % 256} {i * 7 % 256} 90" for i in range(300)]
    (folder / "points.csv").write_text("\n".join(["x,y,z,red,green,blue", *(row.replace(" ", ",") for row in points)]))
    header = ["ply", "format ascii 1.0", "element vertex 300", *(f"property float {axis}" for axis in "xyz")]
    header += [*(f"property uchar {name}" for name in ("red", "green", "blue")), "end_header"]
    (folder / "room.ply").write_text("\n".join([*header, *points]) + "\n")
    (folder / "words").write_text("def main(argument):\n    return argument\n" * 4)
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch) -> Path:
    """A folder to work in, with a file for each kind of work."""
    for file in inputs.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state_of(slug: str, preset: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the weights that ship."""
    file = catalog.card(slug).shipped[preset]
    with safe_open(str(file), "pt") as content:
        return weights.read(file)[0], content.metadata()


def damaged(slug: str, preset: str, how: str) -> tuple[Path, str]:
    """The weights that ship, damaged and written here; and what the error must name."""
    state, metadata = state_of(slug, preset)
    floats = [name for name, tensor in state.items() if tensor.is_floating_point()]
    name = next((name for name in floats if name.endswith("running_var")), floats[len(floats) // 2])
    if how == "too large":
        state.update({name: (state[name].float() * FACTOR).clamp(-BOUND, BOUND) for name in floats})
        name = "the first layer whose output is not finite is "
    elif how == "int8":
        state[name] = (state[name].float() * 64).to(torch.int8)
    elif how == "bool":
        state[name] = state[name] > 0
    elif how == "complex":
        state[name] = state[name].to(torch.complex64)
    else:
        state[name] = torch.full_like(state[name], {"NaN": torch.nan, "negative": -1.0}[how])
    save_file(state, "damaged.safetensors", metadata)
    return Path("damaged.safetensors"), name


def refused(line: str, capsys: pytest.CaptureFixture) -> str:
    """What a command says that ends with 2 and leaves nothing."""
    before = set(Path().iterdir())
    capsys.readouterr()
    assert main(shlex.split(line)) == 2
    out, err = capsys.readouterr()
    assert not out and set(Path().iterdir()) == before
    *notes, says = err.strip().split("\n")
    assert says.startswith("provenn: ") and not any("provenn: " in note or "Warning" in note for note in notes), err
    return says


@pytest.mark.parametrize("slug, preset", SHIPPED)
def test_no_prediction_is_made_by_weights_that_run_out_of_range(slug, preset, here, capsys):
    work = catalog.card(slug).work_of(catalog.card(slug).preset(preset)) or ""
    given, output = INPUTS[work]
    file, _ = damaged(slug, preset, "too large")
    says = refused(f"predict {slug} {given}{MORE.get(work, '')} --weights {file} -o {output}", capsys)
    assert says.startswith(f"provenn: {file}: the first layer whose output is not finite is ")
    model = dict(provenn.paper(slug).build(preset, pretrained=True).named_modules())
    name, _, kind = says.partition("finite is ")[2].partition(", with")[0].partition(" ")
    assert kind == f"({type(model[name]).__name__})"


@pytest.mark.parametrize("how", ["NaN", "int8", "bool", "complex", "negative"])
@pytest.mark.parametrize("slug, preset", SHIPPED[:4] + SHIPPED[-2:])
def test_weights_of_impossible_values_are_refused_by_every_verb(slug, preset, how, here, capsys):
    file, name = damaged(slug, preset, how)
    if how == "negative" and "running_var" not in name:
        pytest.skip("it keeps no variance")
    work = catalog.card(slug).work_of(catalog.card(slug).preset(preset)) or ""
    given, output = INPUTS[work]
    words = MORE.get(work, "")
    for line in (f"predict {slug} {given}{words} -o {output}", f"evaluate {slug} --data x", f"export {slug} -o a.onnx"):
        says = refused(f"{line} --weights {file}", capsys)
        assert says.startswith(f"provenn: {file}: {name} ")
        assert how in ("NaN", "negative") or f"is of type {how}" in says.replace("complex64", "complex")
    if (slug, preset) in INSPECTED:
        assert f"{file}: {name} " in refused(
            f"inspect {slug} {given}{WORDS.get(work, '')} --weights {file} -o a.png", capsys
        )


@pytest.mark.parametrize("slug, preset", INSPECTED)
def test_no_inspection_is_made_of_it(slug, preset, here, capsys):
    work = catalog.card(slug).work_of(catalog.card(slug).preset(preset)) or ""
    given = f"{INPUTS[work][0]}{WORDS.get(work, '')}"
    file, says = damaged(slug, preset, "too large")
    assert f"{file}: {says}" in refused(f"inspect {slug} {given} --weights {file} -o answer.png", capsys)


@pytest.mark.parametrize(
    "slug, preset, data",
    [
        ("aaren", "aaren_forecaster", "airline"),
        ("eca_net", "eca_resnet20", "digits"),
        ("urpe", "urpe_graph_tiny", "graph.jsonl"),
    ],
)
def test_no_metric_is_told_of_it(slug, preset, data, here, capsys):
    if data == "graph.jsonl":
        Path("graph.jsonl").unlink()
        Path("graph.jsonl").write_text('{"nodes": ["node", "node"], "edges": [[0, 1]], "target": 1}\n' * 4)
    file, says = damaged(slug, preset, "too large")
    assert f"{file}: {says}" in refused(f"evaluate {slug} --data {data} --weights {file} --out metrics", capsys)


@pytest.mark.parametrize("slug, preset", SHIPPED)
def test_no_demo_shows_it(slug, preset, here):
    model, label = provenn.paper(slug).load(preset=preset)
    if face_of(label.task).demo is None:
        pytest.skip("nothing to try in a browser")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(FACTOR).clamp_(-BOUND, BOUND)
    given = TRIED.get(label.task, INPUTS[label.task][0])
    file = None if label.task == "image-generation" else given
    job = {"paper": slug, "preset": preset, "file": file, "options": dict(TYPED.get(label.task, {}))}
    told: list[dict] = []
    worker._work({(slug, preset): (model, label)}, job, told.append)
    assert list(told[-1]) == ["failed"]
    assert told[-1]["failed"].startswith(f"the weights of {preset}: the first layer whose output is not finite is ")


class Stream(nn.Module):
    """Two layers and a mask, that may also be run a step at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.first, self.last = Mask(), nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        weight = (self.first(x) + self.mask(x)).softmax(-1)
        return {"told": self.last(self.norm(weight * self.first(x)))}

    def step(self, x: Tensor) -> Tensor:
        return self.last(1e30 * self.first(x))


class Mask(nn.Module):
    """Minus infinity where nobody looks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([0.0, 0.0, 0.0, -torch.inf]).expand_as(x)


@pytest.fixture
def model() -> Iterator[Stream]:
    torch.manual_seed(0)
    made = Stream().eval()
    with torch.no_grad():
        yield made
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())


def blamed(model: nn.Module, x: Tensor, method: str = "forward") -> str:
    with pytest.raises(UserError) as error, finite_outputs(model, "a.pth", "x.csv"):
        model(x) if method == "forward" else getattr(model, method)(x)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_sound_model_answers_the_same_bits_and_its_masks_are_let_through(model):
    x = torch.randn(3, 4)
    plain = model(x)["told"]
    with finite_outputs(model, "a.pth"):
        assert torch.equal(model(x)["told"], plain)


def test_the_first_layer_is_named_and_no_mask_is(model):
    model.first.weight.fill_(1e19)
    model.last.weight.fill_(1e19)
    assert "not finite is last (Linear), with inputs up to" in blamed(model, torch.ones(3, 4))


def test_what_a_model_does_between_its_layers_is_its_own(model):
    model.first.weight.fill_(1e15)
    assert blamed(model, torch.ones(3, 4), "step").startswith("a.pth: the first layer")


def test_a_tensor_that_is_impossible_is_named_before_any_layer(model):
    model.norm.running_var.fill_(-1)
    assert "a.pth: norm.running_var holds -1, and a variance is never negative" in blamed(model, torch.ones(3, 4))


def test_an_input_that_is_not_finite_or_too_large_is_to_blame_itself(model):
    x = torch.ones(3, 4)
    x[1, 2] = torch.nan
    assert blamed(model, x).startswith("x.csv: what the model is given holds values that are no finite numbers")
    model.first.weight.fill_(2)
    assert blamed(model, torch.full((3, 4), 3e38)).startswith("x.csv: its values reach 3e+38 as the model sees them")


def test_a_failure_that_is_caught_leaves_the_next_pass_checked(model):
    x = torch.ones(3, 4)
    with finite_outputs(model, "a.pth"):
        with pytest.raises(RuntimeError):
            model(torch.ones(3, 5))
        with pytest.raises(UserError):
            model(x * torch.nan)
        with pytest.raises(UserError):
            model(x * torch.nan)


def test_numbers_are_looked_for_in_whatever_nests_them():
    assert is_finite({"a": [torch.ones(2), (torch.tensor([1]), None, "text")]})
    assert not is_finite({"a": [torch.ones(2), (torch.tensor([1j * torch.inf]),)]})


def test_an_answer_out_of_range_on_the_scale_of_the_data_is_refused(here, capsys):
    Path("huge.csv").write_text("\n".join(["sales", *(f"{1 + index % 3}e200" for index in range(60))]))
    assert "huge.csv: on the scale of the data" in refused("predict aaren huge.csv -o answer.csv", capsys)
    with pytest.raises(UserError, match=r"a\.csv: on the scale"):
        check_answer(np.array([1.0, np.inf]), "a.csv")


def test_what_is_undefined_is_null_in_files_and_for_machines(tmp_path, capsys):
    evaluation = Evaluation("m", "d", 2, {"psnr": np.inf, "AP": 0.5}, {"psnr": (np.nan, np.inf), "AP": None}, "none")
    evaluation.save(tmp_path)
    strict = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert strict["metrics"] == {"psnr": None, "AP": 0.5} and strict["intervals"]["psnr"] == [None, None]

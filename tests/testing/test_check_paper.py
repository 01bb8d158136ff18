"""A third party's paper is held to what ours are: each fault in its claims, experiments, record, golden values and
weights is named in one line."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import provenn
from plugins import FIXTURES, importable, install
from provenn import catalog
from provenn.core.errors import UserError
from provenn.testing import FailedCheck, check_paper, checks, checks_of, seeded_array, seeded_state
from provenn.training import weights

OFFICIAL = """
def convert(state):
    return "tiny_small", {"num_classes": 4}, state
"""


# A fault that `tiny_gate` has on purpose: an exponent that is typed in.
BARE = "linear: a bare figure; only an exact experiment may be one: keep the values of both sides"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The record of a run of all experiments."""
    site, out = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("run")
    with importable(install(FIXTURES / "tiny_gate", site), "tiny_gate"):
        provenn.reproduce("tiny_gate", budget="small", out=out, device="cpu")
    return (out / "tiny_gate" / "evidence.json").read_bytes()


@pytest.fixture
def package(third_party: Path, record: bytes) -> Path:
    """The folder of `tiny_gate`, with the record, golden values and an `official.py`."""
    folder = third_party / "tiny_gate"
    (folder / "evidence.json").write_bytes(record)
    (folder / "official.py").write_text(OFFICIAL)
    shapes = {name: list(value.shape) for name, value in model().state_dict().items()}
    official = model(seeded_state({name: tuple(shape) for name, shape in shapes.items()}, 3))
    output = official(torch.from_numpy(seeded_array([8, 3, 8, 8], "image", 3)).float())
    golden = {"shape": list(output.shape), "index": list(range(24)), "value": output.flatten()[:24].tolist()}
    case = {"preset": "tiny_small", "seed": 3, "shapes": shapes, "output": golden}
    case["input"] = {"name": "image", "shape": [8, 3, 8, 8]}
    (folder / "golden.json").write_text(json.dumps({"cases": [case]}))
    return folder


def model(state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    made = provenn.paper("tiny_gate").build("tiny_small")
    made.load_state_dict(state or made.state_dict())
    return made.eval()


def faults(of: str, golden: Path | None = None) -> list[str]:
    """The lines of one check, without its name and without the fault that is there on purpose."""
    catalog.cards.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tiny_gate"]:
        del sys.modules[name]
    try:
        checks_of(catalog.card("tiny_gate"), golden=golden)[f"tiny_gate {of}"]()
    except FailedCheck as error:
        first, *lines = str(error).splitlines()
        assert first == f"tiny_gate {of}"
        return [line.removeprefix("  ") for line in lines if BARE not in line]
    return []


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))


def test_all_faults_are_named_at_once(package: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "_ask", lambda *asked: None)  # of mechanisms and presets nothing is asked here
    with pytest.raises(FailedCheck) as error:
        check_paper("tiny_gate")
    assert str(error.value).splitlines() == ["tiny_gate evidence", f"  {BARE}"]
    edit(package / "paper.toml", 'why = "one is linear"', "")
    edit(package / "golden.json", "tiny_small", "tiny_large")
    (package / "evidence.json").write_text("{")
    catalog.cards.cache_clear()
    with pytest.raises(FailedCheck) as error:
        check_paper("tiny_gate")
    said = str(error.value).splitlines()
    assert said[::2] == ["tiny_gate claims", "tiny_gate evidence", "tiny_gate golden/tiny_large"] and len(said) == 6


@pytest.mark.parametrize(
    "of, file, before, after, complaints",
    [
        (
            "experiments", "experiments.py", '@measures("linear")', '@measures("liner")',
            ["linear: paper.toml lists it, nothing in experiments.py measures it, did you mean 'liner'?",
             "liner: experiments.py measures it, paper.toml does not list it, did you mean 'linear'?"],
        ),
        (
            "experiments", "experiments.py", '@measures("linear")', "",
            ["linear: paper.toml lists it, nothing in experiments.py measures it"],
        ),
        (
            "experiments", "experiments.py", '@measures("linear")', '@measures("identity")',
            ["tiny_gate.experiments: the experiment 'identity' is measured by two functions"],
        ),
        (
            "experiments", "experiments.py", '@measures("linear")', '@measures("imagenet")',
            ["linear: paper.toml lists it, nothing in experiments.py measures it",
             "imagenet: experiments.py measures it, paper.toml says that it needs ImageNet-1K and eight GPUs"],
        ),
        (
            "experiments", "experiments.py", "import torch\n", "import nothing_of_this_name\n",
            ["tiny_gate: tiny_gate.experiments cannot be imported: ModuleNotFoundError: "
             "No module named 'nothing_of_this_name'"],
        ),
        (
            "claims", "paper.toml", 'decides = ["better", "imagenet"]\nneeds = "ImageNet"',
            'decides = ["imagenet"]',
            ["no experiment decides the claim 'The gate is two points better than none.': "
             "name one, or say what it needs"],
        ),
        (
            "claims", "paper.toml", 'decides = ["better", "imagenet"]\nneeds = "ImageNet"',
            'decides = ["linear"]',
            ["the claim 'The gate is two points better than none.' is of quality: "
             "name an experiment of kind quality"],
        ),
        ("claims", "paper.toml", 'why = "one is linear"', "", ["linear: give with `why` the reason of its region"]),
        (
            "claims", "paper.toml", 'scale = "drawn"\n', "",
            ["better: name its data and the size of its models with `scale`, an entry of [scales]"],
        ),
        (
            "evidence", "paper.toml", 'id = "linear"', 'id = "lines"',
            ["linear: evidence.json has a record of it, paper.toml does not list it, did you mean 'lines'?",
             "lines: evidence.json has no record of it: run `provenn reproduce tiny_gate`"],
        ),
        (
            "evidence", "paper.toml", "within = [0.99, 1.01]", "within = [1.99, 2.01]",
            ["linear: the recorded verdict is 'supported', its numbers and paper.toml give 'contradicted'"],
        ),
        ("evidence", "evidence.json", '"paper": "tiny_gate"', '"paper": "craft"',
         ["evidence.json is of the paper 'craft', not of 'tiny_gate'"]),
    ],
)  # fmt: skip
def test_a_fault_is_named_in_one_line(
    package: Path, of: str, file: str, before: str, after: str, complaints: list[str]
):
    assert faults(of) == []
    edit(package / file, before, after)
    assert [line for line in faults(of) if "recorded expects" not in line] == complaints


def test_a_claim_of_no_experiment_is_named(package: Path):
    edit(package / "paper.toml", 'decides = ["better", "imagenet"]', 'decides = ["bettr", "imagenet"]')
    catalog.cards.cache_clear()
    with pytest.raises(UserError, match="names no experiment of this paper: bettr") as error:
        check_paper("tiny_gate")
    assert "\n" not in str(error.value)


def change(facts: dict, experiment: str, **values: object) -> None:
    (record,) = (record for record in facts["records"] if record["experiment"] == experiment)
    record["measurement"] |= values


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (
            lambda facts: change(facts, "better", interval=[1.0, 3.5]),
            r"better: effect and interval are recorded as [\d.]+, 1, 3.5; its values give [\d.]+, [\d.]+, [\d.]+",
        ),
        (lambda facts: change(facts, "better", effect=9.0), "better: effect and interval are recorded as 9, "),
        (lambda facts: change(facts, "better", values=[]), "better: nothing can be estimated from its values: "),
        (lambda facts: facts["records"][0].update(verdict="inconclusive"), "parameters: the recorded verdict is "),
        (lambda facts: facts["records"].pop(), "has no record of it: run `provenn reproduce tiny_gate`"),
        (lambda facts: facts["records"][0].update(colour=3), "evidence.json cannot be read: records.0.colour: Extra"),
        (lambda facts: facts["records"][0].update(run=7), "a record names a run that is not there"),
        (
            lambda facts: change(facts, "linear", pictures=[{"file": "pictures/none.png", "caption": "?"}]),
            "pictures/none.png: no such file, which evidence.json names",
        ),
    ],
)
def test_a_record_that_is_not_so_is_named(package: Path, spoil: Callable[[dict], object], complaint: str):
    facts = json.loads((package / "evidence.json").read_text())
    spoil(facts)
    (package / "evidence.json").write_text(json.dumps(facts))
    assert re.search(complaint, faults("evidence")[0])


def test_a_picture_that_no_record_names_is_named(package: Path):
    (package / "pictures").mkdir(exist_ok=True)
    (package / "pictures" / "old.png").touch()
    assert faults("evidence") == ["pictures/old.png: no record in evidence.json names it"]


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda case: case["output"]["value"].__setitem__(5, 9.0), r"output: value 5 is -?[\d.]+, the authors' .* 9$"),
        (lambda case: case["output"].update(shape=[8, 5]), r"output: its shape is \[8, 4\], the authors' is \[8, 5\]"),
        (lambda case: case.update(preset="tiny_large"), "official.py takes these weights for tiny_small"),
        (lambda case: case.update(tolerance=0.1), "tolerance 0.1: say why"),
        (lambda case: case.update(gradient={**case["output"], "tolerance": 0.2}), "tolerance 0.2: say why"),
        (lambda case: case.pop("seed"), "KeyError: 'seed'"),
    ],
)  # fmt: skip
def test_a_wrong_golden_value_is_named(package: Path, spoil: Callable[[dict], object], complaint: str):
    content = json.loads((package / "golden.json").read_text())
    spoil(content["cases"][0])
    elsewhere = package.parent / "golden_of_the_package.json"
    elsewhere.write_text(json.dumps(content))
    (line,) = faults(f"golden/{content['cases'][0]['preset']}", elsewhere)
    assert re.match(complaint, line)


def test_a_file_without_golden_values_is_named(package: Path):
    (package / "golden.json").write_text("[]")
    with pytest.raises(UserError, match=r"golden\.json holds no golden values \(.*\): expected \{"):
        check_paper("tiny_gate")


def test_weights_below_their_metric_are_named(package: Path, tmp_path: Path):
    recipe = {"max_steps": 60, "lr": 0.05}
    run, _ = provenn.train("tiny_gate", "digits", preset="tiny_small", recipe=recipe, out=tmp_path / "run")
    state, label = weights.read(run)
    file = package / "weights" / "tiny_small.safetensors"
    file.parent.mkdir()
    made = provenn.paper("tiny_gate").build("tiny_small", **label.options)
    weights.load_into(made, state, "it")
    weights.save(made, file, replace(label, metrics={"accuracy": 0.99}))
    (line,) = faults("weights/tiny_small.safetensors")
    assert line.startswith("accuracy is 0.") and line.endswith("it says 0.99")

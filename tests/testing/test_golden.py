"""The authors' weights give the authors' outputs: every `golden.json` of a paper, in the format of CONTRIBUTING.md."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import provenn
from golden_values import assert_values, drawn
from provenn.catalog import cards
from provenn.testing import seeded_array, seeded_state

PAPERS = Path(__file__).parents[1] / "papers"
CASES = [
    pytest.param(file.parent.name, case, id=f"{file.parent.name}-{case['preset']}")
    for file in sorted(PAPERS.glob("*/golden.json"))
    for case in json.loads(file.read_text())["cases"]
]


@pytest.mark.parametrize("slug, case", CASES)
def test_our_model_with_the_authors_weights_gives_the_authors_values(slug: str, case: dict, tmp_path: Path):
    state = seeded_state({name: tuple(shape) for name, shape in case["shapes"].items()}, case["seed"])
    for end, shift in case.get("shift", {}).items():  # widths, which mean nothing around zero
        state |= {name: value + shift for name, value in state.items() if name.endswith(end)}
    torch.save(state, tmp_path / "official.pth")
    options = case.get("options", {})  # what the weights do not tell
    preset, _, _ = provenn.paper(slug).card.resolve("official:convert")(state, **options)
    assert preset == case["preset"]

    model = provenn.from_official(slug, tmp_path / "official.pth", **options)
    inputs = [drawn(spec, case["seed"]) for spec in case.get("inputs") or [case["input"]]]
    assert not model.training
    gradient = case.get("gradient")
    with torch.set_grad_enabled(gradient is not None):
        output = model(*(x.requires_grad_(gradient is not None and x.is_floating_point()) for x in inputs))
    tolerance = case.get("tolerance", 1e-4)  # a case with its own says why
    assert tolerance <= 1e-4 or case["why"]
    assert_values(output, case["output"], tolerance)
    if gradient is not None:
        weight = torch.from_numpy(seeded_array(output.shape, "gradient", case["seed"]).astype(np.float32))
        assert_values(torch.autograd.grad((output * weight).sum(), inputs[0])[0], gradient, tolerance)


def test_golden_values_vary_and_name_their_source():
    """A constant output would hide a wrong conversion, and a value without a source cannot be checked."""
    for file in PAPERS.glob("*/golden.json"):
        content = json.loads(file.read_text())
        for case in content["cases"]:
            source = case.get("source", content["source"])
            repository, _, commit = source.partition("@")
            assert repository.count("/") == 1 and len(commit) == 40, source
            values = np.asarray(case["output"]["value"])
            assert values.std() > 1e-3 * np.abs(values).max(), f"{file.name} {case['preset']}"


def test_every_official_repository_has_a_case_of_its_newest_commit_with_code():
    for file in PAPERS.glob("*/golden.json"):
        content = json.loads(file.read_text())
        sources = {case.get("source", content["source"]) for case in content["cases"]} | set(content.get("also", []))
        newest = dict(entry.split("@") for entry in content["newest"])
        assert cards()[file.parent.name].code in newest, file.name
        assert {source.split("@")[0] for source in sources} == set(newest), file.name
        assert {f"{repository}@{commit}" for repository, commit in newest.items()} <= sources, file.name


def test_every_paper_that_takes_official_weights_has_golden_values():
    official = {slug for slug, card in cards().items() if card.has("official") and card.package.startswith("provenn.")}
    assert official == {file.parent.name for file in PAPERS.glob("*/golden.json")}

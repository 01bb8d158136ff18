"""The authors' weights give the authors' outputs: every file in `golden/`, in the format of CONTRIBUTING.md."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import provenn
from provenn.catalog import cards
from provenn.testing import seeded_array, seeded_state

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    pytest.param(file.stem, case, id=f"{file.stem}-{case['preset']}")
    for file in sorted(GOLDEN.glob("*.json"))
    for case in json.loads(file.read_text())["cases"]
]


@pytest.mark.parametrize("slug, case", CASES)
def test_our_model_with_the_authors_weights_gives_the_authors_values(slug: str, case: dict, tmp_path: Path):
    state = seeded_state({name: tuple(shape) for name, shape in case["shapes"].items()}, case["seed"])
    torch.save(state, tmp_path / "official.pth")
    options = case.get("options", {})  # what the weights do not tell
    preset, _, _ = provenn.paper(slug).card.resolve("official:convert")(state, **options)
    assert preset == case["preset"]

    model = provenn.from_official(slug, tmp_path / "official.pth", **options)
    noise = seeded_array(case["input"]["shape"], case["input"]["name"], case["seed"])
    if below := case["input"].get("below"):  # tokens: the noise is uniform over (−√3, √3)
        given = torch.from_numpy(((noise / np.sqrt(3) + 1) / 2 * below).astype(np.int64))
    else:
        given = torch.from_numpy(noise.astype(np.float32))
    assert not model.training
    with torch.no_grad():
        output = model(given)

    assert list(output.shape) == case["output"]["shape"]
    expected = np.asarray(case["output"]["value"])
    actual = output.flatten()[case["output"]["index"]].double().numpy()
    # Relative to the size of the output: single values may lie near zero by chance.
    size = float(np.sqrt(np.mean(expected**2)))
    assert len(expected) >= 20 and size > 0
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * size)


def test_golden_values_vary_and_name_their_source():
    """A constant output would hide a wrong conversion, and a value without a source cannot be checked."""
    for file in GOLDEN.glob("*.json"):
        content = json.loads(file.read_text())
        repository, _, commit = content["source"].partition("@")
        assert repository.count("/") == 1 and len(commit) == 40, content["source"]
        for case in content["cases"]:
            values = np.asarray(case["output"]["value"])
            assert values.std() > 1e-3 * np.abs(values).max(), f"{file.name} {case['preset']}"


def test_every_paper_that_takes_official_weights_has_golden_values():
    official = {slug for slug, card in cards().items() if card.has("official") and card.package.startswith("provenn.")}
    assert official == {file.stem for file in GOLDEN.glob("*.json")}

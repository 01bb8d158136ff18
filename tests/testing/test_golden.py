"""The authors' weights give the authors' outputs: every `golden.json` of a paper, in the format of CONTRIBUTING.md."""

import json
from pathlib import Path

import pytest
import torch

from provenn.catalog import cards
from provenn.testing.golden import check_case, joined, read_cases

PAPERS = Path(__file__).parents[1] / "papers"
CASES = {
    f"{file.parent.name}-{name}": (file.parent.name, case)
    for file in sorted(PAPERS.glob("*/golden.json"))
    for name, case in read_cases(file).items()
}


@pytest.mark.parametrize("name", CASES)
def test_our_model_with_the_authors_weights_gives_the_authors_values(name: str):
    slug, case = CASES[name]
    check_case(cards()[slug], case)


def test_golden_values_name_their_source():
    """A value without a source cannot be checked."""
    for file in PAPERS.glob("*/golden.json"):
        content = json.loads(file.read_text())
        for case in content["cases"]:
            source = case.get("source", content["source"])
            repository, _, commit = source.partition("@")
            assert repository.count("/") == 1 and len(commit) == 40, source


def test_every_official_repository_has_a_case_of_its_newest_commit_with_code():
    for file in PAPERS.glob("*/golden.json"):
        content = json.loads(file.read_text())
        sources = {case.get("source", content["source"]) for case in content["cases"]} | set(content.get("also", []))
        newest = dict(entry.split("@") for entry in content["newest"])
        assert cards()[file.parent.name].code in newest, file.name
        assert {source.split("@")[0] for source in sources} == set(newest), file.name
        assert {f"{repository}@{commit}" for repository, commit in newest.items()} <= sources, file.name


# Whose repositories hold a README and figures alone; their own tests compare outputs and gradients with transformers'.
NO_CODE = {"dimap", "rc_mllm"}


def test_every_paper_that_takes_official_weights_has_golden_values():
    ours = {slug: card for slug, card in cards().items() if card.package.startswith("provenn.")}
    official = {slug for slug, card in ours.items() if card.has("official") and card.code}
    assert official >= NO_CODE
    assert official - NO_CODE == {file.parent.name for file in PAPERS.glob("*/golden.json")}


def test_every_paper_with_public_code_holds_values_of_that_code():
    """In `golden.json`, or in another file where the code has no checkpoints: layers, masks, placements, losses."""
    without = set()
    for slug, card in cards().items():
        if not (card.code and card.package.startswith("provenn.")):
            continue
        read = [json.loads(file.read_text()) for file in (PAPERS / slug).glob("*.json")]
        contents = [content for content in read if isinstance(content.get("cases"), list)]
        entries = [e for content in contents for e in (content, *content.get("cases", ())) if isinstance(e, dict)]
        sources = [entry["source"] for entry in entries if "source" in entry]
        assert all(len(source.partition("@")[2]) == 40 for source in sources), slug
        if not any(source.startswith(f"{card.code}@") for source in sources):
            without.add(slug)
    assert without == NO_CODE


def test_outputs_of_other_shapes_are_joined_by_example():
    score, maps = torch.arange(2.0), torch.arange(12.0).reshape(2, 2, 3)
    assert joined((score, maps)).tolist() == [[0, 0, 1, 2, 3, 4, 5], [1, 6, 7, 8, 9, 10, 11]]
    assert joined((maps, maps)).shape == (2, 2, 6)

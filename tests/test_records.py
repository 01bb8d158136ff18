"""The evidence that ships was measured in full, by a commit that it names.

That it is of the experiments as they stand, and that all in it follows from its values, is a common check
(`tests/papers/test_checks.py`).
"""

import re

import pytest

from provenn import catalog
from provenn.evidence import Evidence
from provenn.evidence.record import EVIDENCE, Ledger
from provenn.evidence.study import TUNING_SEED

PAPERS = [slug for slug, card in catalog.cards().items() if card.package.startswith("provenn.")]


@pytest.fixture(params=PAPERS)
def paper(request) -> tuple[catalog.Card, Evidence]:
    card = catalog.card(request.param)
    return card, Evidence.read(card.folder / EVIDENCE)


def test_measurements_were_made_in_full(paper):
    card, evidence = paper
    assert {run.budget for run in evidence.runs} <= {"small", "paper"}
    for record in evidence.records:
        measured = record.measurement
        if card.experiment(record.experiment).kind != "quality" or measured.effect is None:
            continue
        assert len(set(measured.seeds)) >= 5, f"{record.experiment}: seeds {measured.seeds}"
        assert TUNING_SEED not in measured.seeds
        if measured.skills or "recipe" in measured.setting:  # else nothing was trained
            assert measured.skills, f"{record.experiment}: did its variants beat the dummy baseline?"
            assert measured.data, record.experiment
            for key in ("recipe", "train", "test", "lr"):
                assert key in measured.setting, f"{record.experiment} does not say its {key}"


def test_a_record_names_its_commit_and_no_path_of_a_machine(paper):
    card, evidence = paper
    assert all(re.fullmatch(r"[0-9a-f]{12}\+?", run.environment.commit) for run in evidence.runs)
    text = (card.folder / EVIDENCE).read_text()
    assert "/tmp/" not in text and "/home/" not in text and "/root/" not in text and "/work/" not in text


def test_a_ledger_is_no_evidence():
    assert not list(catalog.card(PAPERS[0]).folder.parent.glob("*/ledger.json")), Ledger.__doc__

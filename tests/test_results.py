"""The committed evidence belongs to the claims as they stand: none is missing, none was decided by other facts."""

from pathlib import Path

import pytest

from provenn import catalog
from provenn.evidence.record import Ledger, Record

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture(params=[slug for slug, card in catalog.cards().items() if card.package.startswith("provenn.")])
def evidence(request):
    ledger = Ledger.model_validate_json((RESULTS / f"{request.param}.json").read_bytes())
    return catalog.card(request.param), ledger


def test_every_claim_has_a_record_and_every_record_a_claim(evidence):
    card, ledger = evidence
    assert {record.claim for record in ledger.records} == {claim.id for claim in card.claims}


def test_verdicts_follow_from_the_numbers_and_the_facts_of_today(evidence):
    card, ledger = evidence
    for record in ledger.records:
        again = Record.of(
            card.slug,
            card.claim(record.claim),
            record.measurement,
            budget=record.budget,
            environment=record.environment,
        )
        for fact in ("verdict", "reason", "says", "published", "expects", "kind", "origin"):
            assert getattr(record, fact) == getattr(again, fact), f"{record.claim}: {fact}"


def test_measurements_were_made_in_full(evidence):
    _, ledger = evidence
    assert {record.budget for record in ledger.records} <= {"small", "paper"}
    quality = [r for r in ledger.records if r.kind == "quality" and not r.measurement.needs]
    assert all(len(set(record.measurement.seeds)) >= 3 for record in quality)


def test_pictures_lie_beside_the_records(evidence):
    _, ledger = evidence
    pictures = [picture for record in ledger.records for picture in record.measurement.pictures]
    assert all((RESULTS / picture.file).is_file() for picture in pictures)

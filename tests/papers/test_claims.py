"""Every paper's measurements, by discovery: exact claims are decided by the suite, the others take their paths."""

from pathlib import Path

import pytest

import provenn
from provenn.catalog import cards

PAPERS = [slug for slug, card in cards().items() if card.has("claims")]
# Exact claims that are not so, as the papers' READMEs say.
FALSE = {"eca_net": {"module_flops"}}


@pytest.mark.parametrize("slug", PAPERS)
def test_exact_claims_hold_but_those_that_are_known_not_to(slug: str, tmp_path: Path) -> None:
    exact = [claim.id for claim in cards()[slug].claims if claim.kind == "exact" and claim.lacks is None]
    records = provenn.paper(slug).reproduce(claims=exact, budget="small", out=tmp_path, device="cpu")
    wrong = {record.claim: record.reason for record in records if record.verdict.value != "reproduced"}
    assert set(wrong) == FALSE.get(slug, set()), wrong


@pytest.mark.parametrize("slug", PAPERS)
def test_other_claims_take_their_paths(slug: str, tmp_path: Path) -> None:
    others = [claim.id for claim in cards()[slug].claims if claim.kind != "exact" and claim.needs is None]
    records = provenn.paper(slug).reproduce(claims=others, budget="smoke", seeds=1, out=tmp_path, device="cpu")
    assert [record.claim for record in records] == others
    assert {record.verdict.value for record in records} == {"not measured"}, "a smoke run gives no verdict"
    assert not {record.claim: record.measurement.failed for record in records if record.measurement.failed}
    drawn = {picture.file for record in records for picture in record.measurement.pictures}
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png")} == drawn

"""In which order a claim's findings are shown, what each is to it, and which claim is the headline."""

from itertools import permutations

import pytest

from provenn import catalog
from provenn.catalog import Claim, Experiment, Region
from provenn.evidence import view
from provenn.evidence.claim import ClaimVerdict, Judgement
from provenn.evidence.measurement import Measurement
from provenn.evidence.record import Finding, Record
from provenn.evidence.view import Judged, Role, strip

EFFECTS = {"hit": 1.0, "miss": -1.0, "also": 1.0, "contrary": -1.0}
CLAIM = Claim(
    says="It is so.", kind="quality", decides=["hit", "miss", "absent"], also=["also", "contrary"], against=["contrary"]
)


def finding(name: str) -> Finding:
    asked = Experiment(id=name, kind="quality", says=f"{name}.", expects=Region(above=0.0), why="so", scale=name)
    if name not in EFFECTS:
        return Finding("a_paper", asked)
    values = [EFFECTS[name] + 0.01 * seed for seed in range(5)]
    return Finding(
        "a_paper", asked, Record.of(asked, Measurement.paired(values, [0.0] * 5, seeds=range(5)), budget="small")
    )


def judged(names) -> Judged:
    return Judged(CLAIM, Judgement(ClaimVerdict.MIXED, 1, 2), [finding(name) for name in names])


@pytest.mark.parametrize("names", permutations((*EFFECTS, "absent"), 5))
def test_what_decides_is_shown_first_and_misses_before_hits(names):
    shown = [each.experiment.id for each in judged(names).shown]
    assert shown == ["miss", "hit", "contrary", "also"]


def test_what_each_finding_is_to_the_claim():
    each = judged((*EFFECTS, "absent"))
    roles = [each.role(one) for one in each.findings]
    assert roles == [Role.DECIDES, Role.DECIDES, Role.ALSO, Role.AGAINST, Role.DECIDES]
    assert [one.experiment.id for one in each.deciding] == ["hit", "miss", "absent"]
    assert each.scale == "miss · 5 seeds; hit · 5 seeds"


@pytest.mark.parametrize(
    "miss, hit, scale",
    [
        ("A · one thread · 1 picture", "A · one thread · 8 pictures", "A · one thread · 1 picture; 8 pictures"),
        ("A · one thread", "A", "A · one thread; A"),
        ("A · one thread", "B · one thread", "A · one thread; B · one thread"),
    ],
)
def test_what_scales_begin_with_alike_is_said_once(monkeypatch, miss, hit, scale):
    monkeypatch.setattr(view, "scale_of", lambda finding: {"miss": miss, "hit": hit}[finding.experiment.id])
    assert judged(("hit", "miss")).scale == scale


def test_the_headline_stands_in_brackets():
    plain = judged(("hit",))
    headline = Judged(CLAIM.model_copy(update={"headline": True}), plain.judgement, plain.findings)
    assert strip([headline, plain]) == "[◐] ◐ "


def test_seeds_are_said_once_where_the_scale_and_the_date_of_a_record_stand_side_by_side():
    card = catalog.card("l2vit")
    for finding in view.committed(card, print).findings(card.experiments):
        beside = f"{view.scale_of(finding)}; {view.when(finding)}"
        assert beside.count("seeds") <= 1, beside

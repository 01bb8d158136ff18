"""A claim's verdict follows from its experiments' alone, and never gets worse when an experiment gets better."""

from hypothesis import given
from hypothesis import strategies as st

from provenn.evidence.claim import PROVED, Judgement, Outcome, Standing, judge
from provenn.evidence.verdict import NO_VERDICT, Verdict

KINDS = ("exact", "cost", "quality")
CLAIMS = (*KINDS, "use")
# From worst to best; what was not measured is nowhere in it.
EXPERIMENTS = (Verdict.NOT_REPRODUCED, Verdict.INCONCLUSIVE, Verdict.DIRECTION_HOLDS, Verdict.REPRODUCED)
ORDER = (Standing.NOT_HERE, Standing.OPEN, Standing.PARTLY, Standing.HOLDS_HERE, Standing.REPRODUCED)

outcomes = st.lists(
    st.builds(
        Outcome, kind=st.sampled_from(KINDS), verdict=st.sampled_from(list(Verdict)), at_paper_setting=st.booleans()
    ),
    max_size=5,
)


def quality(*verdicts: Verdict, at_paper: bool = False) -> list[Outcome]:
    return [Outcome("quality", verdict, at_paper) for verdict in verdicts]


@given(st.sampled_from(CLAIMS), outcomes, st.randoms())
def test_the_order_of_the_experiments_does_not_matter(kind, every, random):
    shuffled = random.sample(every, len(every))
    assert judge(kind, "x", every) == judge(kind, "x", shuffled)


@given(st.sampled_from(CLAIMS), outcomes)
def test_what_was_not_measured_neither_helps_nor_harms(kind, every):
    absent = [Outcome(k, verdict, at) for k in KINDS for at in (True, False) for verdict in NO_VERDICT]
    assert judge(kind, "x", every) == judge(kind, "x", [*absent, *every])


@given(st.sampled_from(CLAIMS), outcomes, st.data())
def test_a_better_experiment_never_makes_a_claim_worse(kind, every, data):
    indices = [
        i for i, outcome in enumerate(every) if outcome.verdict in EXPERIMENTS[:-1] and not outcome.at_paper_setting
    ]
    if not indices:
        return
    i = data.draw(st.sampled_from(indices))
    better = data.draw(st.sampled_from(EXPERIMENTS[EXPERIMENTS.index(every[i].verdict) + 1 :]))
    before = judge(kind, "x", every).standing
    after = judge(kind, "x", [*every[:i], every[i]._replace(verdict=better), *every[i + 1 :]]).standing
    if before is not Standing.NOT_MEASURED:
        assert ORDER.index(after) >= ORDER.index(before)


@given(st.sampled_from(CLAIMS), outcomes)
def test_every_count_is_of_what_was_measured(kind, every):
    judgement = judge(kind, "x", every)
    measured = [outcome for outcome in every if outcome.verdict is not Verdict.NOT_MEASURED]
    assert judgement.asked <= len(measured) and judgement.held <= sum(o.verdict in PROVED for o in measured)
    assert (judgement.standing is Standing.PARTLY) == (0 < judgement.held < judgement.asked)


def test_all_some_and_none():
    good, bad, open_ = Verdict.DIRECTION_HOLDS, Verdict.NOT_REPRODUCED, Verdict.INCONCLUSIVE
    assert judge("quality", "", quality(good, good)) == (Standing.HOLDS_HERE, 2, 2, "")
    assert str(judge("quality", "", quality(good, bad, open_))) == "partly, 1 of 3"
    assert judge("quality", "", quality(bad, open_)).standing is Standing.NOT_HERE
    assert judge("quality", "", quality(open_)).standing is Standing.OPEN


def test_the_paper_s_scale_beats_small_scale_either_way():
    small, full = quality(Verdict.DIRECTION_HOLDS), quality(Verdict.NOT_REPRODUCED, at_paper=True)
    assert judge("quality", "", [*small, *full]).standing is Standing.NOT_HERE
    small, full = quality(Verdict.NOT_REPRODUCED), quality(Verdict.REPRODUCED, at_paper=True)
    assert judge("quality", "", [*small, *full]).standing is Standing.REPRODUCED


def test_counts_alone_do_not_settle_a_claim_about_quality_but_can_speak_against_it():
    count, false = Outcome("exact", Verdict.HOLDS, True), Outcome("exact", Verdict.NOT_REPRODUCED, True)
    assert judge("quality", "a GPU", [count]) == Judgement(Standing.NOT_MEASURED, reason="needs a GPU")
    assert judge("cost", "", [count]).standing is Standing.REPRODUCED
    assert judge("quality", "", [false, *quality(Verdict.DIRECTION_HOLDS)]).standing is Standing.PARTLY


def test_without_a_measurement_it_says_what_it_needs():
    assert str(judge("quality", "ImageNet", [])) == "not measured: needs ImageNet"
    absent = Outcome("quality", Verdict.NOT_MEASURED, reason="nothing was learned: a reaches 1, the dummy baseline 1")
    assert "nothing was learned" in str(judge("quality", "", [absent]))


def test_what_a_device_lacks_is_why_a_claim_is_not_measured():
    assert str(judge("cost", "", [Outcome("cost", Verdict.OUT_OF_MEMORY, reason="on cpu: 9 bytes")])) == (
        "not measured: out of memory on cpu: 9 bytes"
    )

"""A claim's verdict follows from its experiments' alone, and never gets worse when an experiment gets better."""

from hypothesis import given
from hypothesis import strategies as st

from provenn.evidence.claim import AGREE, MEANING, ClaimVerdict, Judgement, Outcome, judge
from provenn.evidence.verdict import NO_VERDICT, Verdict

KINDS = ("exact", "cost", "quality")
CLAIMS = (*KINDS, "use")
# From worst to best; what was not measured is nowhere in it. An exact experiment that is so is verified, no other is.
EXPERIMENTS = (Verdict.CONTRADICTED, Verdict.INCONCLUSIVE, Verdict.SUPPORTED, Verdict.REPRODUCED)
RANK = {
    ClaimVerdict.CONTRADICTED: 0,
    ClaimVerdict.MIXED: 1,
    ClaimVerdict.INCONCLUSIVE: 2,
    ClaimVerdict.SUPPORTED: 3,
    ClaimVerdict.REPRODUCED: 4,
    ClaimVerdict.VERIFIED: 4,
}

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
def test_what_was_not_measured_never_helps_and_leaves_nothing_verified_or_reproduced(kind, every):
    absent = [Outcome(k, verdict, at) for k in KINDS for at in (True, False) for verdict in NO_VERDICT]
    before, after = judge(kind, "x", every).verdict, judge(kind, "x", [*absent, *every]).verdict
    full = (ClaimVerdict.VERIFIED, ClaimVerdict.REPRODUCED)
    assert after is (ClaimVerdict.SUPPORTED if before in full else before)


@given(st.sampled_from(CLAIMS), outcomes, st.data())
def test_a_better_experiment_never_makes_a_claim_worse(kind, every, data):
    indices = [
        i for i, outcome in enumerate(every) if outcome.verdict in EXPERIMENTS[:-1] and not outcome.at_paper_setting
    ]
    if not indices:
        return
    i = data.draw(st.sampled_from(indices))
    better = data.draw(st.sampled_from(EXPERIMENTS[EXPERIMENTS.index(every[i].verdict) + 1 :]))
    before = judge(kind, "x", every).verdict
    after = judge(kind, "x", [*every[:i], every[i]._replace(verdict=better), *every[i + 1 :]]).verdict
    if before is not ClaimVerdict.NOT_MEASURED:
        assert RANK[after] >= RANK[before]


@given(st.sampled_from(CLAIMS), outcomes)
def test_every_count_is_of_what_was_measured(kind, every):
    judgement = judge(kind, "x", every)
    measured = [outcome for outcome in every if outcome.verdict is not Verdict.NOT_MEASURED]
    assert judgement.asked <= len(measured) and judgement.agreed <= sum(o.verdict in AGREE for o in measured)
    if judgement.verdict is ClaimVerdict.MIXED:
        assert 0 < judgement.agreed < judgement.asked


def test_all_some_and_none():
    good, bad, open_ = Verdict.SUPPORTED, Verdict.CONTRADICTED, Verdict.INCONCLUSIVE
    assert judge("quality", "", quality(good, good)) == (ClaimVerdict.SUPPORTED, 2, 2, "", "")
    assert str(judge("quality", "", quality(good, bad, open_))) == "mixed, 1 of 3"
    assert judge("quality", "", quality(bad, open_)).verdict is ClaimVerdict.CONTRADICTED
    assert judge("quality", "", quality(open_)).verdict is ClaimVerdict.INCONCLUSIVE
    assert judge("quality", "", quality(good, open_)).verdict is ClaimVerdict.INCONCLUSIVE


def test_the_paper_s_scale_beats_small_scale_either_way():
    small, full = quality(Verdict.SUPPORTED), quality(Verdict.CONTRADICTED, at_paper=True)
    assert judge("quality", "", [*small, *full]).verdict is ClaimVerdict.CONTRADICTED
    small, full = quality(Verdict.CONTRADICTED), quality(Verdict.REPRODUCED, at_paper=True)
    assert judge("quality", "", [*small, *full]).verdict is ClaimVerdict.REPRODUCED


def test_counts_alone_do_not_settle_a_claim_about_quality_but_can_speak_against_it():
    count, false = Outcome("exact", Verdict.VERIFIED, True), Outcome("exact", Verdict.CONTRADICTED, True)
    assert judge("quality", "a GPU", [count]) == Judgement(ClaimVerdict.NOT_MEASURED, reason="needs a GPU")
    assert judge("cost", "", [count]).verdict is ClaimVerdict.VERIFIED
    assert judge("quality", "", [false, *quality(Verdict.SUPPORTED)]).verdict is ClaimVerdict.MIXED


def test_without_a_measurement_it_says_what_it_needs():
    assert str(judge("quality", "ImageNet", [])) == "not measured: needs ImageNet"
    absent = Outcome(
        "quality", Verdict.NOT_MEASURED, reason="below the dummy baseline: a reaches 1, the dummy baseline 1"
    )
    assert "below the dummy baseline" in str(judge("quality", "", [absent]))


def test_what_a_device_lacks_is_why_a_claim_is_not_measured():
    assert str(judge("cost", "", [Outcome("cost", Verdict.OUT_OF_MEMORY, reason="on cpu: 9 bytes")])) == (
        "not measured: out of memory on cpu: 9 bytes"
    )


def test_a_printed_figure_never_stands_beside_a_verdict_as_if_it_had_been_tried():
    supported, small = quality(Verdict.SUPPORTED), quality(Verdict.CONTRADICTED)
    assert str(judge("quality", "", supported, figure="84.4 %")) == "supported in direction; 84.4 % not tried"
    assert str(judge("quality", "", small, figure="84.4 %")) == "contradicted; 84.4 % not tried"
    mixed_kinds = [Outcome("exact", Verdict.VERIFIED, True), Outcome("cost", Verdict.SUPPORTED)]
    assert str(judge("use", "", mixed_kinds, figure="96 GPUs")) == "supported in direction; 96 GPUs not tried"
    one_at_paper = [Outcome("cost", Verdict.SUPPORTED, True), Outcome("cost", Verdict.SUPPORTED)]
    assert str(judge("cost", "", one_at_paper, figure="7x")) == "supported"
    small_identity = [Outcome("exact", Verdict.CONTRADICTED, False)]
    assert str(judge("cost", "", small_identity, figure="9 %")) == "contradicted; 9 % not tried"
    tried = [outcome._replace(at_paper_setting=True, missed_figure="7 published, ×3.3 here") for outcome in supported]
    assert str(judge("cost", "", tried, figure="7x")) == "supported in direction; 7 published, ×3.3 here"
    met = quality(Verdict.REPRODUCED, at_paper=True)
    assert str(judge("quality", "", met, figure="84.4 %")) == "reproduced"


def test_nothing_is_reproduced_while_another_experiment_at_the_paper_s_setting_waits():
    met, waits = Outcome("quality", Verdict.REPRODUCED, True), Outcome("quality", Verdict.NOT_MEASURED, True)
    assert judge("quality", "", [met, waits]).verdict is ClaimVerdict.SUPPORTED
    assert judge("quality", "", [met, waits._replace(at_paper_setting=False)]).verdict is ClaimVerdict.REPRODUCED


def test_every_verdict_has_a_meaning():
    assert list(MEANING) == list(ClaimVerdict)


def test_one_that_is_only_supported_leaves_nothing_reproduced():
    met, near = quality(Verdict.REPRODUCED, at_paper=True), quality(Verdict.SUPPORTED, at_paper=True)
    assert judge("quality", "", [*met, *near]).verdict is ClaimVerdict.SUPPORTED


def test_what_a_claim_needs_is_said_before_why_an_experiment_has_no_verdict():
    absent = [Outcome("quality", Verdict.NOT_MEASURED, reason="a network diverged")]
    assert str(judge("quality", "ImageNet", absent)) == "not measured: needs ImageNet"
    assert str(judge("quality", "", absent)) == "not measured: a network diverged"


def test_a_figure_that_an_experiment_without_a_verdict_missed_was_not_tried():
    absent = Outcome("quality", Verdict.NOT_MEASURED, True, "below the dummy baseline", "7 published, 3 here")
    every = [absent, *quality(Verdict.SUPPORTED)]
    assert str(judge("quality", "", every, figure="7x")) == "supported in direction; 7x not tried"

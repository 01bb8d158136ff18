"""The verdict of a claim of the abstract: a pure function of the verdicts of the experiments that decide it."""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from provenn.evidence.verdict import NO_VERDICT, Verdict

AGREE = {Verdict.VERIFIED, Verdict.REPRODUCED, Verdict.SUPPORTED}


class ClaimVerdict(StrEnum):
    """What the deciding experiments say of a claim; `MEANING` has each in a sentence."""

    VERIFIED = "verified"
    REPRODUCED = "reproduced"
    SUPPORTED = "supported"
    MIXED = "mixed"
    INCONCLUSIVE = "inconclusive"
    CONTRADICTED = "contradicted"
    NOT_MEASURED = "not measured"


MEANING = {
    ClaimVerdict.VERIFIED: "an identity or a count, and exactly so",
    ClaimVerdict.REPRODUCED: "the published figure is met at the paper's own setting",
    ClaimVerdict.SUPPORTED: "every deciding experiment that was measured agrees, at the scale named",
    ClaimVerdict.MIXED: "some deciding experiments agree and some contradict",
    ClaimVerdict.INCONCLUSIVE: "none contradicts, not all agree",
    ClaimVerdict.CONTRADICTED: "at least one contradicts and none agrees, at the scale named",
    ClaimVerdict.NOT_MEASURED: "no deciding experiment was measured; says what it needs",
}


class Outcome(NamedTuple):
    """A deciding experiment's kind and verdict, and why there is none.

    `at_paper_setting`: whether it was measured at the paper's own setting or, where it was not measured, would be.
    `missed_figure` says what was measured at the paper's own setting in place of the published figure.
    """

    kind: str
    verdict: Verdict
    at_paper_setting: bool = False
    reason: str = ""
    missed_figure: str = ""


class Judgement(NamedTuple):
    """A claim's verdict; of `asked` deciding experiments that were measured, `agreed` agree; or what is missing.

    `figure` says how the figure that the abstract prints stands to the verdict: not tried, or not met.
    """

    verdict: ClaimVerdict
    agreed: int = 0
    asked: int = 0
    reason: str = ""
    figure: str = ""

    def __str__(self) -> str:
        if self.verdict is ClaimVerdict.NOT_MEASURED:
            return f"not measured: {self.reason}" if self.reason else "not measured"
        words = str(self.verdict)
        if self.verdict is ClaimVerdict.MIXED:
            words = f"mixed, {self.agreed} of {self.asked}"
        if self.verdict is ClaimVerdict.SUPPORTED and self.figure:
            words = "supported in direction"
        return "; ".join(filter(None, (words, self.figure)))


def judge(kind: str, needs: str, outcomes: Sequence[Outcome], *, figure: str = "") -> Judgement:
    """The verdict of a claim of that kind, from the experiments that decide it.

    Only what was measured counts, and what was measured at the paper's own setting beats what was measured smaller.
    Counts and identities alone decide no claim about quality.

    Args:
        kind: of the claim.
        needs: what the claim takes where nothing was measured.
        outcomes: of all deciding experiments, measured or not.
        figure: what the abstract prints. It stands beside no verdict as if it had been tried where it was not.
    """
    measured = [outcome for outcome in outcomes if outcome.verdict not in NO_VERDICT]
    if not any(kind != "quality" or outcome.kind == "quality" for outcome in measured):
        reasons = [_why(outcome) for outcome in outcomes if outcome.reason]
        return Judgement(ClaimVerdict.NOT_MEASURED, reason=f"needs {needs}" if needs else next(iter(reasons), ""))
    if any(outcome.at_paper_setting and outcome.kind != "exact" for outcome in measured):
        measured = [outcome for outcome in measured if outcome.at_paper_setting or outcome.kind == "exact"]
    agreed = sum(outcome.verdict in AGREE for outcome in measured)
    contradicted = sum(outcome.verdict is Verdict.CONTRADICTED for outcome in measured)
    absent = [outcome for outcome in outcomes if outcome.verdict in NO_VERDICT]
    verdict = _verdict(measured, absent, agreed, contradicted)
    missed = [outcome.missed_figure for outcome in measured if outcome.missed_figure]
    # An identity beside a small measurement tries no figure that the abstract prints.
    inexact = [outcome for outcome in measured if outcome.kind != "exact"]
    tried = any(outcome.at_paper_setting for outcome in inexact or measured)
    note = "; ".join(missed) if missed else "" if tried else f"{figure} not tried"
    settled = verdict in (ClaimVerdict.VERIFIED, ClaimVerdict.REPRODUCED)
    return Judgement(verdict, agreed, len(measured), figure=note if figure and not settled else "")


def _verdict(measured: Sequence[Outcome], absent: Sequence[Outcome], agreed: int, contradicted: int) -> ClaimVerdict:
    """Of experiments that were measured, and of those that were not: without these nothing is verified, and without
    those of the paper's own setting nothing is reproduced.
    """
    if agreed == len(measured):
        verdicts = {outcome.verdict for outcome in measured}
        if verdicts == {Verdict.VERIFIED} and not absent:
            return ClaimVerdict.VERIFIED
        met = Verdict.REPRODUCED in verdicts and Verdict.SUPPORTED not in verdicts
        waiting = any(outcome.at_paper_setting for outcome in absent)
        return ClaimVerdict.REPRODUCED if met and not waiting else ClaimVerdict.SUPPORTED
    if agreed and contradicted:
        return ClaimVerdict.MIXED
    return ClaimVerdict.CONTRADICTED if contradicted else ClaimVerdict.INCONCLUSIVE


def _why(outcome: Outcome) -> str:
    """Why there is no verdict; what device or build lack is named."""
    return outcome.reason if outcome.verdict is Verdict.NOT_MEASURED else f"{outcome.verdict} {outcome.reason}"

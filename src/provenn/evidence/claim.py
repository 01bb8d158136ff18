"""The standing of a claim of the abstract: a pure function of the verdicts of its experiments."""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from provenn.evidence.verdict import NO_VERDICT, Verdict

PROVED = {Verdict.HOLDS, Verdict.REPRODUCED, Verdict.DIRECTION_HOLDS}


class Standing(StrEnum):
    """The verdict of a claim, from those of its experiments."""

    REPRODUCED = "reproduced"
    HOLDS_HERE = "holds here"
    PARTLY = "partly"
    OPEN = "open"
    NOT_HERE = "not here"
    NOT_MEASURED = "not measured"


class Outcome(NamedTuple):
    """An experiment's kind and verdict, whether it was measured at the paper's setting, and why there is no verdict."""

    kind: str
    verdict: Verdict
    at_paper_setting: bool = False
    reason: str = ""


class Judgement(NamedTuple):
    """A claim's standing; of `asked` experiments that were measured, `held` hold; or what is missing."""

    standing: Standing
    held: int = 0
    asked: int = 0
    reason: str = ""

    def __str__(self) -> str:
        if self.standing is Standing.PARTLY:
            return f"partly, {self.held} of {self.asked}"
        if self.standing is Standing.NOT_MEASURED and self.reason:
            return f"not measured: {self.reason}"
        return str(self.standing)


def judge(kind: str, needs: str, outcomes: Sequence[Outcome]) -> Judgement:
    """The standing of a claim of that kind.

    Only what was measured counts, and what was measured at the paper's setting beats what was measured smaller. A
    claim about quality is not settled by counts and identities alone, which can be evidence against it, never for it.
    Then:

    - all experiments hold: reproduced where each does at the paper's setting, else holds here;
    - some hold: partly; none holds and some interval lies wholly elsewhere: not here; none decides: open.
    """
    measured = [outcome for outcome in outcomes if outcome.verdict not in NO_VERDICT]
    deciding = [outcome for outcome in measured if kind != "quality" or outcome.kind == "quality"]
    if not deciding:
        reasons = [_why(outcome) for outcome in outcomes if outcome.reason]
        return Judgement(Standing.NOT_MEASURED, reason=f"needs {needs}" if needs else next(iter(reasons), ""))
    at_paper = [o for o in deciding if o.kind != "exact" and o.at_paper_setting]
    if at_paper:
        measured = [o for o in measured if o.at_paper_setting or o.kind == "exact"]
    holding = sum(outcome.verdict in PROVED for outcome in measured)
    against = sum(outcome.verdict is Verdict.NOT_REPRODUCED for outcome in measured)
    if holding == len(measured):
        full = all(o.verdict in (Verdict.HOLDS, Verdict.REPRODUCED) for o in measured)
        return Judgement(Standing.REPRODUCED if full else Standing.HOLDS_HERE, holding, holding)
    if holding:
        return Judgement(Standing.PARTLY, holding, len(measured))
    return Judgement(Standing.NOT_HERE if against else Standing.OPEN, 0, len(measured))


def _why(outcome: Outcome) -> str:
    """Why there is no verdict; what device or build lack is named."""
    return outcome.reason if outcome.verdict is Verdict.NOT_MEASURED else f"{outcome.verdict} {outcome.reason}"

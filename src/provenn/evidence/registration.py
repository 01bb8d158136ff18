"""Whether what decides an experiment stood in a commit before it was measured.

A record names the commit of the code that measured it, and a "+" where files differed from that commit. Without one,
region, settings and sides were committed before the first seed was run. The suite compares them with that commit.
"""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

from provenn import catalog
from provenn.catalog import Card
from provenn.evidence.record import Finding


class Registration(StrEnum):
    """How what decides an experiment stands to the measurement."""

    BEFORE = "registered before measuring"
    AMENDED = "amended afterwards"
    NOT = "not registered before measuring"


def registration(finding: Finding) -> Registration | None:
    """How region, settings and sides stand to the measurement; None where nothing was measured."""
    if finding.record is None or finding.run is None or finding.measurement.missed:
        return None
    if finding.experiment.amended:
        return Registration.AMENDED
    commit = finding.run.environment.commit
    return Registration.BEFORE if commit and not commit.endswith("+") else Registration.NOT


def in_words(finding: Finding) -> str:
    """The same with the commit, or with what moved; "" where nothing was measured."""
    which = registration(finding)
    if which is Registration.BEFORE and finding.run is not None:
        roles = catalog.card(finding.paper).roles if finding.paper in catalog.cards() else None
        early = roles is not None and finding.run.date.date() <= roles.chosen
        return f"{which}, at {finding.run.environment.commit}{', the region alone' if early else ''}"
    return f"{which}: {finding.experiment.amended}" if which is Registration.AMENDED else str(which or "")


def departs(finding: Finding) -> str:
    """Words for what was not registered before it was measured, which stand beside it everywhere; "" of all else."""
    return "" if registration(finding) is Registration.BEFORE else in_words(finding)


def tally(card: Card, findings: Sequence[Finding]) -> str:
    """How many records were registered, and whether it was chosen later what decides."""
    counts = Counter(filter(None, map(registration, findings)))
    words = [f"{counts[which]} {which}" for which in Registration if counts[which]]
    roles = card.roles
    if roles is not None and any(f.run is not None and f.run.date.date() <= roles.chosen for f in findings):
        words.append(f"which of them decide was chosen on {roles.chosen}, {roles.how}")
        words.append("up to that day a commit is known to hold the region alone")  # other files were not looked at
    return "; ".join(words)

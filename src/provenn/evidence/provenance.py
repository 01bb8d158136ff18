"""Whether a record is of the code that stands: its digest beside the one that ships with the paper.

`digests.json` in a paper's folder holds the digest of what measures each experiment. It is written by `provenn verify
--digests`, and the suite holds it to the code. So no view has to read code, and the file's changes show which
experiments a commit touches.
"""

import json
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from functools import cache
from pathlib import Path

from provenn import catalog
from provenn.catalog import Card
from provenn.evidence.record import Finding, Record, Repeated

DIGESTS = "digests.json"


class Provenance(StrEnum):
    """Which code a record is of."""

    STANDS = "of the code that stands"
    VERIFIED = "verified"
    CHANGED = "measured with code that has changed since"
    UNKNOWN = "of code that was not compared"


def provenance_of(record: Record, digest: str) -> Provenance:
    """Which code a record is of, where `digest` is that of the code that stands."""
    if record.code == digest:
        return Provenance.STANDS
    verified = record.verified
    if verified is not None and verified.code == digest and verified.outcome is not Repeated.DIFFERS:
        return Provenance.VERIFIED
    return Provenance.CHANGED


def provenance(finding: Finding) -> Provenance | None:
    """Which code a finding's record is of; None where nothing was measured."""
    if finding.record is None or finding.record.measurement.missed:
        return None
    digest = digests_of(catalog.card(finding.paper)).get(finding.experiment.id)
    at_own_setting = not finding.overrides and finding.run is not None and finding.run.budget != "paper"
    return Provenance.UNKNOWN if digest is None or not at_own_setting else provenance_of(finding.record, digest)


def in_words(finding: Finding) -> str:
    """Which code a finding's record is of, in words; "" where nothing was measured."""
    stands = provenance(finding)
    verified = None if finding.record is None else finding.record.verified
    if stands is Provenance.VERIFIED and verified is not None:
        return f"verified at {verified.commit or f'{verified.date:%Y-%m-%d}'}"
    return str(stands or "")


def tally(findings: Iterable[Finding]) -> str:
    """How many records are of which code.

    >>> tally([])
    ''
    """
    counts = Counter(filter(None, map(provenance, findings)))
    return ", ".join(f"{counts[stands]} {stands}" for stands in Provenance if counts[stands])


def all_alike(findings: Iterable[Finding]) -> bool:
    """Whether all records are of the same code, so that one line says it of them; those that name a commit are not."""
    found = {*filter(None, map(provenance, findings))}
    return len(found) <= 1 and Provenance.VERIFIED not in found


def digests_of(card: Card) -> dict[str, str]:
    """The digest of what measures each experiment of a paper; {} where none ship that can be read."""
    file = card.folder / DIGESTS
    try:
        return _read(file, file.stat().st_mtime_ns)
    except (OSError, ValueError):
        return {}


@cache
def _read(file: Path, changed: int) -> dict[str, str]:
    facts = json.loads(file.read_bytes())
    return {str(name): str(code) for name, code in facts.items()} if isinstance(facts, dict) else {}

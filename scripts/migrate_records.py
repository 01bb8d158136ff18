"""Rewrite records with the words of today, and show that no value has changed.

    python scripts/migrate_records.py run/*/evidence.json
    python scripts/migrate_records.py --judge src/provenn/papers/*/evidence.json
    python scripts/migrate_records.py --compare ba0d8cf src/provenn/papers/*/evidence.json

The first line renames keys (`claim` to `experiment`, `occasion` to `run`, and so on), words in notes, and verdicts
(`holds` to `verified`, `direction holds` to `supported`, `not reproduced` to `contradicted`). The second
judges each record by its numbers and the region that stands in paper.toml, which says with `amended` what moved. The
third compares each file with what it was at a commit: every number in order, and every verdict by today's word.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provenn import catalog
from provenn.core.files import write_atomically
from provenn.evidence.record import SCHEMA_VERSION, Evidence, Record, compact

KEYS = {
    "occasions": "runs",
    "occasion": "run",
    "claim": "experiment",
    "changes": "overrides",
    "arm": "variant",
    "trivial": "dummy_baseline",
}
WORDS = [
    (r"\btrivial predictor\b", "dummy baseline"),
    (r"\bAll arms\b", "All variants"),
    (r"\bevery arm\b", "every variant"),
    (r"\bone arm\b", "one variant"),
    (r"\bthat is what the statement says\b", "that is what the claim says"),
    (r"; at each place its number is told\b", "; at each position its number is to be predicted"),
    (r"; the one that stood 7 before is told\b", "; the one that stood 7 before is to be predicted"),
    (
        r", of which the one that stood 40 before is told\b",
        ", of which the one that stood 40 before is to be predicted",
    ),
    (r"; every second is told first\b", "; every second is to be predicted first"),
    (r"; the mean length of the paths is told\b", "; the mean length of the paths is to be predicted"),
    (r", to be told in their order at the end\b", ", to be predicted in their order at the end"),
]
VERDICTS = {"holds": "verified", "direction holds": "supported", "not reproduced": "contradicted"}
MEASURED = ("setting", "values", "baselines", "series", "tables", "pictures")  # whose own keys are not renamed


def renamed(value: Any, within: str = "") -> Any:
    """The same content with the words of today; what a measurement's setting calls its options stays."""
    if isinstance(value, dict):
        inside = within in MEASURED
        return {
            key if inside else KEYS.get(key, key): renamed(item, within if inside else key)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [renamed(item, within) for item in value]
    if isinstance(value, str):
        for old, new in WORDS:
            value = re.sub(old, new, value)
    return value


def migrate(file: Path) -> bool:
    """Rewrite a file, unless it is of today already; returns whether it was rewritten."""
    facts = json.loads(file.read_text(encoding="utf-8"))
    if facts.get("schema_version", 2) >= SCHEMA_VERSION:
        return False
    if facts.pop("schema_version", 2) < 4:
        facts = renamed(facts)
    for record in facts["records"]:
        record["verdict"] = verdict_of(record)
        if "reason" in record:
            record["reason"] = record["reason"].replace("nothing was learned:", "below the dummy baseline:")
    write_atomically(file, compact({"schema_version": SCHEMA_VERSION, **facts}))
    Evidence.read(file)
    return True


def verdict_of(record: dict[str, Any]) -> str:
    """A record's verdict by today's word; an identity or a count that is exactly so is verified, never reproduced."""
    exact = record["measurement"].get("method") == "exact"
    word = record["verdict"]
    return "verified" if exact and word == "reproduced" else VERDICTS.get(word, word)


def values(facts: Any) -> Iterator[Any]:
    """Every number and truth value in order, and the verdicts."""
    if isinstance(facts, dict):
        for key, item in facts.items():
            if key == "verdict":
                yield verdict_of(facts)
            elif key == "expects":
                yield item
            elif key != "schema_version":
                yield from values(item)
    elif isinstance(facts, list):
        for item in facts:
            yield from values(item)
    elif not isinstance(facts, str):
        yield facts


def differences(file: Path, revision: str) -> int:
    """How many values of a file differ from those that it had at a commit."""
    words = ["git", "show", f"{revision}:./{file.name}"]
    before = json.loads(subprocess.run(words, capture_output=True, text=True, check=True, cwd=file.parent).stdout)
    now = list(values(json.loads(file.read_text(encoding="utf-8"))))
    old = list(values(before))
    return sum(repr(a) != repr(b) for a, b in zip(old, now, strict=False)) + abs(len(old) - len(now))


def judge(file: Path) -> int:
    """Judge each record by its numbers and today's region; returns how many verdicts or regions are others."""
    evidence = Evidence.read(file)
    card, count = catalog.card(evidence.paper), 0
    for i, record in enumerate(evidence.records):
        budget = evidence.runs[record.run].budget
        again = Record.of(
            card.experiment(record.experiment), record.measurement, budget=budget, overrides=record.overrides
        )
        told = {"verdict": again.verdict, "reason": again.reason, "expects": again.expects}
        if any(getattr(record, name) != value for name, value in told.items()):
            print(f"{evidence.paper} {record.experiment}: {record.verdict}, {record.expects} → {told}")
            evidence.records[i] = record.model_copy(update=told)
            count += 1
    if count:
        evidence.write(file)
    return count


def main() -> int:
    """Exit code 1 where a value differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--compare", metavar="REVISION")
    parser.add_argument("--judge", action="store_true")
    given = parser.parse_args()
    total = 0
    for file in given.files:
        if given.compare:
            count = differences(file, given.compare)
            total += count
            print(f"{file}: {count} values differ")
        elif given.judge:
            print(f"{file}: {judge(file)} judged otherwise")
        else:
            print(f"{file}: {'rewritten' if migrate(file) else 'of today already'}")
    return int(total > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""Rewrite records of provenn 0.1 with the words of 0.2, and show that no value has changed.

    python scripts/migrate_records.py run/*/evidence.json
    python scripts/migrate_records.py --compare ba0d8cf src/provenn/papers/*/evidence.json

The first line renames keys (`claim` to `experiment`, `occasion` to `run`, and so on) and words in notes. The second
compares each file with what it was at a commit: every number and every verdict in order.
"""

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provenn.core.files import write_atomically
from provenn.evidence.record import SCHEMA_VERSION, Evidence, compact

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
    facts.pop("schema_version", None)
    write_atomically(file, compact({"schema_version": SCHEMA_VERSION, **renamed(facts)}))
    Evidence.read(file)
    return True


def values(facts: Any) -> Iterator[Any]:
    """Every number and truth value in order, and the verdicts."""
    if isinstance(facts, dict):
        for key, item in facts.items():
            if key in ("verdict", "expects"):
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


def main() -> int:
    """Exit code 1 where a value differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--compare", metavar="REVISION")
    given = parser.parse_args()
    total = 0
    for file in given.files:
        if given.compare:
            count = differences(file, given.compare)
            total += count
            print(f"{file}: {count} values differ")
        else:
            print(f"{file}: {'rewritten' if migrate(file) else 'of today already'}")
    return int(total > 0)


if __name__ == "__main__":
    raise SystemExit(main())

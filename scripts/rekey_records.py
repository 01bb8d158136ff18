"""Give records the new digests of their code, after a change of what a digest holds and of nothing else.

    python scripts/rekey_records.py COMMIT

A record, or a verification, that holds the digest which stood for its experiment at COMMIT gets today's. Refused where
code between COMMIT and the working tree differs in more than the digest itself.
"""

import json
import subprocess
import sys
from pathlib import Path

from provenn.core.files import write_atomically
from provenn.evidence.record import compact

ROOT = Path(__file__).resolve().parents[1]
DIGEST = "src/provenn/core/digest.py"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def rekeyed(record: dict, old: dict[str, str], new: dict[str, str]) -> int:
    """Change the digests in a record that are its experiment's old one; how many were."""
    name, changed = record["experiment"], 0
    for part in (record, record.get("verified") or {}):
        if name in old and part.get("code") == old[name] != new[name]:
            part["code"] = new[name]
            changed += 1
    return changed


def main(commit: str) -> None:
    differ = [name for name in git("diff", "--name-only", commit, "--", "src").split() if not name.endswith(".json")]
    if differ != [DIGEST]:
        sys.exit(f"rekey_records: besides {DIGEST} other code differs from {commit}: {', '.join(differ) or 'none'}")
    for file in sorted(ROOT.glob("src/provenn/papers/*/evidence.json")):
        digests = file.with_name("digests.json")
        old = json.loads(git("show", f"{commit}:{digests.relative_to(ROOT)}"))
        evidence = json.loads(file.read_text())
        if changed := sum(rekeyed(record, old, json.loads(digests.read_text())) for record in evidence["records"]):
            write_atomically(file, compact(evidence))
            print(f"{file.parent.name}: {changed}")


if __name__ == "__main__":
    main(*sys.argv[1:])

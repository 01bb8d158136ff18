"""One self-contained HTML file a run: a view of its records."""

from pathlib import Path

from provenn.evidence.record import write_atomically
from provenn.evidence.view import ledgers


def write(folder: Path) -> Path:
    """Draw `folder/report.html` from the records in the folder."""
    page = folder / "report.html"
    write_atomically(page, "<!doctype html>" + "".join(f"<p>{ledger.paper}" for ledger in ledgers(folder)))
    return page

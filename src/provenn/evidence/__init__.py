"""Claims become measurements, measurements become records, and one function gives each verdict.

Names are loaded when they are asked for: records are read without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from provenn.evidence.claim import measures
    from provenn.evidence.measurement import Measurement, Picture, Series, Table
    from provenn.evidence.race import Race
    from provenn.evidence.record import Evidence, Finding, Record
    from provenn.evidence.run import Run
    from provenn.evidence.statement import judge
    from provenn.evidence.study import Drawing, Study
    from provenn.evidence.verdict import Verdict, decide

HOMES = {
    "Drawing": "study", "Evidence": "record", "Finding": "record", "Measurement": "measurement", "Picture": "measurement",
    "Race": "race", "Record": "record", "Run": "run", "Series": "measurement", "Study": "study", "Table": "measurement",
    "Verdict": "verdict", "decide": "verdict", "judge": "statement", "measures": "claim",
}  # fmt: skip

__all__ = [
    "Drawing", "Evidence", "Finding", "Measurement", "Picture", "Race", "Record", "Run", "Series", "Study", "Table",
    "Verdict", "decide", "judge", "measures",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)

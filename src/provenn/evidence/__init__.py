"""Experiments become measurements, measurements become records, and one function gives each verdict.

Names are loaded when they are asked for: records are read without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from provenn.evidence.benchmark import Benchmark
    from provenn.evidence.claim import judge
    from provenn.evidence.experiment import measures
    from provenn.evidence.measurement import Measurement, Picture, Series, Skill, Table
    from provenn.evidence.record import Evidence, Finding, Record
    from provenn.evidence.run import Run
    from provenn.evidence.study import Drawing, Study
    from provenn.evidence.sweep import Point, Sweep
    from provenn.evidence.timing import Timing
    from provenn.evidence.verdict import Verdict, decide

HOMES = {
    "benchmark": ("Benchmark",),
    "experiment": ("measures",),
    "measurement": ("Measurement", "Picture", "Series", "Skill", "Table"),
    "timing": ("Timing",),
    "record": ("Evidence", "Finding", "Record"),
    "run": ("Run",),
    "claim": ("judge",),
    "study": ("Drawing", "Study"),
    "sweep": ("Point", "Sweep"),
    "verdict": ("Verdict", "decide"),
}

__all__ = [
    "Benchmark",
    "Drawing",
    "Evidence",
    "Finding",
    "Measurement",
    "Picture",
    "Point",
    "Record",
    "Run",
    "Series",
    "Skill",
    "Study",
    "Sweep",
    "Table",
    "Timing",
    "Verdict",
    "decide",
    "judge",
    "measures",
]


def __getattr__(name: str) -> Any:
    for module, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

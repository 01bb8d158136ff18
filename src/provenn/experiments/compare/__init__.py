"""Mechanisms of one slot in the same host, at equal budget.

Names are loaded when they are asked for: what a comparison found is read without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from provenn.experiments.compare.comparison import compare
    from provenn.experiments.compare.hosts import host_for, hosts_of
    from provenn.experiments.compare.outcome import COSTS, Candidate, SlotComparison

_HOMES = {
    "compare": "comparison",
    **dict.fromkeys(("host_for", "hosts_of"), "hosts"),
    **dict.fromkeys(("COSTS", "Candidate", "SlotComparison"), "outcome"),
}
__all__ = ["COSTS", "Candidate", "SlotComparison", "compare", "host_for", "hosts_of"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

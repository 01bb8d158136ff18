"""Context parallelism, measured: the methods of `provenn.distributed` on the benchmark's masks.

The methods themselves, and how a new one joins, are in `provenn.distributed`; language models use them too.
"""

from provenn.distributed import METHODS, Method, Pattern, Placement, Simulation, Slice, Spread, register
from provenn.papers.long_context_bench.context_parallel.bench import Report, Row, bench
from provenn.papers.long_context_bench.context_parallel.costs import (
    Choice,
    Cost,
    Heads,
    Machine,
    Volume,
    cost,
    describe,
    imbalance,
    plan,
    volume,
    work,
)
from provenn.papers.long_context_bench.context_parallel.patterns import pattern_of
from provenn.papers.long_context_bench.context_parallel.processes import launch

__all__ = [
    "METHODS",
    "Choice",
    "Cost",
    "Heads",
    "Machine",
    "Method",
    "Pattern",
    "Placement",
    "Report",
    "Row",
    "Simulation",
    "Slice",
    "Spread",
    "Volume",
    "bench",
    "cost",
    "describe",
    "imbalance",
    "launch",
    "pattern_of",
    "plan",
    "register",
    "volume",
    "work",
]

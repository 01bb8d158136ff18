"""Context parallelism: attention over one sequence whose tokens several processes hold, forward and backward."""

from provenn.nn.context_parallel.attention import Simulation, Spread
from provenn.nn.context_parallel.communicator import (
    Communicator,
    ProcessTransport,
    Sent,
    ThreadTransport,
    Traffic,
    rank_lost,
    simulate,
    speaks_of_lost_rank,
)
from provenn.nn.context_parallel.methods import METHODS, Method, method_called, register
from provenn.nn.context_parallel.placement import LAYOUTS, Pattern, Placement
from provenn.nn.context_parallel.slices import Inputs, Partial, Rows, Slice, attend, attend_backward
from provenn.nn.context_parallel.switch import ContextParallel, switch_on, why_not

__all__ = [
    "LAYOUTS",
    "METHODS",
    "Communicator",
    "ContextParallel",
    "Inputs",
    "Method",
    "Partial",
    "Pattern",
    "Placement",
    "ProcessTransport",
    "Rows",
    "Sent",
    "Simulation",
    "Slice",
    "Spread",
    "ThreadTransport",
    "Traffic",
    "attend",
    "attend_backward",
    "method_called",
    "rank_lost",
    "register",
    "simulate",
    "speaks_of_lost_rank",
    "switch_on",
    "why_not",
]

"""Context parallelism: attention over one sequence whose tokens several processes hold, forward and backward."""

from provenn.distributed.attention import Simulation, Spread
from provenn.distributed.communicator import (
    Communicator,
    ProcessTransport,
    Sent,
    ThreadTransport,
    Traffic,
    rank_lost,
    simulate,
    speaks_of_lost_rank,
)
from provenn.distributed.methods import METHODS, Method, Sharing, method_called, register
from provenn.distributed.placement import LAYOUTS, Pattern, Placement
from provenn.distributed.slices import Inputs, Partial, Rows, Slice, attend, attend_backward
from provenn.distributed.switch import ContextParallel, switch_on, why_not

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
    "Sharing",
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

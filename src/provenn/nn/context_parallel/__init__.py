"""Context parallelism: attention over one sequence whose tokens several processes hold, forward and backward."""

from provenn.nn.context_parallel.attention import Simulation, Spread
from provenn.nn.context_parallel.communicator import (
    Communicator,
    ProcessTransport,
    RankLost,
    Sent,
    ThreadTransport,
    Traffic,
    simulate,
)
from provenn.nn.context_parallel.methods import METHODS, Method, method_called, register
from provenn.nn.context_parallel.placement import LAYOUTS, Pattern, Placement
from provenn.nn.context_parallel.slices import Partial, Slice, attend, attend_backward
from provenn.nn.context_parallel.switch import ContextParallel, switch_on, why_not

__all__ = [
    "LAYOUTS",
    "METHODS",
    "Communicator",
    "ContextParallel",
    "Method",
    "Partial",
    "Pattern",
    "Placement",
    "ProcessTransport",
    "RankLost",
    "Sent",
    "Simulation",
    "Slice",
    "Spread",
    "ThreadTransport",
    "Traffic",
    "attend",
    "attend_backward",
    "method_called",
    "register",
    "simulate",
    "switch_on",
    "why_not",
]

"""Mechanisms of one slot in the same host, at equal budget."""

from provenn.compare.comparison import COSTS, Candidate, SlotComparison, compare
from provenn.compare.hosts import HOSTS, Host, host_for

__all__ = ["COSTS", "HOSTS", "Candidate", "Host", "SlotComparison", "compare", "host_for"]

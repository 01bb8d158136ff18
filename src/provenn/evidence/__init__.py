"""Claims become measurements, measurements become records, and one function gives the verdict."""

from provenn.evidence.claim import measures
from provenn.evidence.measurement import Measurement, Picture, Series, Table
from provenn.evidence.record import Ledger, Record
from provenn.evidence.run import Run
from provenn.evidence.verdict import Verdict, decide

__all__ = ["Ledger", "Measurement", "Picture", "Record", "Run", "Series", "Table", "Verdict", "decide", "measures"]

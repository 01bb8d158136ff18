"""The command line. Every import that is slow lies inside the verb that needs it: `list` and `show` import no torch."""

from provenn.cli import convert, doctor, find, measure, work
from provenn.cli.app import app, main

__all__ = ["app", "convert", "doctor", "find", "main", "measure", "work"]

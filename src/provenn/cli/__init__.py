"""The command line. Every import that is slow lies inside the verb that needs it: `list` and `show` import no torch."""

from provenn.cli import convert, data, doctor, embed, find, measure, prune, sizes, verify, web, work
from provenn.cli.app import app, main

__all__ = [
    "app",
    "convert",
    "data",
    "doctor",
    "embed",
    "find",
    "main",
    "measure",
    "prune",
    "sizes",
    "verify",
    "web",
    "work",
]

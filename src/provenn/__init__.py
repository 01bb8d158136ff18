"""Papers that run, claims that are checked."""

__version__ = "0.1.0"

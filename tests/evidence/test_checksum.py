"""A checksum of code depends on what the code does, and on nothing that changes while it runs."""

from provenn import progress
from provenn.evidence.checksum import checksum
from provenn.tasks import fit

LIMIT = 3
_state = 0.0


def limited(x: float) -> float:
    return min(x, LIMIT) + 0 * _state


def test_a_constant_changes_it(monkeypatch):
    before = checksum(limited, packages=("test_checksum",))
    monkeypatch.setitem(globals(), "LIMIT", 4)
    assert checksum(limited, packages=("test_checksum",)) != before


def test_the_state_of_a_module_does_not(monkeypatch):
    """While a long run writes a log, the time of its last line changes: its trials are known all the same."""
    before, of_training = checksum(limited, packages=("test_checksum",)), checksum(fit)
    monkeypatch.setitem(globals(), "_state", 1.0)
    monkeypatch.setattr(progress, "_log", 12345.6)
    assert checksum(limited, packages=("test_checksum",)) == before
    assert checksum(fit) == of_training

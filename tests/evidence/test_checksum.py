"""What code does changes its checksum, three calls away too; how it is written down does not."""

import importlib
import sys

import pytest

from provenn.core import progress
from provenn.evidence.checksum import checksum
from provenn.training import fit

HELPERS = '''
LIMIT = 3

class Layer:
    """A layer."""
    def forward(self, x):
        return x * LIMIT
'''
CODE = '''
from functools import cache, partial
from sample_code import helpers
from sample_code.helpers import Layer

def inner(x, scale=2):
    """Twice."""
    return scale * x  # or so

@cache
def kept(x):
    return x / 7

def outer(x):
    return inner(x) + 1 + kept(x)

def by_module(x):
    return helpers.Layer().forward(x)

def closing(factor):
    return lambda x: inner(x) * factor

wrapped = partial(outer, x=1)
'''


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Writes a package and imports it anew."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(code: str = CODE, helpers: str = HELPERS):
        folder = tmp_path / "sample_code"
        folder.mkdir(exist_ok=True)
        for name, text in (("__init__", ""), ("code", code), ("helpers", helpers)):
            (folder / f"{name}.py").write_text(text)
        for name in [name for name in sys.modules if name.startswith("sample_code")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        import linecache

        linecache.clearcache()
        return importlib.import_module("sample_code.code")

    return written


NAMES = ("outer", "by_module", "wrapped")


def sums(module) -> dict[str, str]:
    known = {name: checksum(getattr(module, name), packages=("sample_code",)) for name in NAMES}
    return {**known, "closing": checksum(module.closing(2), packages=("sample_code",))}


def test_comments_docstrings_and_layout_do_not_count(sample):
    before = sums(sample())
    prettier = (
        CODE.replace("# or so", "").replace('"""Twice."""', '"""Two times."""').replace("scale * x", "(scale *  x)")
    )
    assert sums(sample(prettier, HELPERS.replace("A layer.", "One layer."))) == before


@pytest.mark.parametrize(
    "old, new, changed",
    [
        ("scale * x", "scale + x", {"outer", "wrapped", "closing"}),
        ("scale=2", "scale=3", {"outer", "wrapped", "closing"}),
        ("+ 1", "+ 2", {"outer", "wrapped"}),
        ("x / 7", "x / 8", {"outer", "wrapped"}),
        ("x=1", "x=5", {"wrapped"}),
        ("LIMIT = 3", "LIMIT = 4", {"by_module"}),
        ("x * LIMIT", "x - LIMIT", {"by_module"}),
    ],
)
def test_what_the_code_does_counts(sample, old, new, changed):
    before = sums(sample())
    after = sums(sample(CODE.replace(old, new), HELPERS.replace(old, new)))
    assert {name for name in before if before[name] != after[name]} == changed


def test_what_a_function_closes_over_counts(sample):
    module = sample()
    assert checksum(module.closing(2)) != checksum(module.closing(3))


def test_code_of_others_counts_by_its_name():
    import torch

    assert checksum(torch.nn.Linear) == checksum(torch.nn.Linear) != checksum(torch.nn.Conv2d)
    assert checksum(torch.ones(2)) != checksum(torch.zeros(2))


def test_the_state_of_a_module_does_not_change_it(monkeypatch):
    """While a long run writes a log, the time of its last line changes: its trials are known all the same."""
    before = checksum(fit)
    monkeypatch.setattr(progress, "_log", 12345.6)
    assert checksum(fit) == before

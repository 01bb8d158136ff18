"""Methods with sizes of the user's: registered once, and refused in one line where the sizes do not divide."""

import pytest

from provenn.cli.hardware import RunOptions
from provenn.core.errors import UserError
from provenn.distributed import METHODS, method_called
from provenn.distributed.sizes import sized_method


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in list(METHODS):
        monkeypatch.setitem(METHODS, name, METHODS[name])
    before = set(METHODS)
    yield
    for name in set(METHODS) - before:
        del METHODS[name]


def test_a_sized_method_has_its_sizes_and_is_registered_once():
    run = RunOptions(context_parallel=4, context_method="loongtrain", context_ulysses=1, context_windows=2)
    name = run.method
    method = method_called(name)
    assert method.mesh(4) == (4, 1) and method.windows == 2 and run.method == name
    assert RunOptions(context_parallel=4).method == "ring" == sized_method("ring", 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_method": "usp", "context_ulysses": 3}, "usp: ulysses=3 does not divide 4 processes"),
        ({"context_method": "loongtrain", "context_ulysses": 1, "context_windows": 3}, "does not divide a ring of 4"),
        ({"context_method": "ring", "context_windows": 2}, "ring does not take windows"),
        ({"context_method": "ulysses", "context_ulysses": 2}, "ulysses does not take ulysses"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as refusal:
        _ = RunOptions(context_parallel=4, **options).method
    assert len(str(refusal.value).splitlines()) == 1

"""What decides a value changes its digest, three calls away too; how it is written and where it stands does not."""

import ast
import importlib
import linecache
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import provenn
from provenn.core import progress
from provenn.core.digest import Unfollowable, digest, looks_up
from provenn.core.syntax import _dumped, _Transformer, node_of
from provenn.evidence.experiment import measuring_functions
from provenn.tasks import get_task
from provenn.training import fit

HELPERS = '''
import enum
import re
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch import nn

LIMIT = 3
RATES = (1e-3, 3e-3)
OPTIONS = {"epochs": 4}
WEIGHTS = torch.tensor([1.0, 2.0])
TABLE = np.arange(3)
NAMES = frozenset({"a", "b"})
WORD = re.compile("x+")
_counted = 0
_SEEN = {}
FILLED = {}

def fill(name, value):
    FILLED[name] = value

fill("a", 71)

class Kind(enum.Enum):
    SMALL = 1
    LARGE = 2

class Layer:
    """A layer."""

    scale = 5

    def forward(self, x):
        return x * LIMIT

    @property
    def size(self):
        return 11

    @cached_property
    def held(self):
        return 12

    @staticmethod
    def plain(x):
        return x + 13

    @classmethod
    def made(cls):
        return 14

class Child(Layer):
    pass

class Point(NamedTuple):
    x: int = 21

@dataclass(frozen=True)
class Study:
    name: str
    epochs: int = 31
    rates: tuple = (32,)
    build: object = None

    def against(self, other):
        return self.epochs - other

def network(width=41):
    return nn.Linear(width, 1)

STUDY = Study("bands", build=partial(network, width=42))
OBJECT = Layer()
MODULE = nn.Linear(1, 1, bias=False)
with torch.no_grad():
    MODULE.weight.fill_(51.0)

def count():
    global _counted
    _counted += 1
    _SEEN[_counted] = FILLED["a"]
    return _counted, _SEEN

def place():
    return __file__, __name__, __package__
'''
CODE = '''
from functools import cache, partial

from sample_code import helpers
from sample_code.helpers import Child, Kind, Layer, Point

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

def by_child(x):
    return Child().forward(x)

def closing(factor):
    return lambda x: inner(x) * factor

def imports_inside(x):
    from sample_code.helpers import network
    return network()(x)

def study(x): return helpers.STUDY.against(x)
def rates(x): return [x * rate for rate in helpers.RATES]
def options(x): return helpers.OPTIONS["epochs"]
def weights(x): return helpers.WEIGHTS * x
def table(x): return helpers.TABLE + x
def names(x): return x in helpers.NAMES
def word(x): return helpers.WORD.match(x)
def kind(x): return Kind.SMALL
def point(x): return Point()
def module(x): return helpers.MODULE(x)
def an_object(x): return helpers.OBJECT.forward(x)
def counts(x): return helpers.count()
def placed(x): return helpers.place()

wrapped = partial(outer, x=1)
made_here = closing(2)
two_deep = lambda x: lambda y: x + y + 73
nested = two_deep(75)
two = (lambda x: x + 61), (lambda x: x + 62)
'''
READS = (
    *("outer", "by_module", "by_child", "imports_inside", "study", "rates", "options", "weights", "table", "names"),
    *("word", "kind", "point", "module", "an_object", "counts", "placed", "wrapped", "made_here", "two", "nested"),
)
LAYER = {"by_module", "by_child", "an_object"}


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Writes a package, imports it anew, and gives the digest of each thing that its code names."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def written(code: str = CODE, helpers: str = HELPERS, module: str = "helpers", names: tuple = READS) -> dict:
        folder = tmp_path / "sample_code"
        folder.mkdir(exist_ok=True)
        for name, text in (("__init__", ""), ("code", code), (module, helpers)):
            (folder / f"{name}.py").write_text(text)
        for name in [name for name in sys.modules if name.startswith("sample_code")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        linecache.clearcache()
        loaded = importlib.import_module("sample_code.code")
        return {name: digest(getattr(loaded, name), packages=("sample_code",)) for name in names}

    return written


def test_comments_docstrings_annotations_and_layout_do_not_count(sample):
    before = sample()
    code = CODE.replace("# or so", "").replace('"""Twice."""', '"""Two times."""').replace("scale * x", "(scale *  x)")
    code = code.replace("def inner(x, scale=2)", "def inner(x: float, scale: int = 2) -> float")
    assert (
        sample(code, HELPERS.replace("A layer.", "One layer.").replace("    pass\n", '    """A child."""\n')) == before
    )


RAISES = """
def outer(x):
    if x > 3:
        raise ValueError(f"x must be at most {LIMIT}, got {x}", 3)
    raise KeyError("no such", name="x") from None
LIMIT = 3
"""


@pytest.mark.parametrize(
    "old, new, counts",
    [
        ('f"x must be at most {LIMIT}, got {x}"', '"x is too large"', False),
        ("LIMIT = 3", "LIMIT = 4", False),
        ('"no such"', '"nothing of the kind"', False),
        ('name="x"', 'name=f"{x}"', False),
        ("ValueError", "TypeError", True),
        (", 3)", ", 4)", True),
        ("x > 3", "x > 4", True),
        ('"no such"', "x", True),
        ("from None", "from ValueError()", True),
    ],
)
def test_of_an_error_all_counts_but_what_it_says(sample, old, new, counts):
    before, code = sample(RAISES, names=("outer",)), RAISES.replace(old, new)
    assert code != RAISES
    assert (sample(code, names=("outer",)) != before) == counts


def test_names_of_functions_classes_variables_and_modules_do_not_count(sample):
    before = sample()
    code = CODE.replace("inner", "scaled").replace("kept", "seventh").replace("Child", "Heir")
    code = code.replace(
        "def outer(x):\n    return scaled(x) + 1 + seventh(x)", "def outer(y):\n    return scaled(y) + 1 + seventh(y)"
    )
    code = code.replace("wrapped = partial(outer, x=1)", "wrapped = partial(outer, y=1)")
    code = code.replace("helpers", "parts").replace("for rate in", "for each in").replace("x * rate", "x * each")
    helpers = HELPERS.replace("Child", "Heir").replace("LIMIT", "BOUND").replace("network", "make")
    after = sample(code.replace("network", "make"), helpers, "parts")
    assert {name for name in before if before[name] != after[name]} == {"wrapped"}, "given by keyword"


@pytest.mark.parametrize(
    "old, new, changed",
    [
        ("scale * x", "scale + x", {"outer", "wrapped", "made_here"}),
        ("scale=2", "scale=3", {"outer", "wrapped", "made_here"}),
        ("+ 1 +", "+ 2 +", {"outer", "wrapped"}),
        ("x / 7", "x / 8", {"outer", "wrapped"}),
        ("x=1)", "x=5)", {"wrapped"}),
        ("closing(2)", "closing(3)", {"made_here"}),
        ("x + 61", "x + 60", {"two"}),
        ("x + 62", "x + 63", {"two"}),
        ("LIMIT = 3", "LIMIT = 4", LAYER),
        ("x * LIMIT", "x - LIMIT", LAYER),
        ("scale = 5", "scale = 6", LAYER),
        ("return 11", "return 10", LAYER),
        ("return 12", "return 10", LAYER),
        ("x + 13", "x + 10", LAYER),
        ("return 14", "return 10", LAYER),
        ("x: int = 21", "x: int = 22", {"point"}),
        ("epochs: int = 31", "epochs: int = 33", {"study"}),
        ("(32,)", "(33,)", {"study"}),
        ("width=42", "width=43", {"study"}),
        ("width=41", "width=44", {"study", "imports_inside"}),
        ("self.epochs - other", "self.epochs + other", {"study"}),
        ('Study("bands"', 'Study("other"', {"study"}),
        ("3e-3", "4e-3", {"rates"}),
        ('"epochs": 4', '"epochs": 1', {"options"}),
        ("1.0, 2.0", "1.0, 2.5", {"weights"}),
        ("arange(3)", "arange(4)", {"table"}),
        ('{"a", "b"}', '{"a", "c"}', {"names"}),
        ('"x+"', '"y+"', {"word"}),
        ("SMALL = 1", "SMALL = 3", {"kind"}),
        ("Kind.SMALL", "Kind.LARGE", {"kind"}),
        ("fill_(51.0)", "fill_(52.0)", {"module"}),
        ("_counted += 1", "_counted += 2", {"counts"}),
        ("_counted = 0", "_counted = 7", set()),
        ("_SEEN = {}", "_SEEN = {5: 6}", set()),
        ('fill("a", 71)', 'fill("a", 72)', set()),
        ("lambda y: x + y + 73", "lambda y: x + y + 74", {"nested"}),
        ("nested = two_deep(75)", "nested = two_deep(76)", {"nested"}),
    ],
)
def test_each_kind_of_thing_that_is_read_counts_and_nothing_else(sample, old, new, changed):
    before, (code, helpers) = sample(), (text.replace(old, new) for text in (CODE, HELPERS))
    assert (code, helpers) != (CODE, HELPERS)
    after = sample(code, helpers)
    assert {name for name in before if before[name] != after[name]} == changed


def test_code_of_others_counts_by_its_name():
    assert digest(torch.nn.Linear) == digest(torch.nn.Linear) != digest(torch.nn.Conv2d)
    assert digest(torch.ones(2)) != digest(torch.zeros(2)) != digest(torch.zeros(2, dtype=torch.float64))
    assert digest(torch.nn.functional.relu) != digest(torch.nn.functional.gelu)


@pytest.mark.parametrize(
    "line, words",
    [
        ("def what(x): return helpers.HANDLE.read()", "cannot tell what decides a _io"),
        ("def what(x): return getattr(helpers, x)", "the module sample_code.helpers is passed as a whole"),
    ],
)
def test_what_cannot_be_followed_is_refused_and_not_skipped(sample, line, words):
    with pytest.raises(Unfollowable, match=words):
        sample(f"{CODE}\n{line}\n", f"{HELPERS}\nHANDLE = open(__file__)\n", names=("what",))


ONE, TWO = 1, 2
found = looks_up(lambda: ("one", "two"))(lambda name: globals()[name.upper()])


def test_what_is_looked_up_counts_where_its_name_stands(monkeypatch):
    def takes(name):
        return found(name)

    def one():
        return takes("one,none")

    def both():
        return takes("one") + takes("two")

    before = digest(one, packages=(__name__,)), digest(both, packages=(__name__,))
    monkeypatch.setitem(globals(), "TWO", 5)
    after = digest(one, packages=(__name__,)), digest(both, packages=(__name__,))
    assert before[0] == after[0] and before[1] != after[1]


def test_tasks_and_mixers_are_followed_by_name():
    """A study that names a task or a mixer depends on its code."""

    def text():
        return get_task("recall")

    def none():
        return get_task

    assert digest(text, packages=(__name__, "provenn")) != digest(none, packages=(__name__, "provenn"))


def test_data_count_by_their_checksum():
    data = get_task("recall").load("lookup", examples=4, test_examples=4)
    other = get_task("recall").load("lookup", examples=4, test_examples=4, seed=1)

    def reads(which):
        return lambda: which.train

    assert digest(reads(data)) == digest(reads(data)) != digest(reads(other))


def test_the_state_of_a_module_does_not_change_it(monkeypatch):
    """While a long run writes a log, the time of its last line changes: its trials are known all the same."""
    before = digest(fit)
    monkeypatch.setattr(progress, "_log", 12345.6)
    assert digest(fit) == before


@pytest.mark.parametrize("slug", ["eca_net", "rat", "long_context_bench"])
def test_another_process_gives_the_same_digests(slug):
    """Whatever the seed of hashes there, and whether or not types are checked while it runs, as they are here."""
    script = (
        "from provenn import catalog; from provenn.core.digest import digest\n"
        "from provenn.evidence.experiment import measuring_functions\n"
        f"card = catalog.card({slug!r})\n"
        "for name, f in measuring_functions(card.resolve_module('experiments')).items(): print(name, digest(f))"
    )
    here = measuring_functions(provenn.paper(slug).card.resolve_module("experiments"))
    expected = [f"{name} {digest(function)}" for name, function in here.items()]
    source = str(Path(provenn.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": source, "PYTHONHASHSEED": "7", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == expected


def test_an_object_that_is_replaced_within_a_process_counts(monkeypatch):
    """As in a notebook, where a study is defined once more."""

    def reads():
        return ONE

    before = digest(reads, packages=(__name__,))
    monkeypatch.setitem(globals(), "ONE", 7)
    assert digest(reads, packages=(__name__,)) != before


def test_a_method_that_only_wraps_a_base_s_does_not_count():
    """As torch puts a wrapped `step` into the class of an optimizer when the first one is made."""

    class Signs(torch.optim.Optimizer):
        def step(self):
            return 1

    class Small(Signs):
        pass

    class Own(Signs):
        def step(self):
            return 2

    before = digest(Small, packages=(__name__,)), digest(Own, packages=(__name__,))
    for kind in (Small, Own):
        kind([nn.Parameter(torch.zeros(1))], defaults={"lr": 1.0})
    assert "step" in vars(Small)
    assert (digest(Small, packages=(__name__,)), digest(Own, packages=(__name__,))) == before
    assert before[0] != before[1]


def test_a_lambda_that_a_lambda_returns_is_found_by_its_source():
    def counter(build):
        return lambda side: lambda: build(side)

    assert [node_of(function) is not None for function in (counter(abs), counter(abs)(1))] == [True, True]


KERNELS = """
def outer(x):
    if triton is None:
        return x
    return kernel[triton.cdiv(x, 2)](x, tl.float32)
"""


def test_digests_are_those_of_a_machine_without_a_compiler_of_kernels(sample, monkeypatch):
    """A record of a GPU counts as one of the code that stands, where the digests that ship come from a CPU."""
    without = sample("triton = None\n" + KERNELS, names=("outer",))
    compiler, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    compiler.jit = type(
        "JIT", (), {"__module__": "triton.runtime", "__init__": lambda self, fn: setattr(self, "fn", fn)}
    )
    compiler.language = language
    monkeypatch.setitem(sys.modules, "triton", compiler)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    kernel = "import triton\nimport triton.language as tl\n@triton.jit\ndef kernel(x, kind):\n    pass\n"
    assert sample(kernel + KERNELS, names=("outer",)) == without
    assert sample("triton = None\n" + KERNELS.replace("2", "3"), names=("outer",)) != without


def test_fields_that_later_pythons_add_to_a_tree_do_not_count():
    class Later(ast.FunctionDef):
        _fields = (*ast.FunctionDef._fields, "type_params")

    node = ast.parse("def f(x): return x").body[0]
    later = Later(**{name: getattr(node, name) for name in ast.FunctionDef._fields}, type_params=[])
    assert _dumped(later) == _dumped(node).replace("FunctionDef", "Later", 1)


def test_the_empty_string_after_a_nested_field_does_not_count():
    """Python 3.12 has one in f"{x:0{n}}", and 3.11 has none."""
    node = ast.parse("lambda x, n: f'{x:0{n}}'", mode="eval").body
    field = node.body.values[0].format_spec
    before = _Transformer({"x": None, "n": None}).of(node).text
    field.values.append(ast.Constant(""))
    assert _Transformer({"x": None, "n": None}).of(node).text == before

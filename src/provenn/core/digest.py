"""One digest of what decides a value: of code, and of everything in our packages that it reaches.

It serves `--resume`, records, checks and their cache. A function counts by its syntax tree, without docstrings,
comments, annotations, layout and the names of its variables. What it reads from its module counts by content, and so
on from there: a function or class by its code, an object by its class and fields, a number or a tensor by its value.
Where things live and what they are called does not count: a function that is moved or renamed keeps its digest. Names
that are part of an interface count: attributes, methods, fields, and parameters that are given by keyword.

What is looked up by name (a task, a mixer) counts where its name stands in what is reached; see `looks_up`. An object
with a method `__digest__` counts by what that gives. Code of other
packages counts by its name; their versions stand beside the digest wherever it is kept.
"""

import ast
import builtins
import copy
import dis
import enum
import hashlib
import importlib
import inspect
import linecache
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property, partial
from importlib.metadata import entry_points
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np

from provenn.core.errors import UserError

F = TypeVar("F", bound=Callable)
# Modules that only talk to people: nothing in them decides a value.
INERT = ("provenn.core.progress", "provenn.core.errors", "provenn.core.digest")
UNREAD = {
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__annotate_func__"),
    *("__firstlineno__", "__static_attributes__", "__dataclass_params__", "__dataclass_fields__", "__match_args__"),
    *("__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__hash__", "__slots__"),
    *("_is_protocol", "_is_runtime_protocol", "__protocol_attrs__", "__non_callable_proto_members__"),
}
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range, slice)
BY_NAME = (
    "_collections._tuplegetter",
    "logging.Logger",
    "_thread.lock",
    "_thread.RLock",
    "threading.Event",
    "_contextvars.ContextVar",
)
# Whose versions say what their code is.
LIBRARIES = {"torch", "numpy", "scipy", "sklearn", "skimage", "transformers", "lightning", "kornia", "onnxruntime"}
FILLING = ("append", "add", "setdefault", "update", "pop", "clear", "extend", "popitem", "move_to_end")
PROLOGUE = ("RESUME", "COPY_FREE_VARS", "MAKE_CELL", "RETURN_GENERATOR", "POP_TOP")
_KNOWN: dict[Any, Any] = {}  # canonical functions of this process


class Unfollowable(UserError):
    """Something decides a value, and the digest cannot see by what."""


def digest(*things: Any, packages: tuple[str, ...] = ("provenn",)) -> str:
    """Twelve hexadecimal digits that depend on what `things` do.

    Args:
        things: functions, classes, objects and values.
        packages: whose code is followed, beside the packages that `things` come from.

    Raises:
        Unfollowable: an object that is read holds what cannot be followed; the message names it.

    >>> digest(len, 3) == digest(len, 3), digest(len, 3) == digest(len, 4)
    (True, False)
    """
    walk = _Walk({*packages, *_packages(things)})
    for thing in things:
        walk.add(thing, "")
    walk.look_up()
    return walk.hash.hexdigest()[:12]


def looks_up(names: Callable[[], Iterable[str]]) -> Callable[[F], F]:
    """Mark a function of one name that gives what is called so; `names` gives all that there are.

    Whatever reaches such a function depends on those of its outcomes whose names stand somewhere in what it reaches.
    """

    def mark(function: F) -> F:
        function.looked_up = names  # type: ignore[attr-defined]  # functions take attributes, their type does not say so
        return function

    return mark


def _packages(things: Any) -> Iterator[str]:
    """Packages of the functions and classes that somebody hands over, as far as they are nobody's library."""
    for thing in things:
        if isinstance(thing, Mapping):
            yield from _packages(thing.values())
        elif isinstance(thing, (list, tuple)):
            yield from _packages(thing)
        elif isinstance(thing, partial):
            yield from _packages([thing.func])
        elif isinstance(thing, (types.FunctionType, type)) or hasattr(type(thing), "__dataclass_fields__"):
            of = thing if isinstance(thing, (types.FunctionType, type)) else type(thing)
            package = _package(of)
            if package and not _is_library(package):
                yield package


def _entry_points() -> dict[str, Any]:
    found = entry_points()
    return {group: found.select(group=group) for group in found.groups}


def _package(thing: Any) -> str:
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


def _is_library(package: str) -> bool:
    """Whether a package's version says what its code is: Python's own, and the large ones that papers are built on."""
    return package in LIBRARIES or package in sys.stdlib_module_names


class _Walk:
    """Takes in what is reached, each object once; again it counts by the number that it had."""

    def __init__(self, packages: set[str]):
        self.hash = hashlib.sha256()
        self.packages = packages
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no id is given twice
        self.strings: set[str] = set()
        self.lookups: list[Any] = []

    def ours(self, thing: Any) -> bool:
        return self.follows(_package(thing))

    def follows(self, package: str) -> bool:
        """Whether a package is followed: one that was named, or one that brings papers or tasks to this one."""
        return package in self.packages or (not _is_library(package) and package in self.bringing)

    @cached_property
    def bringing(self) -> set[str]:
        entries = (entry for group, found in _entry_points().items() if group.startswith("provenn.") for entry in found)
        return {re.split(r"[.:]", entry.value)[0] for entry in entries}

    def put(self, text: str) -> None:
        self.hash.update(f"{text}\n".encode())

    def add(self, thing: Any, path: str) -> None:
        """Take in a thing that is reached by `path`, which an error names."""
        if isinstance(thing, PLAIN):
            if isinstance(thing, str):
                self.strings.add(thing)
            return self.put(f"{type(thing).__name__} {thing!r}")
        thing = _unwrapped(thing)
        if id(thing) in self.seen:
            return self.put(f"again {self.seen[id(thing)]}")
        self.seen[id(thing)] = len(self.seen)
        self.kept.append(thing)
        if (getattr(thing, "__module__", None) or "").startswith(INERT):
            self.put("inert")
        elif hasattr(thing, "looked_up"):
            self.put("looks up")
            self.lookups.append(thing)
        elif isinstance(thing, types.FunctionType):
            self.put(f"function {self.function(thing, path)}") if self.ours(thing) else self.put(_named(thing))
        elif isinstance(thing, type):
            self.type(thing, path)
        elif isinstance(thing, types.ModuleType):
            self.module(thing, path)
        else:
            self.object(thing, path)

    def look_up(self) -> None:
        """Take in what is looked up under names that stand in what was reached, and in that again."""
        done: set[tuple[int, str]] = set()
        while True:
            words = {word for text in self.strings for word in re.split(r"[,\s]+", text)}
            found = [
                (index, name)
                for index, function in enumerate(self.lookups)
                for name in sorted({*function.looked_up()} & words)
                if (index, name) not in done
            ]
            if not found:
                return
            for index, name in found:
                done.add((index, name))
                self.put(f"called {name}")
                self.add(self.lookups[index](name), name)

    def each(self, kind: str, things: Any, path: str) -> None:
        things = list(things)
        self.put(f"{kind} of {len(things)}")
        for index, thing in enumerate(things):
            self.add(thing, f"{path}[{index}]")

    def function(self, function: types.FunctionType, path: str) -> str:
        """Take in what a function reads, and give its code with numbers for names."""
        path = f"{path}{'.' if path else ''}{function.__qualname__}"
        closed = inspect.getclosurevars(function).nonlocals if function.__closure__ else {}
        node = _tree(function)
        if node is None:
            self.put(_compiled(function.__code__))
            self.mapping(closed, path)
            known = function.__globals__
            text, reads = "", [(name, known[name]) for name in function.__code__.co_names if name in known]
        else:
            text, reads, strings = self.canonical(function, node, closed)
            self.strings |= strings
        self.each("defaults", function.__defaults__ or (), path)
        self.mapping(function.__kwdefaults__ or {}, path)
        self.put(f"reads {len(reads)}")
        for name, read in reads:
            self.add(read, f"{path}.{name}" if not path.endswith(name) else path)
        return text

    def canonical(self, function: types.FunctionType, node: ast.AST, closed: Mapping[str, Any]) -> Any:
        """A function's text and reads. Of one without a closure they are found once."""
        if closed:
            return _Canonical(function, closed, self.follows).of(node)
        key = (id(function.__code__), frozenset(self.packages))
        if key not in _KNOWN:
            _KNOWN[key] = (function, _Canonical(function, closed, self.follows).of(node))
        return _KNOWN[key][1]

    def type(self, kind: type, path: str) -> None:
        if not self.ours(kind):
            return self.put(_named(kind))
        self.each("bases", kind.__bases__, f"{path}.{kind.__name__}")
        if issubclass(kind, enum.Enum):
            return self.mapping({member.name: member.value for member in kind}, path)
        self.put(f"fields {[name for name in vars(kind).get('__annotations__', {})]}")
        for name, value in sorted(vars(kind).items()):
            if name in UNREAD or (name.startswith("__") and name.endswith("__") and _is_made(value)):
                continue
            self.put(name)
            self.add(value, f"{path}.{kind.__name__}.{name}")
        return None

    def module(self, module: types.ModuleType, path: str) -> None:
        if not self.follows(module.__name__.partition(".")[0]) or module.__name__.startswith(INERT):
            return self.put(module.__name__)
        raise Unfollowable(f"{path}: the module {module.__name__} is handed on whole; name what is used of it")

    def mapping(self, values: Mapping[Any, Any], path: str) -> None:
        self.put(f"mapping of {len(values)}")
        for key, value in values.items():
            self.add(key, path)
            self.add(value, f"{path}[{key!r}]")

    def object(self, thing: Any, path: str) -> None:
        name = f"{type(thing).__module__}.{type(thing).__qualname__}"
        if hasattr(type(thing), "__digest__"):
            return self.each(name, thing.__digest__(), path)
        if isinstance(thing, partial):
            self.each("partial", [thing.func, *thing.args], path)
            return self.mapping(thing.keywords, path)
        if isinstance(thing, types.MethodType):
            return self.each("method", [thing.__func__, thing.__self__], path)
        if isinstance(thing, cached_property):
            return self.add(thing.func, path)
        if isinstance(thing, (property, classmethod, staticmethod)):
            parts = (thing.fget, thing.fset) if isinstance(thing, property) else (thing.__func__,)
            return self.each(type(thing).__name__, parts, path)
        if isinstance(thing, enum.Enum):
            return self.each("member", [type(thing), thing.name], path)
        if isinstance(thing, np.ndarray) or (hasattr(thing, "detach") and hasattr(thing, "dtype")):
            return self.put(_array(thing))
        if isinstance(thing, Mapping):
            self.put(name)
            return self.mapping(thing, path)
        if isinstance(thing, (list, tuple)):
            return self.each(name, thing, path)
        if isinstance(thing, (set, frozenset)):
            digests = sorted(digest(one, packages=tuple(self.packages)) for one in thing)
            return self.put(f"{name} {digests}")
        if isinstance(thing, re.Pattern):
            return self.put(f"pattern {thing.pattern!r} {thing.flags}")
        if isinstance(thing, PurePath):
            return self.put("path")  # where things live
        if isinstance(thing, np.generic) or name in ("torch.dtype", "torch.device", "torch.Size") or _is_typing(thing):
            return self.put(f"{name} {thing!r}")
        if name in BY_NAME or isinstance(thing, (types.BuiltinFunctionType, types.MethodDescriptorType, np.ufunc)):
            return self.put(f"{name} {getattr(thing, '__name__', '')}")
        if hasattr(type(thing), "model_fields"):  # of pydantic
            self.add(type(thing), path)
            return self.mapping({key: getattr(thing, key) for key in type(thing).model_fields}, path)
        if hasattr(thing, "state_dict") and hasattr(thing, "named_modules"):
            self.add(type(thing), path)
            return self.mapping(thing.state_dict(), path)
        if self.ours(type(thing)):
            self.add(type(thing), path)
            if hasattr(type(thing), "__dataclass_fields__"):
                names = list(type(thing).__dataclass_fields__)
                return self.mapping({key: getattr(thing, key) for key in names if hasattr(thing, key)}, path)
            return self.mapping({k: v for k, v in getattr(thing, "__dict__", {}).items() if k[:1] != "_"}, path)
        if callable(thing) and getattr(thing, "__name__", None):
            return self.put(_named(thing))
        if type(thing).__module__ in ("datetime", "fractions", "decimal", "ipaddress", "uuid"):
            return self.put(f"{name} {thing!r}")
        raise Unfollowable(f"{path or 'it'}: cannot tell what decides a {name}; make it in the function that uses it")


def _unwrapped(thing: Any) -> Any:
    """What lies under caches, checks of types and compilers of kernels."""
    while not hasattr(thing, "looked_up"):
        inner = getattr(thing, "__wrapped__", None)
        if inner is None and type(thing).__module__.startswith("triton"):
            inner = getattr(thing, "fn", None)
        if inner is None or isinstance(thing, type):
            return thing
        thing = inner
    return thing


def _named(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', getattr(thing, '__name__', ''))}"


def _is_made(value: Any) -> bool:
    """Whether a method was written by a decorator such as `dataclass`, from fields that count themselves."""
    code = getattr(_unwrapped(value), "__code__", None)
    return code is None or code.co_filename.startswith("<")


def _is_typing(thing: Any) -> bool:
    return type(thing).__module__ in ("typing", "types", "jaxtyping") or type(type(thing)).__module__ == "jaxtyping"


def _array(thing: Any) -> str:
    array = thing.detach().cpu() if hasattr(thing, "detach") else thing
    if hasattr(array, "view") and str(getattr(array, "dtype", "")) == "torch.bfloat16":
        array = array.float()
    values = np.ascontiguousarray(np.asarray(array))
    return f"array {thing.dtype} {values.shape} {hashlib.sha256(values.tobytes()).hexdigest()}"


def _compiled(code: types.CodeType) -> str:
    constants = [_compiled(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {constants}"


# The syntax tree of a function.


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _tree(function: types.FunctionType) -> ast.AST | None:
    """The node of a function; None where its source is not there."""
    code = function.__code__
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    nodes = _functions_of("".join(lines)).get((code.co_firstlineno, code.co_name), [])
    if len(nodes) > 1:  # several lambdas on a line: the one whose body spans the instructions most closely
        steps = (step for step in dis.get_instructions(code) if step.opname not in PROLOGUE and step.positions)
        spots = [(s.positions.lineno, s.positions.col_offset) for s in steps if s.positions and s.positions.lineno]
        nodes = [node for node in nodes if all(_spans(node.body, spot) for spot in spots)]
        nodes.sort(key=lambda node: (node.end_lineno - node.lineno, node.end_col_offset - node.col_offset))
    return nodes[0] if nodes else None


@cache
def _functions_of(text: str) -> dict[tuple[int, str], list[Any]]:
    """Every function of a file by its first line and its name."""
    found: dict[tuple[int, str], list[Any]] = {}
    try:
        tree = _parsed(text)
    except SyntaxError:
        return found
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found.setdefault((_begins(node), getattr(node, "name", "<lambda>")), []).append(node)
    return found


def _begins(node: ast.AST) -> int:
    lines = [node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", []))]  # type: ignore[attr-defined]
    return min(lines)


def _spans(node: Any, spot: tuple[int, int]) -> bool:
    return (node.lineno, node.col_offset) <= spot <= (node.end_lineno, node.end_col_offset)


class _Canonical(ast.NodeTransformer):
    """A function's tree with numbers for the names of variables, and the list of what it reads from outside."""

    def __init__(self, function: types.FunctionType, closed: Mapping[str, Any], follows: Callable[[str], bool]):
        self.globals, self.closed, self.follows = function.__globals__, closed, follows
        self.numbers: dict[str, str] = {}
        self.imported: dict[str, Any] = {}
        self.reads: list[tuple[str, Any]] = []
        self.places: dict[int, str] = {}
        self.state = _state_of(self.globals)

    def of(self, node: ast.AST) -> tuple[str, list[tuple[str, Any]], set[str]]:
        node = copy.deepcopy(node)
        self.bound = {name for name in _bound(node) if name not in self.closed}
        for inner in ast.walk(node):
            if isinstance(inner, (ast.Import, ast.ImportFrom)):
                self.take_imports(inner)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.name = ""
            node.decorator_list = [mark for mark in node.decorator_list if not _only_marks(mark)]
        tree = self.visit(node)
        constants = (part.value for part in ast.walk(tree) if isinstance(part, ast.Constant))
        return ast.dump(tree), self.reads, {value for value in constants if isinstance(value, str)}

    def take_imports(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            target = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) and node.module else alias.name
            name = (alias.asname or alias.name).partition(".")[0]
            if not self.follows(target.partition(".")[0]):
                module = target if alias.asname or isinstance(node, ast.ImportFrom) else name
                self.imported[name] = _Library(module)
            else:
                self.imported[name] = _resolved(target if alias.asname or isinstance(node, ast.ImportFrom) else name)

    def outside(self, name: str) -> Any:
        """What a name means that the function does not bind, or `_MISSING`."""
        if name in self.imported:
            return self.imported[name]
        if name in self.closed:
            return self.closed[name]
        if name in self.bound:
            return _MISSING
        if name in self.globals:
            return self.globals[name]
        return _MISSING

    def number(self, name: str) -> str:
        return self.numbers.setdefault(name, f"v{len(self.numbers)}")

    def read(self, name: str, value: Any) -> str:
        if id(value) not in self.places:
            self.places[id(value)] = f"g{len(self.places)}"
            self.reads.append((name, value))
        return self.places[id(value)]

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> Any:
        return ast.Pass()

    visit_ImportFrom = visit_Import

    def visit_Name(self, node: ast.Name) -> Any:
        value = self.outside(node.id)
        if value is _MISSING:
            known = hasattr(builtins, node.id) and node.id not in self.bound
            return ast.Name(node.id if known or node.id not in self.bound else self.number(node.id), node.ctx)
        if isinstance(value, _Library):
            return ast.Name(value.name, node.ctx)
        if isinstance(value, types.ModuleType) and not self.follows(value.__name__.partition(".")[0]):
            return ast.Name(value.__name__, node.ctx)
        if node.id in self.state and not isinstance(value, (types.FunctionType, type)):
            return ast.Name("state", node.ctx)  # what the module itself writes while it runs
        return ast.Name(self.read(node.id, value), node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        chain = [node.attr]
        base: Any = node.value
        while isinstance(base, ast.Attribute):
            chain.append(base.attr)
            base = base.value
        value = self.outside(base.id) if isinstance(base, ast.Name) else _MISSING
        if isinstance(value, types.ModuleType) and self.follows(value.__name__.partition(".")[0]):
            names = chain[::-1]
            while names and isinstance(value, types.ModuleType):
                name = names.pop(0)
                if not hasattr(value, name):
                    return ast.Name(f"{value.__name__}.{name}", ast.Load())
                if name in _state_of(vars(value)) and not callable(getattr(value, name)):
                    return ast.Name("state", ast.Load())
                value = getattr(value, name)
            result: Any = ast.Name(self.read(chain[-1] if not names else name, value), ast.Load())
            for name in names:
                result = ast.Attribute(result, name, ast.Load())
            return result
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> Any:
        return ast.arg(self.number(node.arg))

    def visit_FunctionDef(self, node: Any) -> Any:
        body = [part for i, part in enumerate(node.body) if not (i == 0 and _is_docstring(part))] or [ast.Pass()]
        node.body, node.returns, node.type_params = body, None, []
        node.name = self.number(node.name) if node.name else ""
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        node.body = [part for i, part in enumerate(node.body) if not (i == 0 and _is_docstring(part))] or [ast.Pass()]
        node.name = self.number(node.name)
        for part in node.body:  # methods are called by their names
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.numbers.setdefault(part.name, part.name)
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is None:
            return ast.Pass()
        return self.visit(ast.Assign([node.target], node.value))

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> Any:
        node.name = node.name and self.number(node.name)
        return self.generic_visit(node)

    def visit_Global(self, node: ast.Global) -> Any:
        return ast.Pass()

    def visit_Nonlocal(self, node: ast.Nonlocal) -> Any:
        return ast.Nonlocal([self.number(name) for name in node.names])


class _Library:
    """A name of another package, imported inside a function."""

    def __init__(self, name: str):
        self.name = name


_MISSING = object()


def _resolved(target: str) -> Any:
    """A module, or a name in one."""
    try:
        return importlib.import_module(target)
    except ImportError:
        module, _, name = target.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            return _Library(target)


def _bound(node: ast.AST) -> set[str]:
    """Every name that a function's tree binds, in itself or in a function within."""
    names: set[str] = set()
    free: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg):
            names.add(inner.arg)
        elif isinstance(inner, ast.Name) and not isinstance(inner.ctx, ast.Load):
            names.add(inner.id)
        elif isinstance(inner, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
            names.update([inner.name] if inner.name else [])
        elif isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and inner is not node:
            names.add(inner.name)
        elif isinstance(inner, ast.Global):
            free.update(inner.names)
    return names - free


def _only_marks(mark: ast.expr) -> bool:
    """Whether a decorator only registers or caches a function: its outcome is the function's."""
    name = mark.func if isinstance(mark, ast.Call) else mark
    return isinstance(name, ast.Name) and name.id in ("measures", "cache", "lru_cache", "wraps", "property", "override")


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _state_of(module: Mapping[str, Any]) -> frozenset[str]:
    """The names of a module that its own functions write to while they run: caches, counters and registries.

    Those are names that a function declares `global`, and containers that a function fills. What they hold does not
    count; what is taken out of a registry does where the function that takes it out is marked by `looks_up`.
    """
    file = module.get("__file__")
    return _written("".join(linecache.getlines(file))) if file else frozenset()


@cache
def _written(text: str) -> frozenset[str]:
    names: set[str] = set()
    functions = (node for node in ast.walk(_parsed(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.Global):
            names.update(node.names)
        filled: Any = None
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            filled = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FILLING:
            filled = node.func.value
        if isinstance(filled, ast.Name):
            names.add(filled.id)
    return frozenset(names)

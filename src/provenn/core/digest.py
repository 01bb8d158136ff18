"""One digest of what decides a value: of code, and of everything in our packages that it reaches.

It serves `--resume`, records, checks and their cache. A function counts by its syntax tree. Left out are docstrings,
comments, annotations, layout, names of variables, and what the errors say that it raises. What it reads from its module
counts by content, and so on from there. A function or class counts by its code, an object by its class and fields, a
number or a tensor by its value. Where things live and what they are called does not count: a function that is moved or
renamed keeps its digest. Names that are part of an interface count: attributes, methods, fields, and parameters that
are given by keyword.

What is looked up by name (a task, a mixer) counts where its name stands in what is reached; see `looks_up`. An object
with a method `__digest__` counts by what that gives. Code of other packages counts by its name; their versions stand
beside the digest wherever it is kept.
"""

import enum
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from importlib.metadata import entry_points
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np

from provenn.core.errors import UserError
from provenn.core.syntax import canonical, node_of

F = TypeVar("F", bound=Callable)
# Modules that talk to people, carry values to records, or serve several processes where one measures: nothing in them
# decides a value. Effects and intervals are computed again from the values of every record that ships, and tests hold
# several processes to what one does.
INERT = (
    *("provenn.core.progress", "provenn.core.errors", "provenn.core.digest", "provenn.core.syntax"),
    *("provenn.evidence.run", "provenn.evidence.record", "provenn.evidence.measurement"),
    "provenn.training.processes",
)
UNREAD = {
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__annotate_func__"),
    *("__firstlineno__", "__static_attributes__", "__dataclass_params__", "__dataclass_fields__", "__match_args__"),
    *("__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__", "__hash__", "__slots__", "__replace__"),
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
MOVED = {  # what later Pythons call a thing, and what 3.11 called it
    "collections._tuplegetter": "_collections._tuplegetter",
    "typing._proto_hook": "typing.Protocol.__init_subclass__.<locals>._proto_hook",
}
# Whose versions say what their code is.
LIBRARIES = {
    *("torch", "numpy", "scipy", "sklearn", "skimage", "transformers", "diffusers", "lightning", "kornia"),
    "onnxruntime",
}


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
        node = node_of(function)
        if node is None:
            self.put(_compiled(function.__code__))
            self.mapping(closed, path)
            known = function.__globals__
            text, reads = "", [(name, known[name]) for name in function.__code__.co_names if name in known]
        else:
            text, reads, strings = canonical(function, node, closed, self.follows)
            self.strings |= strings
        self.each("defaults", function.__defaults__ or (), path)
        self.mapping(function.__kwdefaults__ or {}, path)
        self.put(f"reads {len(reads)}")
        for name, read in reads:
            self.add(read, f"{path}.{name}" if not path.endswith(name) else path)
        return text

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
            if _is_inherited(kind, name, value):
                continue
            self.put(name)
            self.add(value, f"{path}.{kind.__name__}.{name}")
        return None

    def module(self, module: types.ModuleType, path: str) -> None:
        if not self.follows(module.__name__.partition(".")[0]) or module.__name__.startswith(INERT):
            return self.put(module.__name__)
        raise Unfollowable(f"{path}: the module {module.__name__} is passed as a whole; name the parts that are used")

    def mapping(self, values: Mapping[Any, Any], path: str) -> None:
        self.put(f"mapping of {len(values)}")
        for key, value in values.items():
            self.add(key, path)
            self.add(value, f"{path}[{key!r}]")

    def object(self, thing: Any, path: str) -> None:
        name = _named(type(thing))
        if hasattr(type(thing), "__digest__"):
            return self.each("object", thing.__digest__(), path)
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
    name = f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', getattr(thing, '__name__', ''))}"
    return MOVED.get(name, name)


def _is_made(value: Any) -> bool:
    """Whether a method was written by a decorator such as `dataclass`, from fields that count themselves."""
    code = getattr(_unwrapped(value), "__code__", None)
    return code is None or code.co_filename.startswith("<")


def _is_inherited(kind: type, name: str, value: Any) -> bool:
    """Whether a method is a base's, wrapped: torch puts such a `step` into the class of each optimizer it makes."""
    of_base = next((vars(base)[name] for base in kind.__mro__[1:] if name in vars(base)), None)
    return isinstance(_unwrapped(value), types.FunctionType) and _unwrapped(value) is _unwrapped(of_base)


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

"""A checksum of code: of functions and classes, and of all that they use in the packages that we know.

Comments, docstrings and layout do not change it; a constant, a default or a helper three calls away does.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

LIBRARIES = {
    "builtins",
    "torch",
    "numpy",
    "functools",
    "collections",
    "math",
    "operator",
    "sklearn",
    "scipy",
    "transformers",
}


def checksum(*things: Any, packages: tuple[str, ...] = ("provenn",)) -> str:
    """Twelve hexadecimal digits that depend on what `things` do.

    They are followed through `packages` and those that the things come from, large libraries aside.

    >>> checksum(len, 3) == checksum(len, 3), checksum(len, 3) == checksum(len, 4)
    (True, False)
    """
    digest, seen = hashlib.sha256(), set[int]()
    roots = {*packages, *_packages(things)} - LIBRARIES
    waiting = list(things)[::-1]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        text, parts = _described(thing, roots)
        if parts:
            seen.add(id(thing))
        digest.update(f"{text}\n".encode())
        waiting.extend(parts[::-1])
    return digest.hexdigest()[:12]


def _packages(things: Any) -> Iterator[str]:
    """Where the functions and classes that somebody hands over come from: what they use there is followed too."""
    for thing in things:
        if isinstance(thing, (FunctionType, type)):
            yield _package(thing)
        elif isinstance(thing, Mapping):
            yield from _packages(thing.values())
        elif isinstance(thing, (list, tuple)):
            yield from _packages(thing)
        elif isinstance(thing, partial):
            yield from _packages([thing.func])
        elif not isinstance(thing, (str, bytes)) and hasattr(thing, "__dict__"):
            yield _package(type(thing))


def _package(thing: Any) -> str:
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


def _described(thing: Any, roots: set[str]) -> tuple[str, list[Any]]:
    """Words for a thing, and what else it rests on."""
    if isinstance(thing, partial):
        return "partial", [thing.func, *thing.args, *_items(thing.keywords)]
    if isinstance(thing, MethodType):
        return "method", [thing.__func__, thing.__self__]
    if not isinstance(thing, (FunctionType, type)) and hasattr(thing, "__wrapped__"):  # a cache around a function
        return "wrapped", [thing.__wrapped__]
    if isinstance(thing, FunctionType):
        if _package(thing) not in roots:
            return f"{thing.__module__}.{thing.__qualname__}", []
        closed = [cell.cell_contents for cell in thing.__closure__ or () if _filled(cell)]
        defaults = [*(thing.__defaults__ or ()), *_items(thing.__kwdefaults__ or {})]
        return _source(thing), [*defaults, *closed, *_used(thing, roots)]
    if isinstance(thing, type):
        if _package(thing) not in roots:
            return f"{thing.__module__}.{thing.__qualname__}", []
        methods = [value for value in vars(thing).values() if isinstance(value, FunctionType)]
        return _source(thing), [*thing.__bases__, *(used for method in methods for used in _used(method, roots))]
    if isinstance(thing, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(thing).tobytes()).hexdigest(), []
    if hasattr(thing, "detach"):  # a tensor
        return _described(thing.detach().cpu().numpy(), roots)
    if isinstance(thing, Mapping):
        return f"mapping of {len(thing)}", _items(thing)
    if isinstance(thing, (list, tuple)):
        return f"{type(thing).__name__} of {len(thing)}", list(thing)
    if isinstance(thing, (set, frozenset)):
        return repr(sorted(map(repr, thing))), []
    if thing is None or isinstance(thing, (str, bytes, int, float, complex)):
        return repr(thing), []
    if isinstance(thing, ModuleType):
        return thing.__name__, []
    if _package(type(thing)) in roots:
        return "object", [type(thing), *_items(getattr(thing, "__dict__", {}))]
    return f"{type(thing).__module__}.{getattr(thing, '__name__', type(thing).__qualname__)}", []


def _items(mapping: Mapping[Any, Any]) -> list[Any]:
    return [part for key, value in mapping.items() for part in (repr(key), value)]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _used(function: FunctionType, roots: set[str]) -> Iterator[Any]:
    """What a function names: globals of its module, and attributes of modules that it names."""
    names = sorted(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] in roots:
                yield from (vars(value)[other] for other in names if _counts(other, vars(value).get(other), roots))
        elif _counts(name, value, roots):
            yield value


def _counts(name: str, value: Any, roots: set[str]) -> bool:
    """Code of ours, or a constant; a module's state, such as when a log got its last line, does not count."""
    if isinstance(value, (FunctionType, type)) or hasattr(value, "__wrapped__"):
        return _package(value) in roots
    if isinstance(value, partial):
        return True
    return name.isupper() and isinstance(value, (str, int, float, tuple, list, dict, frozenset))


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names, *(name for each in inner for name in _names(each))}


@cache
def _source(thing: Any) -> str:
    """The code without comments, docstrings and layout; as it was compiled where the source cannot be had."""
    try:
        text = textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):
        return _compiled(thing)
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a lambda inside an expression
        return _compiled(thing)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def _compiled(thing: Any) -> str:
    code = getattr(thing, "__code__", None)
    if code is None:
        return f"{thing.__module__}.{thing.__qualname__}"
    constants = [c.co_code.hex() if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"

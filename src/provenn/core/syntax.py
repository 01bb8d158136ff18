"""A function's syntax tree with numbers for names, and the list of what the function reads from outside."""

import ast
import builtins
import copy
import dis
import importlib
import linecache
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

FILLING = ("append", "add", "setdefault", "update", "pop", "clear", "extend", "popitem", "move_to_end")
PROLOGUE = ("RESUME", "COPY_FREE_VARS", "MAKE_CELL", "RETURN_GENERATOR", "POP_TOP")


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def node_of(function: types.FunctionType) -> ast.AST | None:
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


def _spans(node: Any, spot: tuple[Any, Any]) -> bool:
    return (node.lineno, node.col_offset) <= spot <= (node.end_lineno, node.end_col_offset)


class Canonical(ast.NodeTransformer):
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

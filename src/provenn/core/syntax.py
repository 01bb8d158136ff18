"""A function's syntax tree with numbers for names, and the list of what the function reads from outside."""

import ast
import builtins
import copy
import dis
import importlib
import linecache
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

FILLING = ("append", "add", "setdefault", "update", "pop", "clear", "extend", "popitem", "move_to_end")
WHERE = (
    "__file__",
    "__path__",
    "__name__",
    "__package__",
    "__spec__",
)  # of a module: where it lives, what it is called
COMPILER = "triton"  # of kernels for GPUs: digests are those of a machine that has none, where kernels do not count
PLACELESS = ("RESUME", "COPY_FREE_VARS", "MAKE_CELL", "RETURN_GENERATOR", "RETURN_VALUE", "RETURN_CONST", "POP_TOP")


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
        steps = (step for step in dis.get_instructions(code) if step.opname not in PLACELESS and step.positions)
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


Read = tuple[str, Any]  # a name, and what it means


@dataclass(frozen=True)
class _Meaning:
    """What a name means outside its function: `text` as such, or a value that is read, with attributes after it."""

    text: str = ""
    name: str = ""
    value: Any = None
    rest: tuple[str, ...] = ()

    def same(self, other: "_Meaning") -> bool:
        """Whether both are one: values by identity, since arrays have no equality of their own."""
        facts, others = (self.text, self.name, self.rest), (other.text, other.name, other.rest)
        return facts == others and self.value is other.value


@dataclass(frozen=True)
class _Canonical:
    """A function's text, what it reads, and its strings, as long as its names mean what they meant."""

    meanings: dict[str, _Meaning | None]
    text: str
    reads: list[Read]
    strings: frozenset[str]


_known: dict[int, _Canonical] = {}  # by a node, which `_parsed` keeps


def canonical(
    function: types.FunctionType, node: ast.AST, closed: Mapping[str, Any], follows: Callable[[str], bool]
) -> tuple[str, list[Read], frozenset[str]]:
    """A function's tree with numbers for names, what it reads from outside, and the strings in it.

    What each name means is found anew at every call; the tree is transformed again only where one means another thing.
    """
    meanings = _Names(function, node, closed, follows).meanings()
    known = _known.get(id(node))
    same = known is not None and all(_alike(meaning, known.meanings[name]) for name, meaning in meanings.items())
    if known is None or not same:
        known = _known[id(node)] = _Transformer(meanings).of(node)
    return known.text, known.reads, known.strings


def _alike(one: _Meaning | None, other: _Meaning | None) -> bool:
    return one is other if one is None or other is None else one.same(other)


class _Names:
    """Finds what the names of a function mean that it does not bind itself."""

    def __init__(
        self, function: types.FunctionType, node: ast.AST, closed: Mapping[str, Any], follows: Callable[[str], bool]
    ):
        self.mentions = _mentions(node)
        self.globals, self.closed, self.follows = function.__globals__, closed, follows
        self.imported = {name: self.importing(target) for name, target in self.mentions.imports.items()}
        self.state = _state_of(self.globals)

    def meanings(self) -> dict[str, _Meaning | None]:
        """Of every name and every chain of attributes; None where the function binds it, or nothing does."""
        names: dict[str, _Meaning | None] = {name: self.of_name(name) for name in self.mentions.names}
        return names | {".".join(chain): self.of_chain(chain) for chain in self.mentions.chains}

    def importing(self, target: str) -> Any:
        return _resolved(target) if self.follows(target.partition(".")[0]) else _Library(target)

    def outside(self, name: str) -> Any:
        """What a name means that the function does not bind, or `_MISSING`."""
        if name in self.imported:
            return self.imported[name]
        if name in self.closed:
            return self.closed[name]
        value = _MISSING if name in self.mentions.bound else self.globals.get(name, _MISSING)
        return _MISSING if type(value).__module__.partition(".")[0] == COMPILER else value

    def of_name(self, name: str) -> _Meaning | None:
        value = self.outside(name)
        if value is _MISSING:
            return None
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] == COMPILER:
            return _Meaning(name=name, value=None) if name == COMPILER else None
        if name in WHERE:
            return _Meaning(name)
        if isinstance(value, _Library):
            return _Meaning(value.name)
        if isinstance(value, types.ModuleType) and not self.follows(value.__name__.partition(".")[0]):
            return _Meaning(value.__name__)
        if name in self.state and not isinstance(value, (types.FunctionType, type)):
            return _Meaning("state")  # what the module itself writes while it runs
        return _Meaning(name=name, value=value)

    def of_chain(self, chain: tuple[str, ...]) -> _Meaning | None:
        """What `module.name.attribute` reads of a module that is followed."""
        value, names = self.outside(chain[0]), list(chain[1:])
        if not isinstance(value, types.ModuleType) or not self.follows(value.__name__.partition(".")[0]):
            return None
        name = chain[0]
        while names and isinstance(value, types.ModuleType):
            name = names.pop(0)
            if not hasattr(value, name):
                return _Meaning(f"{value.__name__}.{name}")
            if name in _state_of(vars(value)) and not callable(getattr(value, name)):
                return _Meaning("state")
            value = getattr(value, name)
        return _Meaning(name=name, value=value, rest=tuple(names))


@dataclass(frozen=True)
class _Mentions:
    """The names in a function: all of them, those it binds, chains of attributes of one, and imports within."""

    names: frozenset[str]
    bound: frozenset[str]
    chains: frozenset[tuple[str, ...]]
    imports: dict[str, str]


_mentioned: dict[int, _Mentions] = {}  # by a node, which `_parsed` keeps


def _mentions(node: ast.AST) -> _Mentions:
    if id(node) not in _mentioned:
        nodes = list(ast.walk(node))
        names = frozenset(inner.id for inner in nodes if isinstance(inner, ast.Name))
        chains = frozenset(chain for inner in nodes if isinstance(inner, ast.Attribute) and (chain := _chain(inner)))
        imports = {}
        for inner in nodes:
            module = inner.module if isinstance(inner, ast.ImportFrom) else None
            for alias in inner.names if isinstance(inner, (ast.Import, ast.ImportFrom)) else ():
                target = f"{module}.{alias.name}" if module else alias.name
                name = (alias.asname or alias.name).partition(".")[0]
                imports[name] = target if alias.asname or isinstance(inner, ast.ImportFrom) else name
        _mentioned[id(node)] = _Mentions(names, frozenset(_bound(node)), chains, imports)
    return _mentioned[id(node)]


def _chain(node: ast.Attribute) -> tuple[str, ...]:
    """A name and the attributes after it; () where it begins with no name."""
    attributes = [node.attr]
    base: ast.expr = node.value
    while isinstance(base, ast.Attribute):
        attributes.append(base.attr)
        base = base.value
    return (base.id, *reversed(attributes)) if isinstance(base, ast.Name) else ()


class _Transformer(ast.NodeTransformer):
    """Puts numbers for the names of variables, and for what is read from outside."""

    def __init__(self, meanings: dict[str, _Meaning | None]):
        self.meanings = meanings
        self.numbers: dict[str, str] = {}
        self.reads: list[Read] = []
        self.places: dict[int, str] = {}

    def of(self, node: ast.AST) -> _Canonical:
        self.bound = _mentions(node).bound
        node = copy.deepcopy(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.name = ""
            node.decorator_list = [mark for mark in node.decorator_list if not _only_marks(mark)]
        tree = self.visit(node)
        constants = (part.value for part in ast.walk(tree) if isinstance(part, ast.Constant))
        strings = frozenset(value for value in constants if isinstance(value, str))
        return _Canonical(self.meanings, _dumped(tree), self.reads, strings)

    def number(self, name: str) -> str:
        return self.numbers.setdefault(name, f"v{len(self.numbers)}")

    def put(self, meaning: _Meaning, context: ast.expr_context) -> ast.expr:
        if not meaning.name:
            return ast.Name(meaning.text, context)
        place = self.places.setdefault(id(meaning.value), f"g{len(self.places)}")
        if len(self.places) > len(self.reads):
            self.reads.append((meaning.name, meaning.value))
        result: ast.expr = ast.Name(place, context)
        for attribute in meaning.rest:
            result = ast.Attribute(result, attribute, ast.Load())
        return result

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> Any:
        return ast.Pass()

    visit_ImportFrom = visit_Import

    def visit_Name(self, node: ast.Name) -> Any:
        meaning = self.meanings[node.id]
        if meaning is None:
            known = hasattr(builtins, node.id) and node.id not in self.bound
            return ast.Name(node.id if known or node.id not in self.bound else self.number(node.id), node.ctx)
        return self.put(meaning, node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        meaning = self.meanings.get(".".join(_chain(node)))
        return self.generic_visit(node) if meaning is None else self.put(meaning, ast.Load())

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

    def visit_Raise(self, node: ast.Raise) -> Any:
        """What an error says decides no value; which error it is, and what else it is given, may."""
        if isinstance(node.exc, ast.Call):
            node.exc.args = [argument for argument in node.exc.args if not _is_text(argument)]
            node.exc.keywords = [keyword for keyword in node.exc.keywords if not _is_text(keyword.value)]
        return self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> Any:
        node.values = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
        return self.generic_visit(node)  # 3.12 has an empty string after a nested field

    def visit_Global(self, node: ast.Global) -> Any:
        return ast.Pass()

    def visit_Nonlocal(self, node: ast.Nonlocal) -> Any:
        return ast.Nonlocal([self.number(name) for name in node.names])


def _dumped(part: Any) -> str:
    """A tree as text, the same in every Python: `ast.dump` of 3.12 has a field more, and 3.13's no empty lists.

    >>> _dumped(ast.parse("lambda x: f(x)", mode="eval").body.body)
    "Call(func=Name(id='f', ctx=Load()), args=[Name(id='x', ctx=Load())], keywords=[])"
    """
    if isinstance(part, list):
        return f"[{', '.join(map(_dumped, part))}]"
    if not isinstance(part, ast.AST):
        return repr(part)
    fields = [(name, getattr(part, name)) for name in part._fields if hasattr(part, name) and name != "type_params"]
    told = (
        f"{name}={_dumped(value)}"
        for name, value in fields
        if value is not None or getattr(type(part), name, ...) is not None
    )
    return f"{type(part).__name__}({', '.join(told)})"


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
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and _is_text(node.value)


def _is_text(node: ast.expr) -> bool:
    """Whether it is a string as written, or an f-string."""
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


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
    for function in _outermost(_parsed(text)):
        bound = _bound(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                names.update(node.names)
            filled: Any = None
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                filled = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FILLING:
                filled = node.func.value
            if isinstance(filled, ast.Name) and filled.id not in bound:
                names.add(filled.id)
    return frozenset(names)


def _outermost(node: ast.AST) -> Iterator[ast.AST]:
    """The functions of a module and of its classes, without those within a function."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield inner
        else:
            yield from _outermost(inner)

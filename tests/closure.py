"""What a paper's checks depend on: every file of ours that they reach by imports and by names, and one digest of them.

A file counts by its code: comments, docstrings and layout do not count, annotations do, since the suite checks shapes
by them. Imports inside functions count; those for type checkers alone do not. What is looked up by name, a task or a
mechanism, counts where its name stands in the paper's own files. All this is read without importing anything.
"""

import ast
import hashlib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from types import CodeType
from typing import Any

UNREAD = {"README.md", "pictures", "__pycache__"}  # of a paper's folder: for readers alone


class Source:
    """A Python file: what it imports, the strings in it, and a digest of its code."""

    def __init__(self, file: Path):
        self.file = file
        self.tree = ast.parse(file.read_bytes())
        self.nodes = list(ast.walk(self.tree))
        ifs = (node for node in self.tree.body if isinstance(node, ast.If))
        self.for_checkers = [node for node in ifs if ast.unparse(node.test) == "TYPE_CHECKING"]

    @cached_property
    def digest(self) -> str:
        for node in self.nodes:
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            if documented and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.copy_location(ast.Pass(), node.body[0])]
        hashed = hashlib.sha256()
        _take(compile(self.tree, "", "exec", dont_inherit=True), hashed.update)
        return hashed.hexdigest()

    @cached_property
    def strings(self) -> set[str]:
        """Every string of the code, and the parts of those that are lists with commas."""
        return _words(node.value for node in self.nodes if isinstance(node, ast.Constant))

    @cached_property
    def tasks(self) -> set[str]:
        """What is given to `get_task` as a string."""
        calls = (node for node in self.nodes if isinstance(node, ast.Call))
        calls = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "get_task")
        return _words(arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant))

    @cached_property
    def lazy(self) -> dict[str, tuple[str, str]]:
        """Of a package that loads names when they are asked for: the module behind each, and its name there."""
        if not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in self.tree.body):
            return {}
        nodes = (node for block in self.for_checkers for node in block.body if isinstance(node, ast.ImportFrom))
        return {alias.asname or alias.name: (node.module or "", alias.name) for node in nodes for alias in node.names}

    @cached_property
    def imports(self) -> set[tuple[str, str]]:
        """Modules that are imported, each with a name that is asked of it; "" where none is."""
        asked: set[tuple[str, str]] = set()
        modules: dict[str, str] = {}
        # What `__getattr__` imports counts where its name is asked for: `lazy` has it.
        getters = (node for node in self.tree.body if isinstance(node, ast.FunctionDef) and node.name == "__getattr__")
        aside = {id(node) for block in (*self.for_checkers, *getters) for node in ast.walk(block)}
        nodes = [node for node in self.nodes if id(node) not in aside]
        for node in nodes:
            if isinstance(node, ast.Import):
                asked |= {(alias.name, "") for alias in node.names}
                modules |= {alias.asname: alias.name for alias in node.names if alias.asname}
                modules |= {name: name for name in (a.name.partition(".")[0] for a in node.names if not a.asname)}
            elif isinstance(node, ast.ImportFrom):
                module = self._absolute(node)
                asked |= {(module, alias.name) for alias in node.names}
                modules |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.Attribute):
                root, _, path = _dotted(node.value).partition(".")
                if root in modules:
                    asked.add((f"{modules[root]}.{path}".rstrip("."), node.attr))
        return asked

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        folder = self.file.parents[node.level - 1]
        parts = [node.module] if node.module else []
        while (folder / "__init__.py").exists():
            parts, folder = [folder.name, *parts], folder.parent
        return ".".join(parts)


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of attributes, "" of anything else."""
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _words(values: Iterable[Any]) -> set[str]:
    """Strings, and the parts of those that are lists with commas."""
    return {part.strip() for text in values if isinstance(text, str) for part in (text, *text.split(","))} - {""}


def _take(code: CodeType, take: Callable[[bytes], object]) -> None:
    """Hand over what a code object does, without where it stands."""
    counts = (code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    take(repr((counts, names, code.co_code, code.co_exceptiontable)).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _take(constant, take)
        else:  # a set is in another order in every process
            take(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode())


def _values(content: Any) -> Iterator[Any]:
    """All single values of a TOML file."""
    if isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _values(part)
    else:
        yield content


def is_python(file: Path) -> bool:
    return file.suffix == ".py"


class Tree:
    """The files of a checkout; each is parsed once."""

    def __init__(self, root: Path):
        self.root = root
        self.package, self.tests = root / "src" / "provenn", root / "tests"
        self.tasks = {file.stem.replace("_", "-"): file for file in self.package.glob("tasks/*.py")}
        self.sources: dict[Path, Source] = {}
        self._files: dict[str, Path | None] = {}
        self._needs: dict[Path, set[Path]] = {}
        self.facts = {
            file.parent.name: tomllib.loads(file.read_text()) for file in self.package.glob("papers/*/paper.toml")
        }

    def source(self, file: Path) -> Source:
        if file not in self.sources:
            self.sources[file] = Source(file)
        return self.sources[file]

    def file_of(self, module: str) -> Path | None:
        """The file of one of our modules, or of one that tests share."""
        if module not in self._files:
            base = self.package.parent if module.partition(".")[0] == "provenn" else self.tests
            path = base.joinpath(*module.split("."))
            files = (path / "__init__.py", path.with_name(f"{path.name}.py"))
            self._files[module] = next((file for file in files if file.is_file()), None)
        return self._files[module]

    def files_of(self, module: str, name: str) -> Iterator[Path]:
        """The files that are run when a name is imported from a module."""
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            file = self.file_of(".".join(parts[:end]))
            if file is None:
                return
            yield file
        inner = self.file_of(f"{module}.{name}") if name else None
        if inner is not None:
            yield inner
        elif name in self.source(file).lazy:
            yield from self.files_of(*self.source(file).lazy[name])

    def own_files(self, slug: str) -> set[Path]:
        """A paper's folder and that of its tests, without what only readers read."""
        folders = (self.package / "papers" / slug, self.tests / "papers" / slug)
        files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
        return {file for file in files if not UNREAD & {*file.relative_to(self.root).parts}}

    def named(self, words: set[str]) -> Iterator[Path]:
        """The files of tasks, and of mechanisms and systems of papers, that are called by one of these words."""
        yield from (self.tasks[word] for word in words & self.tasks.keys())
        for slug, facts in self.facts.items():
            folder = self.package / "papers" / slug
            mechanisms, presets = facts.get("mechanisms", []), facts.get("presets", [])
            tasks = {facts.get("task"), *(preset.get("task") for preset in presets)} - {"", None}
            if tasks & words - self.tasks.keys() and (folder / "task.py").is_file():
                yield folder / "task.py"
            if words & {slug, *(mechanism["name"] for mechanism in mechanisms)}:
                made = {*(one["layer"] for one in mechanisms), *(one["build"] for one in presets)}
                modules = (f"provenn.papers.{slug}.{target.partition(':')[0]}" for target in made)
                yield from (file for module in modules for file in self.files_of(module, ""))
                yield folder / "paper.toml"

    def reached(self, slug: str) -> set[Path]:
        """Every file that the checks of a paper depend on."""
        own = self.own_files(slug)
        words = _words(_values(self.facts[slug])).union(*(self.source(file).strings for file in own if is_python(file)))
        waiting = {*own, *self.named(words), *self.tests.glob("papers/test_*.py"), self.tests / "conftest.py"}
        found: set[Path] = set()
        while waiting:
            file = waiting.pop()
            found.add(file)
            if is_python(file):
                waiting |= self.needs(file) - found
        return found

    def needs(self, file: Path) -> set[Path]:
        """The files that a Python file imports, asks for by the name of a task, or reads from its own folder."""
        if file not in self._needs:
            source = self.source(file)
            beside = (file.parent / text for text in source.strings if re.fullmatch(r"[\w-]+\.\w+", text))
            self._needs[file] = {
                *(target for module, name in source.imports for target in self.files_of(module, name)),
                *(other for other in beside if other.is_file()),
                *self.named(source.tasks),
            }
        return self._needs[file]

    def digest(self, slug: str) -> str:
        """Twelve hexadecimal digits that depend on all that a paper's checks do."""
        hashed = hashlib.sha256((self.root / "constraints.txt").read_bytes())
        for file in sorted(self.reached(slug)):
            hashed.update(f"{file.relative_to(self.root)} {self._content(file)}\n".encode())
        return hashed.hexdigest()[:12]

    def _content(self, file: Path) -> str:
        if is_python(file):
            return self.source(file).digest
        if file.suffix == ".toml":
            return repr(tomllib.loads(file.read_text()))
        return hashlib.sha256(file.read_bytes()).hexdigest()

"""Imports go one way, as CONTRIBUTING.md says; read off the syntax tree, so imports inside functions count too."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import provenn

ROOT = Path(provenn.__file__).parent

# From the bottom up. A part may import its own and those below; `papers/__init__.py` is the interface's `papers()`.
ORDER = [
    {"core"},
    {"catalog"},
    {"ops"},
    {"distributed"},
    {"nn"},
    {"data"},
    {"tasks"},
    {"training"},
    {"surgery", "evidence", "testing"},
    {"huggingface"},
    {"papers"},
    {"inference"},
    {"experiments"},
    {"__init__", "papers/__init__"},
    {"web"},
    {"cli", "__main__"},
]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
PAPERS_MAY = {"nn", "ops", "distributed", "core"}
CONVERT_MAY = PAPERS_MAY | {"huggingface"}
EXPERIMENTS_MAY = PAPERS_MAY | {"catalog", "evidence", "surgery", "tasks", "testing", "training"}
TASKS_MAY = EXPERIMENTS_MAY | {"data"}
NOT_IN_PAPERS = {"lightning", "pytorch_lightning", "typer", "rich", "fastapi", "click"}


def rule() -> str:
    """What CONTRIBUTING says of imports."""
    levels = [" ".join(sorted(part for part in parts if "__" not in part)) for parts in ORDER]
    papers = "layers, model, official, inspection of a paper: " + " ".join(sorted(PAPERS_MAY))
    lines = [*filter(None, levels), "", papers]
    lines += ["its convert: these and " + " ".join(sorted(CONVERT_MAY - PAPERS_MAY))]
    lines += ["its experiments, studies, task and bench: these and " + " ".join(sorted(EXPERIMENTS_MAY - PAPERS_MAY))]
    own = " ".join(sorted(TASKS_MAY - EXPERIMENTS_MAY))
    lines += [f"its task and training, which read their own kind of data: these and {own}"]
    lines += ["data: used by tasks alone"]
    return "\n".join(lines)


def test_the_rule_is_the_one_that_contributing_prints():
    """`python tests/test_imports.py` prints it."""
    assert f"```\n{rule()}\n```" in (ROOT.parents[1] / "CONTRIBUTING.md").read_text()


def test_every_part_in_the_rule_exists():
    known = {part_of(file) for file in files()}
    assert set(LEVEL) <= known, set(LEVEL) - known


def files() -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for file in ROOT.rglob("*.py"))


def part_of(file: str) -> str:
    if file in ("papers/__init__.py", "__init__.py"):
        return file.removesuffix(".py")
    return file.split("/")[0].removesuffix(".py")


def imported(file: str) -> Iterator[str]:
    """Dotted names that a file imports, relative ones made absolute: `from provenn.nn import x` gives provenn.nn.x."""
    package = ["provenn", *Path(file).parent.parts]
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def parts_imported(file: str) -> set[str]:
    """Parts of provenn that a file imports; `from provenn import __version__` is none."""
    names = [name.split(".") for name in imported(file)]
    return {parts[1] for parts in names if parts[0] == "provenn" and len(parts) > 1 and parts[1] in LEVEL}


@pytest.mark.parametrize("file", files())
def test_a_file_imports_nothing_above_it(file: str):
    part = part_of(file)
    assert part in LEVEL, f"{part} has no place in ORDER: say where it stands"
    above = {other for other in parts_imported(file) if LEVEL[other] > LEVEL[part]}
    assert not above, f"{file} imports {above}, which stand above {part}"


def file_of(name: str) -> str | None:
    """The file that a dotted name lies in; None for the package's own face, which loads what it names on first use."""
    parts = name.split(".")[1:]
    while parts:
        for file in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
            if (ROOT / file).is_file():
                return file
        parts.pop()
    return None


def test_no_files_import_each_other_in_a_circle_for_types_either():
    graph = {
        file: {other for name in imported(file) if name.startswith("provenn.") and (other := file_of(name))} - {file}
        for file in files()
        if file != "__init__.py"
    }
    TopologicalSorter(graph).prepare()  # a CycleError names the files


def test_data_is_read_by_tasks_alone():
    """Shared ones, and those that a paper brings as `task.py` or in `task/`, or trains on in `training/`."""
    own = re.compile(r"papers/\w+/(task|training)(\.py|/)")
    users = {file for file in files() if "data" in parts_imported(file) and part_of(file) != "data"}
    users = {file for file in users if not own.match(file)}
    assert {part_of(file) for file in users} <= {"tasks"}, users


@pytest.mark.parametrize("file", [file for file in files() if file.startswith("papers/") and file.count("/") > 1])
def test_a_paper_keeps_to_itself(file: str):
    slug = file.split("/")[1]
    for name in imported(file):
        parts = name.split(".")
        assert parts[0] not in NOT_IN_PAPERS, f"{file} imports {name}"
        if parts[:2] == ["provenn", "papers"]:
            assert parts[2] == slug, f"{file} imports another paper: {name}"
    own = parts_imported(file) - {"papers"}
    allowed = {
        "experiments": EXPERIMENTS_MAY,
        "studies": EXPERIMENTS_MAY,
        "task": TASKS_MAY,
        "training": TASKS_MAY,
        "bench": EXPERIMENTS_MAY,
        "convert": CONVERT_MAY,
    }.get(file.split("/")[2].removesuffix(".py"), PAPERS_MAY)
    assert own <= allowed, f"{file} imports {own - allowed}"


def test_the_tree_is_read_as_it_stands():
    assert parts_imported("surgery/swapping.py") == {"core", "surgery"}
    assert "provenn.core.errors.UserError" in set(imported("catalog/slots.py"))


if __name__ == "__main__":
    print(rule())

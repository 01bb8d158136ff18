"""The platform names no paper and no task: what it needs of one, it asks the one for.

So a paper's two folders, and a task's module with its faces, are all that there is of them.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import provenn
from plugins import FIXTURES
from provenn import catalog, tasks

ROOT = Path(provenn.__file__).parent
UNITS = {"papers", "tasks", "data"}  # what owns itself; embedded data belong to tasks
# A word that means something else where it stands.
OTHERWISE = {"inference/evaluation.py": {"recall"}}  # the share of a class that is found
# What pretrained models are tuned on is made of a task's own data.
ADAPTERS = {
    "huggingface/pictures.py": "image_classification",
    "huggingface/sentences.py": "text_classification",
    "huggingface/tuning.py": "language_modelling",
}
# Modules of `tasks` that are of no task.
SHARED_BY_ALL = {"base", "datasets", "demos", "discovery", "faces", "hosts", "stores"}


def platform() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT)
        if name.parts[0] not in UNITS:
            yield name.as_posix(), ast.parse(file.read_text())


def strings(tree: ast.Module) -> Iterator[str]:
    """String literals, docstrings left out."""
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.value


def words(text: str) -> list[str]:
    """What may be names in a text: so in a list, a pattern of layers or an example of an option too."""
    return re.findall(r"[a-z0-9]+(?:[-_][a-z0-9]+)*", text)


def test_the_platform_names_no_paper_and_no_task():
    ours = {slug for slug, card in catalog.cards().items() if card.built_in}
    names = {*ours, *tasks.task_names()}
    named = {
        file: {word for text in strings(tree) for word in words(text)} & names - OTHERWISE.get(file, set())
        for file, tree in platform()
    }
    assert len(named) > 150 and not any(named.values()), {file: found for file, found in named.items() if found}


def test_the_platform_imports_no_paper_and_no_task():
    imported: dict[str, set[str]] = {}
    for file, tree in platform():
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        found = {match[1] for name in modules if (match := re.match(r"provenn\.tasks\.(\w+)", name))}
        assert not any(name.startswith("provenn.papers.") for name in modules), file
        imported[file] = found - SHARED_BY_ALL
    assert {file: found for file, found in imported.items() if found} == {f: {m} for f, m in ADAPTERS.items()}


def test_pages_and_tables_of_the_platform_name_none_either():
    """Templates, scripts of the page, and TOML; records of comparisons name those that took part."""
    names = {*(slug for slug, card in catalog.cards().items() if card.built_in), *tasks.task_names()}
    names = {name for name in names if "_" in name or "-" in name}  # `rat` and `moh` stand in English and in CSS
    endings = (".html", ".js", ".css", ".toml", ".svg")
    for file in sorted(file for file in ROOT.rglob("*") if file.suffix in endings):
        if file.relative_to(ROOT).parts[0] not in UNITS:
            named = names.intersection(words(file.read_text()))
            assert not named, f"{file.relative_to(ROOT)} names {named}"


@pytest.mark.parametrize("name", tasks.task_names())
def test_what_the_faces_of_a_task_name_is_there(name):
    face = tasks.face_of(name)
    targets = [*face.hosts.values(), *([face.demo.answer] if face.demo else [])]
    if face.materials and pytest.importorskip("transformers"):
        targets += face.materials
    assert all(callable(face.resolve(target)) or face.resolve(target).task == name for target in targets)
    assert face.presets_of is None or face.presets_of in tasks.task_names()


def test_a_face_that_names_nothing_is_told_in_one_line():
    face = tasks.Face(package="provenn.tasks")
    for target, words in (("nowhere:x", "No module named"), ("demos:nothing", "no attribute")):
        with pytest.raises(provenn.core.errors.UserError, match=rf"^the face {target} [^\n]*{words}[^\n]*$"):
            face.resolve(target)


SCRIPT = """
import importlib, pkgutil, sys
from provenn import catalog, tasks
from provenn.cli import main
gone, added = sys.argv[1:3]
assert gone not in catalog.cards() and added in catalog.cards() and not catalog.cards().left_out
import provenn
for module in pkgutil.walk_packages(provenn.__path__, "provenn."):
    if not module.name.startswith(("provenn.papers", "provenn.web.migrations", "provenn.__main__")):
        importlib.import_module(module.name)
for name in tasks.task_names():
    tasks.get_task(name)
for line in (["list"], ["show", added, "--all"], ["board"], ["list", "--slot", "channel-gate"], ["data"]):
    assert main(line) == 0, line
assert tasks.get_task("newcomer-counting").name == "newcomer-counting" and main(["data", "pebbles"]) == 0
assert main(["show", gone]) == 2
from provenn.web.catalogue import Catalogue
from provenn.web import boards
papers = Catalogue()
assert gone not in papers and added in papers and len(papers) == len(catalog.cards())
assert boards.comparisons() is not None and boards.timings() is not None
from provenn.testing.checks import checks_of
assert checks_of(catalog.card(added))
model = provenn.paper(added).build()
print("done", sum(parameter.numel() for parameter in model.parameters()))
"""


TASK = """
from provenn.tasks.recall import TASK as RECALL


class Counting(type(RECALL)):
    name = "newcomer-counting"


TASK = Counting()
"""
FACES = """
[datasets.pebbles]
title = "Pebbles by the thousand"
layout = "train.csv"
holds = ["train.csv"]
"""


def test_a_paper_and_a_task_are_added_and_removed_by_their_files_alone(tmp_path):
    """A copy of the package without one paper, with another, and with another task: nothing else changes."""
    gone, added = "eca_net", "newcomer"
    package = tmp_path / "provenn"
    shutil.copytree(
        ROOT, package, ignore=shutil.ignore_patterns("__pycache__", "weights", "pictures", "samples"), symlinks=True
    )
    shutil.rmtree(package / "papers" / gone)
    folder = shutil.copytree(FIXTURES / "tiny_gate", package / "papers" / added)
    for file in folder.glob("*.py"):
        file.write_text(file.read_text().replace("tiny_gate", f"provenn.papers.{added}"))
    assert tomllib.loads((folder / "paper.toml").read_text())["presets"]
    for name, text in {"newcomer_counting.py": TASK, "newcomer_counting.toml": FACES}.items():
        (package / "tasks" / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, gone, added],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("done ")

"""`assert` is for tests: the library refuses with an error that says what came, and narrows types by functions."""

import ast
from pathlib import Path

import pytest

import provenn
from provenn.core.narrowing import of_kind, present

ROOT = Path(provenn.__file__).parent
CHECKS = ROOT / "testing"  # the checks of a paper, which fail as tests do
ALLOWED = 10  # all in web/; lower it when one goes


def asserts(folder: Path, but: Path) -> list[str]:
    files = [file for file in sorted(folder.rglob("*.py")) if not file.is_relative_to(but)]
    nodes = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text()))]
    return [f"{file.relative_to(folder)}:{node.lineno}" for file, node in nodes if isinstance(node, ast.Assert)]


def test_the_library_asserts_nothing(tmp_path):
    left = asserts(ROOT, CHECKS)
    assert [place for place in left if not place.startswith("web/")] == []
    assert len(left) <= ALLOWED, "\n".join(left)
    (tmp_path / "module.py").write_text("def f(x):\n    assert x\n")
    assert asserts(tmp_path, CHECKS) == ["module.py:2"]


def test_what_is_not_as_it_must_be_is_refused_by_name():
    assert present(0, "start") == 0 and of_kind("text", str, "name") == "text"
    with pytest.raises(ValueError, match="draws is missing here: got None"):
        present(None, "draws")
    with pytest.raises(TypeError, match="mask must be of str here, got int"):
        of_kind(3, str, "mask")

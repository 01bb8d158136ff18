"""CONTRIBUTING's worked example works, word for word: a paper in a package of its own, from an empty folder."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import provenn
from provenn.evidence.record import EVIDENCE

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
EXAMPLE = TEXT[: TEXT.index("## The rules")]


def block(before: str, language: str) -> str:
    """The first block of code after these words."""
    found = re.search(rf"{re.escape(before)}.*?```{language}\n(.*?)```", EXAMPLE, re.DOTALL)
    assert found, f"no {language} after {before!r}"
    return found[1]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The example's files, and what pip would note of them."""
    folder = tmp_path / "site" / "tinygate"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    for name, language in (("layers.py", "python"), ("paper.toml", "toml"), ("experiments.py", "python")):
        (folder / name).write_text(block(f"`tinygate/{name}`", language))
    (tmp_path / "test_tinygate.py").write_text(block("`tests/test_tinygate.py`", "python"))
    points = tomllib.loads(block("`pyproject.toml`", "toml"))["project"]["entry-points"]
    facts = tmp_path / "site" / "tinygate-0.1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tinygate\nVersion: 0.1.0\n")
    lines = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in names.items()) for group, names in points.items()]
    (facts / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(package: Path, *words: str) -> str:
    source = Path(provenn.__file__).parents[1]
    environment = {"PYTHONPATH": f"{source}:{package.parent}", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=package.parents[1], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_worked_example_works(package: Path) -> None:
    assert "Tiny gates make small networks more accurate." in run(package, "provenn", "show", "tinygate")
    commands = [
        shlex.split(line, comments=True) for line in EXAMPLE.splitlines() if line.startswith("provenn reproduce")
    ]
    assert commands[0] == ["provenn", "reproduce", "tinygate", "--budget", "smoke"]
    run(package, *commands[0], "--out", "run", "--seeds", "2")
    (package / EVIDENCE).write_bytes((package.parents[1] / "run" / "tinygate" / EVIDENCE).read_bytes())
    assert "tinygate" in run(package, "provenn", "board")
    run(package, "pytest", "-q", "-p", "no:cacheprovider", "test_tinygate.py")

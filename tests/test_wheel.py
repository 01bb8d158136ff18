"""What people install: the evidence and its pictures come with the wheel, and are shown where there is no checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import provenn
from provenn import catalog
from provenn.evidence.record import EVIDENCE

ROOT = Path(__file__).parent.parent
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PATH": os.environ["PATH"]}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (file,) = folder.glob("*.whl")
    return file


def test_papers_bring_their_facts_evidence_and_weights(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for slug, card in catalog.cards().items():
        if not card.package.startswith("provenn."):
            continue
        files = ["paper.toml", "README.md", *(EVIDENCE for _ in [1] if (card.folder / EVIDENCE).exists())]
        files += [f"pictures/{file.name}" for file in card.folder.glob("pictures/*")]
        files += [f"weights/{file.name}" for file in card.folder.glob("weights/*")]
        assert {f"provenn/papers/{slug}/{file}" for file in files} <= names
    results = Path(provenn.__file__).parent / "results"
    shown = {f"provenn/results/{file.relative_to(results)}" for file in results.glob("*/*.json")}
    assert shown and shown <= names
    assert not [name for name in names if "ledger.json" in name or name.startswith("tests/")]


def test_show_board_and_predict_work_from_an_installed_wheel(wheel, tmp_path):
    """In an environment of its own that has this one's dependencies, not its checkout, and no network."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    # A path entry, unlike a site folder, does not read the .pth file that leads to the checkout.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def run(*words: str) -> str:
        done = subprocess.run(
            [python, "-m", "provenn", *words], cwd=tmp_path, env=OFFLINE, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import provenn; print(provenn.__file__)"], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    assert where.startswith(str(tmp_path)), where
    assert "def " in run("predict", "rat", "def ", "--set", "tokens=3")
    board = run("board")
    for slug, card in catalog.cards().items():
        if (card.folder / EVIDENCE).exists():
            assert slug in board
            shown = run("show", slug)
            assert "measured 20" in shown and "needs a run" not in shown
            break

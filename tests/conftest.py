"""What several tests share: a paper in a package of another name, installed as pip would."""

import os

# Before torch is imported: workers that each have a thread for every core wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from provenn import catalog

settings.register_profile("untimed", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("untimed")
FIXTURES = Path(__file__).parent / "fixtures"


def install(package: Path, site: Path) -> Path:
    """Put a package and the metadata that pip would write for it into a site directory."""
    shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    facts = site / f"{package.name}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[{catalog.ENTRY_POINT_GROUP}]\n{package.name} = {package.name}\n")
    return site


@pytest.fixture
def untyped() -> Iterator[None]:
    """Run-time shape checks cannot be traced, and would refuse bad shapes before we do."""
    from provenn.testing.promises import unchecked

    with unchecked():
        yield


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site directory with the one-paper package `tiny_gate`."""
    (tmp_path / "site").mkdir()
    return install(FIXTURES / "tiny_gate", tmp_path / "site")


@pytest.fixture
def third_party(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, importable in this process for as long as the test runs."""
    monkeypatch.syspath_prepend(str(site))
    catalog.cards.cache_clear()
    yield site
    catalog.cards.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tiny_gate"]:
        del sys.modules[name]

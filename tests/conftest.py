"""What several tests share: a paper in a package of another name, installed as pip would."""

import os

# Before torch is imported: workers that each have a thread for every core wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

from provenn import catalog

settings.register_profile("untimed", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("untimed")
FIXTURES = Path(__file__).parent / "fixtures"


def install(package: Path, site: Path, points: dict[str, dict[str, str]] | None = None) -> Path:
    """Put a package and the metadata that pip would write for it into a site directory; by default it is a paper."""
    shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    facts = site / f"{package.name}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: 1.0\n")
    points = points or {catalog.ENTRY_POINT_GROUP: {package.name: package.name}}
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in points.items()]
    (facts / "entry_points.txt").write_text("\n".join(lines))
    return site


@contextmanager
def importable(site: Path, *packages: str) -> Iterator[None]:
    """A site directory on the path, and its packages forgotten afterwards."""
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    catalog.cards.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        catalog.cards.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]


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
def third_party(site: Path) -> Iterator[Path]:
    """The same, importable in this process for as long as the test runs."""
    with importable(site, "tiny_gate"):
        yield site


@pytest.fixture(scope="module")
def pair_rating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A site directory with the package `pair_rating`: a paper with a task of its own, and a task by an entry point.

    It is importable in this process while the tests of a module run.
    """
    project, site = FIXTURES / "pair_rating", tmp_path_factory.mktemp("site")
    points = tomllib.loads((project / "pyproject.toml").read_text())["project"]["entry-points"]
    install(project / "pair_rating", site, points)
    with importable(site, "pair_rating"):
        yield site

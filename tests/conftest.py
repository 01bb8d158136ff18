"""What several tests share: a paper in a package of another name, installed as pip would."""

import os

# Before torch is imported: workers that each have a thread for every core wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from plugins import FIXTURES, importable, install

pytest_plugins = ["suite"]

settings.register_profile("untimed", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("untimed")


@pytest.fixture
def untyped() -> Iterator[None]:
    """Run-time shape checks cannot be traced, and would refuse bad shapes before we do."""
    from provenn.testing.common import unchecked

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

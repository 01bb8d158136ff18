"""Papers in packages of another name, installed as pip would."""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from provenn import catalog
from provenn.catalog import query, shelf
from provenn.tasks import datasets

FIXTURES = Path(__file__).parent / "fixtures"
SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str) -> ModuleType:
    """A script of the repository, imported."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    """A site directory on the path, and its packages forgotten afterwards; before, those that lie elsewhere."""

    def forget() -> None:
        catalog.cards.cache_clear()
        datasets.known.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]

    forget()  # collecting the suite imports the fixtures where they lie
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        forget()


def put_on_shelf(monkeypatch: Any, cards: Callable[[], dict[str, Any]]) -> None:
    """Let the catalogue hold these papers, whichever of its modules is asked."""
    for module in (catalog, shelf, query):
        monkeypatch.setattr(module, "cards", cards)

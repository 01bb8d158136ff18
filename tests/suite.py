"""What `make test` leaves out: checks of papers that passed on the code that stands, as `tests/passed.json` says.

The checks of a paper are the tests under `tests/papers/`, those in its own folder and those of `tests/papers/test_*.py`
that are asked of it, and the doctests of its code. `--record-passed` (`make test-all`, `make record`) writes an entry
for each paper all of whose checks ran and none failed: the digest of all that they reach (`closure.py`), the versions
of torch and Python, and the date. An entry of today's digest and versions stays where none of its checks failed, so
that the suite can be recorded in parts, by `-k`. `--skip-passed` (`make test`) leaves out the checks of every paper
whose entry is of today's digest and versions, but for the first one marked `sample`.
"""

import gc
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version_tuple
from typing import Any

import pytest

from closure import Tree
from provenn.core.files import write_atomically

FILE = Path("tests", "passed.json")
Entries = dict[str, dict[str, str]]


def versions() -> dict[str, str]:
    """What an entry is of, beside the code."""
    return {"torch": version("torch"), "python": ".".join(python_version_tuple()[:2])}


def read_entries(file: Path) -> Entries:
    """The entries of a file; none where there is no file.

    Raises:
        ValueError: it is no file of entries.
    """
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{FILE} cannot be read ({error}): delete it, or write it anew by `make test-all`") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{FILE} holds no entries of papers: delete it, or write it anew by `make test-all`")
    return entries


def standing(entries: Entries, digests: dict[str, str]) -> set[str]:
    """The papers whose entry is of today's digest and versions."""
    today = {slug: {"digest": digest, **versions()} for slug, digest in digests.items()}
    return {slug for slug, facts in today.items() if facts.items() <= entries.get(slug, {}).items()}


def summary(papers: Iterable[str], stand: set[str]) -> str:
    """One line on whose checks are left out and whose are not."""
    whole = sorted({*papers} - stand)
    of = ", ".join(f"{name} {number}" for name, number in versions().items())
    line = f"checks of {len(stand)} of {len(stand) + len(whole)} papers stand in {FILE} ({of})"
    return f"{line}; checked whole: {', '.join(whole)}" if stand and whole else line


def digests_of(root: Path) -> dict[str, str]:
    tree = Tree(root)
    return {slug: tree.digest(slug) for slug in sorted(tree.facts)}


def paper_of(item: pytest.Item, papers: Iterable[str]) -> str | None:
    """The paper whose check a test is; None of what all share."""
    path = item.path.relative_to(item.config.rootpath).parts
    if path[:2] == ("tests", "papers") or path[:3] == ("src", "provenn", "papers"):
        asked = item.callspec.params.values() if hasattr(item, "callspec") else ()
        words = (word.partition(" ")[0] for word in (*path, *asked) if isinstance(word, str))
        return next((word for word in words if word in papers), None)
    return None


@pytest.fixture(autouse=True)
def registered_methods_stay() -> Iterator[None]:
    """Methods of context parallelism that a test registers are gone after it, whichever test comes next."""
    yield
    module = sys.modules.get("provenn.distributed.methods")
    for name in [name for name in module.METHODS if " with " in name] if module is not None else ():
        del module.METHODS[name]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("provenn")
    group.addoption("--skip-passed", action="store_true", help=f"leave out checks that stand in {FILE}")
    group.addoption("--record-passed", action="store_true", help=f"write {FILE}: of the papers that are checked whole")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nothing that collecting imports is garbage: looking for some took an eleventh of its time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"sample: the first is asked of a paper even where its checks stand in {FILE}")
    skips, records = config.getoption("--skip-passed"), config.getoption("--record-passed")
    if skips:
        config.pluginmanager.register(SkipsPassed(config))
    if records:
        if not hasattr(config, "workerinput") and config.args_source is not config.ArgsSource.TESTPATHS:
            raise pytest.UsageError("--record-passed: without paths; give parts of the suite by -k")
        config.pluginmanager.register(RecordsPassed(config))


class SkipsPassed:
    """Leaves out the checks of papers whose entry stands; found once, and handed to the workers."""

    def __init__(self, config: pytest.Config):
        self.config = config
        if hasattr(config, "workerinput"):
            self.papers, self.stand = (set(config.workerinput[name]) for name in ("papers", "stand"))
            return
        digests = digests_of(config.rootpath)
        try:
            self.papers, self.stand = {*digests}, standing(read_entries(config.rootpath / FILE), digests)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput |= {"papers": sorted(self.papers), "stand": sorted(self.stand)}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        _say(self.config, summary(self.papers, self.stand))

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left, sampled = set(), set()
        for item in items:
            paper = paper_of(item, self.papers)
            if paper in self.stand:
                first = paper not in sampled and item.get_closest_marker("sample")
                if first:
                    sampled.add(paper)
                else:
                    left.add(item)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


class RecordsPassed:
    """Writes an entry for each paper all of whose checks ran and none failed; workers tell what they collected.

    Those marked `exhaustive` are no part of what an entry stands for: it serves `make test`, which leaves them out.
    """

    def __init__(self, config: pytest.Config):
        self.config = config
        self.worker = hasattr(config, "workerinput")
        self.digests = {} if self.worker else digests_of(config.rootpath)
        self.papers = {file.parent.name for file in config.rootpath.glob("src/provenn/papers/*/paper.toml")}
        self.checks: defaultdict[str, list[str]] = defaultdict(list)
        self.partial: set[str] = set()
        self.ended: set[str] = set()
        self.failed: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if paper := paper_of(item, self.papers):
                self.checks[paper].append(item.nodeid)

    def pytest_deselected(self, items: Iterable[pytest.Item]) -> None:
        left = [item for item in items if not item.get_closest_marker("exhaustive")]
        self.partial |= {paper for paper in (paper_of(item, self.papers) for item in left) if paper}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.partial |= self.papers

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        if report.when == "teardown":
            self.ended.add(report.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        told = getattr(node, "workeroutput", {})
        self.checks |= told.get("checks", {})
        self.partial |= {*told.get("partial", ())}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        if self.worker:
            self.config.workeroutput |= {"checks": dict(self.checks), "partial": sorted(self.partial)}  # type: ignore[attr-defined]  # of xdist
            return
        root, today = self.config.rootpath, {**versions(), "date": datetime.now(UTC).date().isoformat()}
        unmoved = dict(self.digests.items() & digests_of(root).items())  # of code that changed nothing is known
        try:
            earlier = read_entries(root / FILE)
        except ValueError:
            earlier = {}
        entries = {slug: earlier[slug] for slug in standing(earlier, unmoved) if not self.failed & {*self.checks[slug]}}
        passed = [
            slug
            for slug in unmoved
            if slug not in self.partial and self.checks[slug] and {*self.checks[slug]} <= self.ended - self.failed
        ]
        entries |= {slug: {"digest": unmoved[slug], **today} for slug in passed}
        lines = (f'"{slug}": {json.dumps(entries[slug])}' for slug in sorted(entries))
        write_atomically(root / FILE, "{\n" + ",\n".join(lines) + "\n}\n")
        stand = f"{len(entries)} of {len(self.digests)} stand in {FILE}"
        _say(self.config, f"{FILE}: all checks of {len(passed)} papers passed; {stand}")


def _say(config: pytest.Config, line: str) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(line)

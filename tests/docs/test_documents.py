"""The documents agree with the code and with each other, and README and CONTRIBUTING stay short."""

import re
import tomllib
from pathlib import Path

import pytest

import plugins
import provenn
from provenn.catalog import slots

ROOT = Path(__file__).parents[2]
MOST_BYTES = 8 * 1024


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_first_documents_are_short_beside_the_table_of_papers(name):
    before, _, rest = (ROOT / name).read_text().partition("<!-- papers -->")
    assert len((before + rest.partition("<!-- /papers -->")[2]).encode()) <= MOST_BYTES


def test_the_table_of_papers_is_todays():
    """`make readme` writes it."""
    readme = (ROOT / "README.md").read_text()
    assert plugins.script("papers_table").with_table(readme) == readme


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    version, date = re.search(r"^## (\S+) \((\d{4}-\d{2}-\d{2})\)$", (ROOT / "CHANGELOG.md").read_text(), re.M).groups()
    assert project["version"] == provenn.__version__ == version
    assert f"\nversion: {version}\n" in citation and f"\ndate-released: {date}\n" in citation


def test_the_glossary_has_every_slot():
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    assert set(re.findall(r"^\| `([a-z-]+)` \|", glossary, re.M)) == set(slots.SLOTS)


def test_every_task_has_a_page_whose_commands_have_their_options(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import docs_pages
    from test_blocks import BLOCK, commands, parse

    from provenn.tasks import get_task, task_names

    for name in task_names():
        page = docs_pages.task_page(get_task(name))
        assert page.startswith("# ") and "**Metric:**" in page
        for block in BLOCK.finditer(page):
            for words in commands(block[3]):
                parse(words[1:])


def test_every_guide_is_in_the_navigation():
    """`make docs` is strict: a page that the navigation leaves out ends it."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    docs = ROOT / "docs"
    pages = [str(page.relative_to(docs)) for folder in ("guides", "author") for page in (docs / folder).glob("*.md")]
    assert pages and [page for page in pages if page not in navigation] == []

"""Citations: every paper's entry parses, and an arXiv number is one in any dress."""

import re
import unicodedata
from datetime import date

import pytest

from plugins import put_on_shelf
from provenn import catalog
from provenn.catalog.citation import arxiv_number, bibtex
from provenn.core.errors import UserError


def parse(entry: str) -> tuple[str, dict[str, str]]:
    """The key and the fields of an entry, by the rules of BibTeX: values are braced in pairs, or bare names."""
    head, *lines, end = entry.splitlines()
    key = re.fullmatch(r"@misc\{([^\s,{}]+),", head)[1]
    assert end == "}"
    fields = {}
    for line in lines:
        name, value = re.fullmatch(r"  ([a-z]+) = (\{.*\}|[a-z]{3}),", line).groups()
        depth = 0
        for character in re.sub(r"\\[{}]", "", value):
            depth += {"{": 1, "}": -1}.get(character, 0)
            assert depth >= 0
        assert depth == 0 and name not in fields
        fields[name] = value
    return key, fields


@pytest.mark.parametrize("slug", catalog.cards())
def test_every_paper_has_an_entry_with_all_its_authors(slug):
    card = catalog.card(slug)
    key, fields = parse(card.bibtex())
    assert key == slug and fields["year"] == f"{{{card.date.year}}}" and fields["month"].isalpha()
    assert fields["eprint"] == f"{{{card.arxiv}}}" and fields["archiveprefix"] == "{arXiv}"
    assert fields["title"].startswith("{{"), "capitals are kept"
    assert fields["author"].count(" and ") == len(card.authors) - 1 and all(card.authors)
    assert "key" not in fields


def test_what_tex_would_take_for_a_command_is_escaped_and_a_paper_without_names_can_be_sorted():
    title = r"50% of A & B_1: {x} #2 \o"
    key, fields = parse(bibtex("a_b", title, [], date(2024, 5, 1), None))
    assert key == "a_b" and fields["key"] == r"{a\_b}" and "author" not in fields and "url" not in fields
    assert fields["title"] == r"{{50\% of A \& B\_1: \{x\} \#2 \textbackslash{}o}}"
    names = ["Çağlar Gülçehre", "Jiří Novák", "Erdős Pál"]
    author = parse(bibtex("a_b", title, names, date(2024, 5, 1), None))[1]["author"]
    assert author == r"""{{\c{C}}a{\u{g}}lar G{\"u}l{\c{c}}ehre and Ji{\v{r}}{\'i} Nov{\'a}k and Erd{\H{o}}s P{\'a}l}"""
    assert unicodedata.is_normalized("NFC", author)


@pytest.mark.parametrize("text", ["1910.03151", "1910.03151v12", "arXiv:1910.03151", "ARXIV:1910.03151v2",
                                  "https://arxiv.org/abs/1910.03151v1", "arxiv.org/pdf/1910.03151.pdf"])  # fmt: skip
def test_an_arxiv_number_in_any_dress(text):
    assert arxiv_number(text) == "1910.03151" and catalog.card(text).slug == catalog.slug_of(text) == "eca_net"


@pytest.mark.parametrize("text", ["1910.031", "1910.031511", "v1910.03151", "arXiv", "eca_net", "", "12345"])
def test_what_is_no_arxiv_number(text):
    assert arxiv_number(text) is None


def test_a_number_of_two_papers_asks_for_the_slug(monkeypatch):
    card = catalog.card("eca_net")
    shelf = catalog.Shelf(eca_net=card, other=card.model_copy(update={"slug": "other"}))
    shelf.left_out = {}
    put_on_shelf(monkeypatch, lambda: shelf)
    with pytest.raises(UserError, match=r"several papers have the arXiv number 1910.03151: name eca_net or other"):
        catalog.card("1910.03151v1")

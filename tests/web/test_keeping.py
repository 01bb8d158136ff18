"""What follows from the catalogue alone is rendered once; what does not is rendered each time."""

from itertools import count

import pytest

from provenn.web import keeping
from provenn.web.database import Database
from provenn.web.site import Site


@pytest.fixture
def site(settings) -> Site:
    return Site(settings, Database("sqlite://"))


def rendered(site: Site, *keys: str) -> list[str]:
    numbers = count()
    text = "{% keep key %}{{ next() }}{% endkeep %}, {{ next() }}"
    template = site.templates.from_string(text)
    return [template.render(key=key, next=lambda: next(numbers)) for key in keys]


def test_a_piece_is_rendered_once_for_each_key(site):
    assert rendered(site, "a", "a", "b", "a") == ["0, 1", "0, 2", "3, 4", "0, 5"]


def test_a_static_copy_keeps_nothing(settings):
    """Its links depend on the page."""
    assert rendered(Site(settings, Database("sqlite://"), copied=True), "a", "a") == ["0, 1", "2, 3"]


def test_there_is_an_end_to_what_is_kept(site, monkeypatch):
    monkeypatch.setattr(keeping, "MOST", 3)
    rendered(site, *"abcdefgh")
    assert len(site.pieces) <= 3


def test_a_page_is_the_same_when_its_pieces_are_kept(client):
    for path in ("/", "/papers/craft", "/papers/rat", "/not-held", "/boards", "/boards/token-mixer", "/boards/latency"):
        client.app.state.site.pieces.clear()
        assert client.get(path).text == client.get(path).text
    first = client.get("/papers/rat").text
    assert client.get("/papers/craft").text != first == client.get("/papers/rat").text

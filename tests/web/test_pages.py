"""What readers see: every state of the list is an address, and every paper has a page."""

import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from fastapi.testclient import TestClient

from plugins import put_on_shelf
from provenn import catalog
from provenn.evidence.claim import ClaimVerdict
from provenn.web import create_app
from provenn.web.catalogue import Entry
from provenn.web.listing import Listing

VOID = {"area", "br", "hr", "img", "input", "link", "meta", "rect", "circle", "line", "path"}


class Outline(HTMLParser):
    """Whether every element that is opened is closed, and which identifiers and links there are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named["href"]] if tag == "a" else []
        assert "style" not in named, f"a style inside a page, which its policy forbids: {tag}"
        assert not any(name.startswith("on") for name in named), f"a script inside a page: {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    assert not parser.open
    return parser


def titles(text: str) -> list[str]:
    return re.findall(r'<a href="/papers/([a-z0-9_]+)">', text)


def test_the_list_has_every_paper_newest_first(client):
    dates = [catalog.cards()[slug].date for slug in titles(client.get("/").text)]
    assert len(dates) == len(catalog.cards()) and dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("slug", catalog.cards())
def test_a_paper_has_a_page_whose_links_lead_somewhere(client, slug):
    answer = client.get(f"/papers/{slug}")
    assert answer.status_code == 200
    page = outline(answer.text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    for claim in catalog.card(slug).claims:
        assert claim.says in unescape(answer.text)


def test_the_strip_says_what_the_board_says(client):
    text = client.get("/?q=eca_net").text
    shown = re.findall(r'<span class="s-([a-z-]+)(?: headline)?" title=', text)
    assert len(shown) == len(catalog.card("eca_net").claims)
    assert set(shown) <= {str(standing).replace(" ", "-") for standing in ClaimVerdict}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("?slot=channel-gate&q=eca", {"eca_net"}),
        ("?task=super-resolution", {"craft"}),
        ("?q=chanel+attention&tag=convolution", {"eca_net"}),
        ("?q=no+such+thing+at+all", set()),
        ("?task=nonsense", set()),
    ],
)
def test_filters_keep_what_fits(client, query, expected):
    found = set(titles(client.get(f"/{query}").text))
    assert found == expected


def test_every_order_shows_the_same_papers(client):
    states = [titles(client.get(f"/?sort={sort}").text) for sort in ("date", "votes", "share", "nonsense")]
    assert all(sorted(state) == sorted(states[0]) for state in states)
    shares = [client.app.state.site.catalogue[slug].share for slug in states[2]]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


def test_a_state_is_its_query_string():
    state = Listing(q="a b&c", sort="votes", verdict="not measured")
    assert Listing.of(dict(pair.split("=") for pair in ["sort=votes"])).sort == "votes"
    assert state.query == "?q=a+b%26c&sort=votes&verdict=not+measured"
    assert Listing().query == ""


def test_words_bring_what_fits_best_first(client):
    found = titles(client.get("/?q=chanel+attention").text)
    assert found[0] == "eca_net" and len(found) > 1
    by_date = titles(client.get("/?q=chanel+attention&sort=date").text)
    assert sorted(by_date) == sorted(found) and by_date[0] != "eca_net"


def test_an_arxiv_number_leads_to_its_paper(client):
    answer = client.get("/papers/arXiv:1910.03151v4", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (301, "/papers/eca_net")


def test_of_papers_of_one_arxiv_number_ours_is_shown_with_the_way_to_the_others(client, monkeypatch):
    ours = catalog.card("eca_net")
    other = ours.model_copy(update={"slug": "another_eca", "package": "another", "title": "Another ECA"})
    shelf = {**catalog.cards(), "another_eca": other}
    put_on_shelf(monkeypatch, lambda: shelf)
    entries = client.app.state.site.catalogue._entries
    monkeypatch.setitem(entries, "another_eca", Entry.of(other))
    answer = client.get("/papers/1910.03151", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (301, "/papers/eca_net")
    for slug, link in (("eca_net", "/papers/another_eca"), ("another_eca", "/papers/eca_net")):
        page = client.get(f"/papers/{slug}")
        assert page.status_code == 200 and f'href="{link}"' in page.text.partition('id="related"')[0]
    assert "Under this arXiv number" not in client.get("/papers/craft").text
    assert client.get("/api/papers/1910.03151").json()["slug"] == "eca_net"
    assert {"eca_net", "another_eca"} <= set(titles(client.get("/?q=1910.03151").text))
    found = client.get("/api/papers/search?q=1910.03151").json()
    assert {each["paper"]["slug"] for each in found} == {"eca_net", "another_eca"}


def test_what_is_not_there_says_what_may_be_meant(client):
    answer = client.get("/papers/eca_nett")
    assert (
        answer.status_code == 404
        and "<h1>Not found</h1>" in answer.text
        and "did you mean" in answer.text
        and "eca_net" in answer.text
    )
    assert client.get("/papers/x", headers={"accept": "application/json"}).json()["error"].startswith("There is no")


def test_a_page_that_did_not_change_is_not_sent_again(client):
    first = client.get("/papers/craft")
    again = client.get("/papers/craft", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/papers/rat", headers={"if-none-match": first.headers["etag"]}).status_code == 200


def test_no_page_may_run_or_load_what_is_not_ours(client):
    policy = client.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy


def test_the_records_are_there_as_json(client):
    assert client.get("/papers/eca_net/evidence.json").json()["paper"] == "eca_net"


def test_first_views_are_light(client):
    for path in ("/", "/papers/eca_net"):
        page = client.get(path)
        assets = re.findall(r'(?:href|src)="(/static/[^"]+)"', page.text)
        assert len(page.content) + sum(len(client.get(asset).content) for asset in assets) < 125_000


@pytest.mark.parametrize("path", ["/", "/papers/craft", "/api/papers", "/static/style.css", "/papers/nobody"])
def test_who_asks_for_the_head_alone_gets_it(client, path):
    whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    for name in ("content-type", "content-length", "etag", "content-security-policy"):
        assert head.headers.get(name) == whole.headers.get(name), name


def test_a_redirect_names_no_host(client):
    """The one that a request names may be anybody's, and the scheme is the proxy's to know."""
    answer = client.get("/papers/craft/", headers={"host": "localhost:1"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/papers/craft")


def test_a_file_whose_address_says_its_version_is_kept(client):
    address = re.search(r'href="(/static/style\.css\?\w+)"', client.get("/").text)[1]
    assert "immutable" in client.get(address).headers["cache-control"]
    assert "cache-control" not in client.get(address.partition("?")[0]).headers
    assert "immutable" not in client.get("/static/none.css?1").headers.get("cache-control", "")


def test_headers_that_keep_a_page_from_harm(client, settings):
    """On pages, errors and files alike; readers who came by TLS once come by TLS."""
    for path in ("/", "/papers/nobody", "/static/page.js", "/api/papers"):
        headers = client.get(path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
        assert (
            "base-uri 'none'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
        )
        assert "strict-transport-security" not in headers
    secure = create_app(settings.model_copy(update={"url": "https://papers.example.org"}))
    assert "max-age=" in TestClient(secure).get("/").headers["strict-transport-security"]


def test_filters_by_what_a_paper_brings_and_came_to(client, monkeypatch):
    catalogue = client.app.state.site.catalogue
    monkeypatch.setattr(Entry, "has_demo", property(lambda entry: entry.slug in ("craft", "rat")))
    kept = {
        "has=code": lambda entry: entry.card.code,
        "has=demo": lambda entry: entry.has_demo,
        "verdict=contradicted": lambda entry: entry.counts[ClaimVerdict.CONTRADICTED],
        "verdict=verified": lambda entry: entry.counts[ClaimVerdict.VERIFIED],
    }
    for query, keeps in kept.items():
        wanted = [slug for slug, entry in catalogue.items() if keeps(entry)]
        assert titles(client.get(f"/?{query}").text) == wanted and 0 < len(wanted) < len(catalogue), query


def test_what_is_alike_is_ordered_by_date(client):
    catalogue = client.app.state.site.catalogue
    assert titles(client.get("/?sort=votes").text) == titles(client.get("/?sort=date").text), "nobody has voted"
    by_share = [catalogue[slug] for slug in titles(client.get("/?sort=share").text)]
    alike = [(a, b) for a, b in pairwise(by_share) if a.share == b.share]
    assert alike and all(a.card.date >= b.card.date for a, b in alike)


def test_records_and_pictures_that_did_not_change_are_not_sent_again(client):
    for path in ("/papers/eca_net/evidence.json", "/papers/eca_net/pictures/gates.png"):
        tag = client.get(path).headers["etag"]
        assert client.get(path, headers={"if-none-match": tag}).status_code == 304

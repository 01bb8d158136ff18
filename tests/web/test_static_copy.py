"""The catalogue as files: every link leads to one, also under a path, and a folder has all of them or none."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urldefrag, urljoin, urlsplit
from urllib.request import urlopen

import pytest

from provenn import catalog
from provenn.core.errors import UserError
from provenn.web import Settings, static_copy
from provenn.web.listing import Listing

ELSEWHERE = ("http://", "https://", "mailto:", "data:")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"), secret="of the tests", url="https://papers.example.org/some")


@pytest.fixture(scope="module")
def copy(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hosted") / "some" / "where"
    assert static_copy.export(folder, settings) == sum(file.is_file() for file in folder.rglob("*")) - 1
    return folder


@pytest.fixture(scope="module")
def hosted(copy) -> Iterator[str]:
    """The copy two folders below the root of a host that only gives files."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(copy.parents[1])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/some/where/"
    server.shutdown()
    server.server_close()


class Links(HTMLParser):
    """What a page links to and loads, and its identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src", "action", "poster") and value]
        self.ids |= {value for name, value in attrs if name == "id" and value}


def read(text: str) -> Links:
    parser = Links()
    parser.feed(text)
    return parser


def test_every_link_of_every_page_leads_to_a_file(copy):
    pages = {file: read(file.read_text(encoding="utf-8")) for file in copy.rglob("*.html")}
    for file, page in pages.items():
        for link in page.links:
            if link.startswith(ELSEWHERE):
                continue
            assert not link.startswith("/"), f"{file}: {link} leads out of the copy"
            path, fragment = urldefrag(link)
            target = (file.parent / path.partition("?")[0]).resolve() if path else file
            assert target.is_file() and target.is_relative_to(copy.resolve()), f"{file}: {link}"
            if fragment and target.suffix == ".html":
                assert fragment in pages[target].ids, f"{file}: {link}"


def test_it_is_whole_under_a_path_of_any_host(hosted):
    """Crawled as a browser would, from the list."""
    waiting, seen = [hosted + "index.html"], set()
    while waiting:
        address = urldefrag(waiting.pop())[0]
        if address in seen:
            continue
        seen.add(address)
        assert address.startswith(hosted), address
        try:
            with urlopen(address) as answer:
                text = answer.read().decode() if answer.headers.get_content_type() == "text/html" else ""
        except HTTPError as error:
            raise AssertionError(f"{address}: {error}") from None
        waiting += [urljoin(address, link) for link in read(text).links if not link.startswith(ELSEWHERE)]
    assert {f"{hosted}papers/{slug}.html" for slug in catalog.cards()} <= seen


def test_each_filter_has_a_page_of_its_papers(copy):
    gate = (copy / "slot" / "channel-gate.html").read_text()
    assert "../papers/eca_net.html" in gate and "../papers/craft.html" not in gate
    cards = catalog.cards().values()
    assert len(list((copy / "tag").iterdir())) == len({tag for card in cards for tag in card.tags})
    shares = [catalog.card(slug) for slug in listed(copy / "sort" / "share.html")]
    assert len(shares) == len(catalog.cards()) and listed(copy / "index.html") != [card.slug for card in shares]


def listed(file: Path) -> list[str]:
    links = (link for link in read(file.read_text()).links if "papers/" in link and "#" not in link)
    return list(dict.fromkeys(Path(link).stem for link in links if link.endswith(".html")))


def test_the_list_carries_what_its_script_searches(copy):
    text = (copy / "index.html").read_text()
    carried = [json.loads(part.partition("'")[0]) for part in text.split("data-paper='")[1:]]
    assert len(carried) == len(catalog.cards())
    (eca,) = [paper for paper in carried if paper["words"].startswith("ecanet ")]
    assert "channel-gate" in eca["slot"] and 0 <= eca["share"] <= 1 and "channel attention" in eca["tag"]


def test_programs_find_files(copy):
    papers = json.loads((copy / "api" / "papers.json").read_text())
    assert {paper["slug"] for paper in papers} == set(catalog.cards())
    for paper in papers:
        page = urlsplit(paper["projectPage"])
        assert (copy / page.path.removeprefix("/some/")).is_file()
    assert json.loads((copy / "api" / "papers" / "craft.json").read_text())["experiments"]
    for feed in ("papers", "verdicts"):
        assert "https://papers.example.org/some/papers/" in (copy / "feeds" / f"{feed}.atom").read_text()


def test_nothing_of_people_or_demos_is_in_it(copy):
    for file in copy.rglob("*.html"):
        text = file.read_text()
        assert 'method="post"' not in text and 'name="csrf"' not in text, file
        assert 'id="try"' not in text, file


def test_what_is_in_the_folder_is_not_lost(settings, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and is no earlier export"):
        static_copy.export(tmp_path, settings)
    with pytest.raises(UserError, match="is a file"):
        static_copy.export(tmp_path / "thesis.txt", settings)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]

    earlier = tmp_path / "site"
    earlier.mkdir()
    (earlier / static_copy.MARK).write_text("provenn 0.0\n")
    (earlier / "index.html").write_text("old")

    async def broken(app, address):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(static_copy, "_answer", broken)
        static_copy.export(earlier, settings)
    assert (earlier / "index.html").read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["site", "thesis.txt"]


def test_an_earlier_export_is_replaced_whole(copy, settings, tmp_path, monkeypatch):
    earlier = tmp_path / "site"
    earlier.mkdir()
    (earlier / static_copy.MARK).write_text("provenn 0.0\n")
    (earlier / "gone.html").write_text("of a paper that is no more")

    async def quick(app, address):
        return b"new"

    monkeypatch.setattr(static_copy, "_answer", quick)
    static_copy.export(earlier, settings)
    assert (earlier / "index.html").read_bytes() == b"new" and not (earlier / "gone.html").exists()


def test_what_a_link_leads_to_is_replaced_and_not_the_link(settings, tmp_path, monkeypatch):
    async def quick(app, address):
        return b"new"

    monkeypatch.setattr(static_copy, "_answer", quick)
    (tmp_path / "www").mkdir()
    (tmp_path / "site").symlink_to("www")
    for _ in range(2):
        static_copy.export(tmp_path / "site", settings)
        assert (tmp_path / "www" / "index.html").read_bytes() == b"new" and (tmp_path / "site").is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["site", "www"]


def test_every_state_of_the_list_has_one_file():
    from provenn.web.links import file_of

    states = [Listing(tag=tag).query for tag in {tag for card in catalog.cards().values() for tag in card.tags}]
    assert len({file_of(f"/{state}") for state in states}) == len(states)

"""What programs read: JSON as its description says, the client of Hugging Face's daily papers, and valid feeds."""

import re
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from datetime import date, datetime
from itertools import chain
from urllib.parse import urlsplit

import pytest
import schemathesis
import uvicorn
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from provenn import catalog
from provenn.evidence import view
from provenn.evidence.verdict import Verdict
from provenn.web import Settings, create_app, machines
from provenn.web.app import ROUTERS
from provenn.web.opinions import Counts

ATOM = {"a": "http://www.w3.org/2005/Atom"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"), secret="of the tests", demos=False)


@pytest.fixture(scope="module")
def client(settings) -> Iterator[TestClient]:
    """One for all tests: they only read."""
    with TestClient(create_app(settings), base_url=settings.url) as client:
        yield client


@pytest.fixture(scope="module")
def address(client) -> Iterator[str]:
    """The catalogue behind a real server on a free port of this machine."""
    server = uvicorn.Server(uvicorn.Config(client.app, lifespan="off", host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def hub(address, monkeypatch, tmp_path):
    """Hugging Face's own client, which goes to this catalogue and nowhere else."""
    api = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return api.HfApi(endpoint=address, token=False)


def numbers(papers) -> list[str]:
    return [paper.id for paper in papers]


def test_the_client_of_daily_papers_reads_the_catalogue(hub):
    cards = sorted(catalog.cards().values(), key=lambda card: (-card.date.toordinal(), card.slug))
    every = list(hub.list_daily_papers())
    assert numbers(every) == [card.arxiv for card in cards][:50]
    first, card = every[0], cards[0]
    assert (first.title, first.upvotes or 0, first.comments) == (card.title, 0, 0)
    assert first.published_at.date() == card.date and first.summary == card.summary.strip()
    assert [author.name for author in first.authors] == card.authors
    day = card.date
    assert card.arxiv in numbers(hub.list_daily_papers(date=day.isoformat()))
    week, month = f"{day.isocalendar().year}-W{day.isocalendar().week:02}", f"{day:%Y-%m}"
    for found in (hub.list_daily_papers(week=week), hub.list_daily_papers(month=month)):
        inside = numbers(found)
        assert card.arxiv in inside and len(inside) < len(every)
    assert not list(hub.list_daily_papers(date="1999-12-31")) and not list(hub.list_daily_papers(submitter="nobody"))
    pages = (hub.list_daily_papers(p=page, limit=5, sort="publishedAt") for page in range(len(cards) // 5 + 1))
    assert numbers(chain.from_iterable(pages)) == [card.arxiv for card in cards]
    assert sorted(numbers(hub.list_daily_papers(sort="trending"))) == sorted(numbers(every))


def test_the_client_searches_and_reads_one_paper(hub):
    found = list(hub.list_papers(query="chanel attention"))
    assert found[0].id == "1910.03151" and found[0].title == catalog.card("eca_net").title
    assert len(list(hub.list_papers(query="attention", limit=2))) == 2
    paper = hub.paper_info("1910.03151")
    card = catalog.card("eca_net")
    assert (paper.title, paper.summary) == (card.title, card.summary.strip())
    assert paper.github_repo == "https://github.com/BangguWu/ECANet" and paper.published_at.date() == card.date
    assert len(paper.claims) == len(card.claims)
    from huggingface_hub.errors import HfHubHTTPError

    with pytest.raises(HfHubHTTPError, match="404"):
        hub.paper_info("9999.99999")


def test_votes_and_comments_are_told(client, monkeypatch):
    site = client.app.state.site
    monkeypatch.setattr(type(site), "counts", lambda self: Counts({"craft": 3, "rat": 1}, {"craft": 2}))
    first = client.get("/api/daily_papers?sort=trending").json()
    assert [each["slug"] for each in first[:2]] == ["craft", "rat"]
    assert (first[0]["paper"]["upvotes"], first[0]["numComments"]) == (3, 2)
    paper = client.get("/api/papers/craft").json()
    assert (paper["upvotes"], paper["numComments"]) == (3, 2)


@pytest.mark.parametrize("slug", ["eca_net", "relationnet_pp"])
def test_a_paper_as_json_says_what_its_evidence_says(client, slug):
    paper, entry = client.get(f"/api/papers/{slug}").json(), client.app.state.site.catalogue[slug]
    assert [each["verdict"] for each in paper["claims"]] == [str(s.judgement.verdict) for s in entry.claims]
    experiments = {experiment["id"]: experiment for experiment in paper["experiments"]}
    assert set(experiments) == {experiment.id for experiment in entry.card.experiments}
    for finding in entry.findings:
        shown, measurement = experiments[finding.experiment.id], finding.measurement
        assert (shown["verdict"], shown["effect"]) == (finding.verdict, measurement.effect)
        assert (shown["interval"] and tuple(shown["interval"])) == measurement.interval
    assert sum(paper["verdicts"].values()) == len(entry.claims)


def test_filters_are_those_of_the_list(client):
    def slugs(query: str) -> list[str]:
        return [paper["slug"] for paper in client.get(f"/api/papers?{query}").json()]

    assert slugs("slot=channel-gate&q=eca") == ["eca_net"] and slugs("task=super-resolution") == ["craft"]
    assert slugs("task=nonsense") == [] and sorted(slugs("sort=share")) == sorted(catalog.cards())
    held = client.get("/api/not_held").json()
    assert held and {row["experiment"]["verdict"] for row in held} == {Verdict.CONTRADICTED}


def test_weeks_and_months_end_where_they_end():
    assert machines._week("2025-W09") == (date(2025, 2, 24), date(2025, 3, 2))
    assert machines._week("2020-W53") == (date(2020, 12, 28), date(2021, 1, 3))
    assert machines._month("2024-02") == (date(2024, 2, 1), date(2024, 2, 29))
    assert machines._month("2025-12") == (date(2025, 12, 1), date(2025, 12, 31))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("daily_papers?week=2025-W99", "week: got '2025-W99', expected one such as 2025-W09"),
        ("daily_papers?month=2025-13", "such as 2025-02"),
        ("daily_papers?date=yesterday", "date: "),
        ("daily_papers?p=-1", "p: "),
        ("daily_papers?limit=1000", "limit: "),
        ("papers?verdict=perhaps", "verdict: "),
        ("papers?sort=luck", "sort: "),
        ("boards/token-mixr", "did you mean 'token-mixer'?"),
        ("papers/eca_nett", "did you mean 'eca_net'?"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(client, path, words):
    answer = client.get(f"/api/{path}")
    assert answer.status_code == (404 if "/" in path else 422)
    error = answer.json()["error"]
    assert words in error and "\n" not in error


def paths(client: TestClient) -> list[str]:
    """Addresses of the catalogue; a demo's answer is there for a while alone."""
    every = (path.replace("{name}", "token-mixer" if "boards" in path else "craft") for path in described(client))
    return [path for path in every if "{" not in path]


def described(client: TestClient) -> list[str]:
    return [path for path, methods in client.get("/openapi.json").json()["paths"].items() if "get" in methods]


def test_what_did_not_change_is_not_sent_again(client):
    for path in paths(client):
        first = client.get(path)
        assert first.status_code == 200, path
        again = client.get(path, headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"]), path


def test_people_find_every_endpoint(client):
    page = client.get("/api").text
    assert all(path in page for path in described(client))


@pytest.mark.parametrize("name", ["papers", "verdicts"])
def test_feeds_are_valid(client, name):
    """What RFC 4287 asks of a feed and of each entry."""
    answer = client.get(f"/feeds/{name}.atom")
    assert answer.headers["content-type"].startswith("application/atom+xml")
    feed = ET.fromstring(answer.content)
    assert feed.tag == f"{{{ATOM['a']}}}feed"
    entries = feed.findall("a:entry", ATOM)
    assert entries
    identifiers = []
    for part in (feed, *entries):
        for element in ("id", "title", "updated"):
            assert len(part.findall(f"a:{element}", ATOM)) == 1 and part.find(f"a:{element}", ATOM).text.strip()
        identifiers.append(part.find("a:id", ATOM).text)
        when = part.find("a:updated", ATOM).text
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", when) and datetime.fromisoformat(when)
    assert len(set(identifiers)) == len(identifiers) and all(i.startswith("urn:uuid:") for i in identifiers)
    assert all(feed.find("a:author", ATOM) is not None or e.find("a:author", ATOM) is not None for e in entries)
    relations = {link.get("rel"): link.get("href") for link in feed.findall("a:link", ATOM)}
    assert relations["self"].endswith(f"/feeds/{name}.atom")
    links = [entry.findall("a:link[@rel='alternate']", ATOM) for entry in entries]
    assert all(len(each) == 1 for each in links)
    pages = {urlsplit(link.get("href")).path for (link,) in links}
    assert pages <= {f"/papers/{slug}" for slug in catalog.cards()}
    assert {entry.find("a:content", ATOM).get("type") for entry in entries} == {"html"}


def test_the_newest_measurements_come_first_with_their_verdicts(client):
    entries = ET.fromstring(client.get("/feeds/verdicts.atom").content).findall("a:entry", ATOM)
    dates = [entry.find("a:updated", ATOM).text for entry in entries]
    catalogue = client.app.state.site.catalogue
    moment = max(e.measured for e in catalogue.values() if e.measured)
    newest = [e for e in catalogue.values() if e.measured == moment]  # several, where runs began in the same second
    assert dates == sorted(dates, reverse=True) and dates[0][:10] == moment.date().isoformat()
    last = {e.card.title: [f for f in e.findings if f.run and f.run.date == moment] for e in newest}
    shown = {entry.find("a:title", ATOM).text: entry for entry in entries[: len(newest)]}
    assert set(shown) == {f"{title}: {view.tally(findings)}" for title, findings in last.items()}
    for title, findings in last.items():
        content = shown[f"{title}: {view.tally(findings)}"].find("a:content", ATOM).text
        assert content.count("<li>") == len(findings)


def test_identifiers_stay_wherever_it_is_served(client, settings):
    moved = settings.model_copy(update={"url": "https://papers.example.org"})
    with TestClient(create_app(moved), base_url=moved.url) as other:
        for name in ("papers", "verdicts"):
            here, there = (
                ET.fromstring(each.get(f"/feeds/{name}.atom").content).findall(".//a:id", ATOM)
                for each in (client, other)
            )
            assert [i.text for i in here] == [i.text for i in there]


def test_what_a_card_says_is_text_in_feeds(client, monkeypatch):
    catalogue = client.app.state.site.catalogue
    entry = catalogue["craft"]
    evil = entry.card.model_copy(update={"title": "<script>x</script> & ]]>", "summary": "<img src=x onerror=y>"})
    monkeypatch.setitem(vars(entry), "card", evil)
    feed = ET.fromstring(client.get("/feeds/papers.atom").content)
    (shown,) = [e for e in feed.findall("a:entry", ATOM) if e.find("a:title", ATOM).text == evil.title]
    assert "&lt;img" in shown.find("a:content", ATOM).text and "<img" not in shown.find("a:content", ATOM).text


@pytest.fixture(scope="module")
def description(settings) -> object:
    """The OpenAPI description, with the pages and forms that it leaves out for programs."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    with pytest.MonkeyPatch.context() as patch:
        for route in routes:
            patch.setattr(route, "include_in_schema", True)
        whole = schemathesis.openapi.from_asgi("/openapi.json", create_app(settings))
    assert len(list(whole.get_all_operations())) >= len(routes)
    return whole


def test_no_address_and_no_form_breaks(description):
    """Whatever comes, the answer is one that was meant; of the JSON it has the form that the description says."""
    for result in description.get_all_operations():
        operation = result.ok()

        @settings_of_hypothesis(max_examples=8, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(operation.as_strategy())
        def answers(case):
            answer = case.call()
            assert answer.status_code < 500, (case.method, case.path, case.query, case.body)
            if case.path.startswith("/api/"):
                case.validate_response(answer, checks=[response_schema_conformance, status_code_conformance])

        answers()

"""Whatever fails: a page of ours with the headers of all pages, JSON for programs, and one line that says why."""

import asyncio
import errno
import logging
import re
import sqlite3

import pytest
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from readers import Reader
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.requests import ClientDisconnect

from provenn import catalog
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.core.files import Unwritable
from provenn.web import Settings, create_app, failures
from provenn.web.catalogue import Catalogue, Entry
from provenn.web.headers import HEADERS

FULL = OperationalError(
    "INSERT INTO people VALUES (?)", {"email": "ada@example.org"}, sqlite3.OperationalError("database or disk is full")
)
NO_ROOM = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def served(settings):
    with TestClient(create_app(settings), base_url=settings.url, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def broken(served, monkeypatch):
    """Makes the list of papers fail by an error."""

    def fail(error: Exception) -> None:
        def raising(*given):
            raise error

        monkeypatch.setattr("provenn.web.opinions.counts", raising)

    return fail


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("error", "status", "cause"),
    [
        (FULL, 503, "OperationalError: database or disk is full"),
        (NoConnection("QueuePool limit"), 503, "TimeoutError: QueuePool limit"),
        (Unwritable("cannot write /x: No space left on device"), 503, "Unwritable: cannot write /x"),
        (NO_ROOM, 503, "OSError: [Errno 28] No space left on device"),
        (OSError(errno.EMFILE, "Too many open files"), 503, "Too many open files"),
        (KeyError("x\nforged line"), 500, r"KeyError: 'x\nforged line' (at test_failures.py:"),
        (UserError("two\nlines"), 500, "UserError: two lines"),
        (OSError(errno.EIO, "Input/output error"), 500, "Input/output error"),
    ],
)
def test_a_page_that_fails_has_a_design_the_headers_and_one_line(served, broken, caplog, error, status, cause):
    broken(error)
    for accept in ("text/html", "application/json"):
        caplog.clear()
        answer = served.get("/?q=1", headers={"accept": accept})
        assert answer.status_code == status
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
        assert ("retry-after" in answer.headers) == (status == 503) and answer.headers["cache-control"] == "no-store"
        (line,) = lines(caplog)
        number = re.fullmatch(rf"{status} GET /, request (\w+): .*", line)[1]
        assert cause in line and "ada@" not in line and "INSERT" not in line
        if accept == "text/html":
            assert "prove<b>nn</b>" in answer.text and "style.css" in answer.text and number in answer.text
            assert "Sign in" not in answer.text and "forged" not in answer.text
        else:
            assert answer.json()["request"] == number and set(answer.json()) == {"error", "request"}


def test_a_failure_reads_no_database(served, monkeypatch, caplog):
    """Somebody who is signed in, and a page that is not there, while the database is away."""
    ada = Reader(served.app).sign_in("ada@example.org")

    def away(self):
        raise FULL

    monkeypatch.setattr("provenn.web.database.Database.reading", away)
    client = TestClient(served.app, base_url=served.base_url, raise_server_exceptions=False, cookies=ada.client.cookies)
    for path in ("/", "/nothing", "/me", "/papers/craft", "/static/none.css"):
        caplog.clear()
        answer = client.get(path)
        assert answer.status_code == 503 and "Not now" in answer.text and len(lines(caplog)) == 1, path


def test_a_template_that_is_broken_leaves_a_page(served, broken, monkeypatch, caplog):
    def render(self, name, /, **context):
        raise ValueError("no such template")

    monkeypatch.setattr("provenn.web.site.Site.render", render)
    answer = served.get("/nothing")
    assert answer.status_code == 500 and "prove<b>nn</b>" in answer.text and len(lines(caplog)) == 2
    assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS


def test_what_a_route_cannot_do_has_its_line(served, monkeypatch, caplog):
    from fastapi import HTTPException

    def route():
        try:
            raise ConnectionRefusedError("no server")
        except OSError as error:
            raise HTTPException(503, "Not <now>.", {"Retry-After": "30"}) from error

    served.app.router.routes.insert(0, served.app.router.route_class("/api/away", route))
    served.app.router.routes.insert(0, served.app.router.route_class("/away", route))
    answer = served.get("/away")
    assert answer.status_code == 503 and "Not &lt;now&gt;." in answer.text and answer.headers["retry-after"] == "30"
    assert served.get("/api/away").json()["error"] == "Not <now>."
    assert len(lines(caplog)) == 2 and all("ConnectionRefusedError: no server" in line for line in lines(caplog))


def test_an_answer_that_breaks_off_has_one_line(served, caplog):
    async def pieces():
        yield "a" * 10
        raise KeyError("lost")

    def stream():
        return StreamingResponse(pieces(), media_type="text/event-stream")

    served.app.router.routes.insert(0, served.app.router.route_class("/stream", stream))
    served.get("/stream")
    (line,) = lines(caplog)
    assert line.startswith("cut off GET /stream, request ") and "KeyError: 'lost'" in line


def test_who_left_in_the_midst_is_no_failure(served, broken, caplog):
    broken(ClientDisconnect())
    with pytest.raises(Exception):  # noqa: B017  # the test client wants an answer, and nobody is there to have one
        TestClient(served.app, base_url=served.base_url).get("/")
    assert not [line for line in lines(caplog) if "request" in line]


def test_who_leaves_in_the_midst_of_an_upload_is_no_failure(tmp_path, caplog):
    app = create_app(Settings(home=tmp_path, secret="x"))
    given = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=b"), (b"content-length", b"99")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/papers/eca_net/try", "raw_path": b"/papers/eca_net/try", "query_string": b"", "root_path": "",
        "headers": given, "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    messages = iter([{"type": "http.request", "body": b"--b\r\n", "more_body": True}, {"type": "http.disconnect"}])
    answers = []

    async def receive():
        return next(messages)

    async def send(message):
        answers.append(message)

    asyncio.run(app(scope, receive, send))
    app.state.site.database.close()
    assert not answers and not lines(caplog)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404), ("GET", "/static/nothing", 404), ("POST", "/", 405), ("PUT", "/static/a", 405),
        ("TRACE", "/", 405), ("OPTIONS", "/me", 405), ("GET", "/papers/craft?before=0", 422),
        ("POST", "/papers/craft/vote", 403), ("GET", "/papers/%00", 404), ("GET", "/static/%00", 404),
        ("GET", "/static/..%2fapp.py", 404), ("GET", "/tries/x", 404), ("GET", f"/?{'a=1&' * 3000}", 414),
        ("GET", "/papers/%ff%fe", 404),
    ],
)  # fmt: skip
def test_every_refusal_has_the_headers_of_all_pages(served, caplog, method, path, status):
    answer = served.request(method, path)
    assert answer.status_code == status and {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    assert "prove<b>nn</b>" in answer.text and not lines(caplog)
    answer = served.request(method, path, headers={"accept": "application/json"})
    assert answer.status_code == status and set(answer.json()) == {"error"}


@pytest.mark.parametrize("content", ["cut", "", "[]", "[" * 100_000, "folder"])
def test_damaged_records_of_a_paper_leave_its_page_and_one_line(settings, tmp_path, monkeypatch, caplog, content):
    card = catalog.card("eca_net")
    file = tmp_path / "paper" / "evidence.json"
    if content == "folder":
        file.mkdir(parents=True)
    else:
        file.parent.mkdir()
        file.write_text((card.folder / "evidence.json").read_text()[:5000] if content == "cut" else content)
    read = {**Catalogue(), "eca_net": Entry.of(card.model_copy(update={"folder": file.parent}))}
    monkeypatch.setattr(Catalogue, "__init__", lambda self: vars(self).update(_entries=read))
    with TestClient(create_app(settings), base_url=settings.url, raise_server_exceptions=False) as client:
        for path in ("/", "/papers/eca_net"):
            assert client.get(path).status_code == 200
        page, records = client.get("/papers/eca_net").text, client.get("/papers/eca_net/evidence.json")
    assert "its evidence.json is damaged" in page and str(tmp_path) not in page
    assert records.status_code == 200 and not records.json()["records"]
    (line,) = lines(caplog)
    assert line.startswith(f"{file} is damaged, and its records of eca_net are left out: ") and "\n" not in line


# Hosts


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200), ("localhost", 200), ("LocalHost:99", 200), ("[::1]:8000", 200), ("other.example", 200),
        ("papers.example.org", 200), ("evil.example", 400), ("papers.example.org.evil.example", 400), ("", 400),
        ("localhost@evil.example", 400), ("evil.example@localhost", 400), ("localhost/x", 400), ("localhost?", 400),
        ("localhost#", 400), ("[", 400), ("localhost:x", 400), ("192.0.2.1", 400), ("localhost, evil.example", 400),
        ("0x7f.1", 400), ("localhost:8000:1", 400), ("Papers.Example.Org.:443", 200), ("papers.example.org..", 400),
    ],
)  # fmt: skip
def test_a_request_for_another_host_is_refused(tmp_path, host, status):
    settings = Settings(
        home=tmp_path, secret="x", demos=False, url="https://papers.example.org", hosts="Other.example, "
    )
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        assert client.get("/suggestions", headers={"host": host}).status_code == status
        assert client.get("/static/style.css", headers={"host": host}).status_code == status
        if status == 400:
            answer = client.get("/api", headers={"host": host})
            assert answer.status_code == 400 and "PROVENN_HOSTS" in answer.text


@pytest.mark.parametrize("second", ["evil.example", "127.0.0.1:8000"])
def test_a_request_that_names_two_hosts_is_refused(served, second):
    answer = served.get("/suggestions", headers=[("host", "127.0.0.1:8000"), ("host", second)])
    assert answer.status_code == 400 and "names one host, and this one names 2" in answer.text


def test_a_demo_of_a_page_whose_name_was_led_here_is_refused(tmp_path):
    """It needs no cookie: all that keeps other sites out is that a browser says where the form stood."""
    settings = Settings(home=tmp_path, secret="x")
    with TestClient(create_app(settings), base_url=settings.url) as client:
        theirs = {"host": "evil.example:8000", "origin": "http://evil.example:8000"}
        answer = client.post("/papers/eca_net/try", headers=theirs, files={"file": ("a.png", b"x")})
        assert answer.status_code == 400 and "evil.example" in answer.text
        answer = client.post("/papers/eca_net/try", files={"file": ("a.png", b"x")})
        assert answer.status_code == 415, "the form is looked at where it is ours"


@pytest.mark.parametrize("hosts", ["http://x.example", "x.example/y", "x.example:80", "a b", "a,b;c"])
def test_hosts_that_are_none_are_refused_in_one_line(hosts):
    with pytest.raises(UserError, match="hosts must be names"):
        Settings.read({"PROVENN_HOSTS": hosts})


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8"),
        ("::", "http://[::1]:8"),
        ("::1", "http://[::1]:8"),
        ("my.box", "http://my.box:8"),
    ],
)
def test_the_host_that_it_listens_at_is_one_of_its_own(settings, monkeypatch, host, url):
    given = []
    monkeypatch.setattr("uvicorn.run", lambda app, **options: given.append(app))
    monkeypatch.setenv("PROVENN_HOSTS", "papers.example.org")
    assert main(["web", "serve", "--home", str(settings.home), "--host", host, "--port", "8"]) == 0
    found = given[0].state.site.settings
    assert found.url == url and set(found.hosts) == {host, "papers.example.org"}


def test_a_servers_log_has_no_second_line_for_what_has_one():
    said = failures.unsaid()
    for words, kept in (("Invalid HTTP request received.", False), ("out of system resource", True)):
        assert said(logging.LogRecord("uvicorn.error", logging.WARNING, "", 1, words, (), None)) is kept

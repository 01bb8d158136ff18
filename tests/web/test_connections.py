"""Slow and odd clients, at a server on this machine with small limits: who keeps others waiting is closed."""

import os
import pickle
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn

from provenn.cli import main
from provenn.core.errors import UserError
from provenn.web import create_app
from provenn.web.connections import BACKLOG, KEPT_FREE, ConnectionLimits, Gate

HANG = 60.0  # seconds after which a test fails in place of waiting
SHORT = {"header_seconds": 0.4, "body_seconds": 30.0, "stall_seconds": 0.4, "least_rate": 1000.0, "idle_seconds": 30}
LONG = {"header_seconds": 50.0, "body_seconds": 50.0, "stall_seconds": 50.0, "least_rate": 1.0, "idle_seconds": 50}
GET = b"GET /static/mark.svg HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /sign-in HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"


@contextmanager
def serving(app, proxies="", connections=50, client_connections=20, **limits):
    """A server with those limits; gives a function that connects to it."""
    gate = Gate(ConnectionLimits(connections, client_connections, **(SHORT | limits)), secure=False)
    settings = {"http": gate, "ws": "none", "port": 0, "log_config": None, "forwarded_allow_ips": proxies}
    config = uvicorn.Config(app, **settings, lifespan="off", timeout_keep_alive=gate.limits.idle_seconds)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + HANG
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    with ExitStack() as opened:

        def connect(said: bytes = b"") -> socket.socket:
            connection = opened.enter_context(socket.create_connection(address, timeout=HANG))
            connection.sendall(said)
            return connection

        try:
            yield connect
        finally:
            server.should_exit = server.force_exit = True
            thread.join(HANG)


@pytest.fixture
def app(settings):
    app = create_app(settings)
    yield app
    app.state.site.database.close()


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    said = b""
    try:
        while piece := connection.recv(2**16):
            said += piece
    except ConnectionResetError:
        pass
    return said


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"GET http://localhost/static/mark.svg HTTP/1.1\r\nHost: localhost", b" 200 "),
        (b"GET HTTP://LocalHost:99/static/mark%2Esvg?v=1 HTTP/1.1\r\nHost: evil.example", b" 200 "),
        (b"GET http://localhost HTTP/1.1\r\nHost: localhost", b" 200 "),
        (b"GET http://evil.example/static/mark.svg HTTP/1.1\r\nHost: localhost", b" 400 "),
        (b"GET http:///static/mark.svg HTTP/1.1\r\nHost: localhost", b" 400 "),
        (b"GET http://localhost@evil.example/ HTTP/1.1\r\nHost: localhost", b" 400 "),
        (b"GET /static/mark.svg HTTP/1.0\r\nAccept: */*", b"names one host"),
    ],
)
def test_a_request_for_a_whole_address_is_one_for_its_path_at_its_host(app, said, expected):
    with serving(app) as connect:
        assert expected in rest(connect(said + b"\r\nConnection: close\r\n\r\n"))


def is_served(connect) -> bool:
    return b" 200 OK" in rest(connect(GET + b"Connection: close\r\n\r\n"))


def is_ours(answer: bytes) -> bool:
    """Whether an answer is a page of ours with the headers that all have."""
    head, _, body = answer.lower().partition(b"\r\n\r\n")
    return b"content-security-policy: default-src 'none'" in head and b"nosniff" in head and b"prove<b>nn</b>" in body


def test_who_sends_no_whole_header_is_closed(app):
    with serving(app) as connect:
        silent, begun = connect(), connect(b"GET / HTTP/1.1\r\nHost: loc")
        second = connect(GET + b"\r\n")
        assert b" 200 OK" in second.recv(2**16)
        second.sendall(b"GET / HT")
        assert rest(silent) == b""
        for connection in (begun, second):
            said = rest(connection)
            assert b"408 Request Timeout" in said and is_ours(said[said.index(b"HTTP/1.1 408") :])
        assert is_served(connect)


@pytest.mark.parametrize("framing", [b"Content-Length: 60000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("drips", [False, True])
def test_who_sends_a_body_too_slowly_is_closed(app, framing, drips):
    """A demo's form is read as it comes; of all other forms, one of an unknown length is refused unread."""
    path = b"POST /papers/craft/vote HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    with serving(app) as connect:
        connection = connect(path + framing + b"\r\n\r\n")
        said = b""
        if drips:
            connection.settimeout(0.05)
            deadline = time.monotonic() + HANG
            while time.monotonic() < deadline:
                try:
                    connection.sendall(b"1\r\na\r\n" if b"chunked" in framing else b"a")
                    piece = connection.recv(2**16)
                except TimeoutError:
                    continue
                except OSError:
                    break
                if not piece:
                    break
                said += piece
            connection.settimeout(HANG)
        said += rest(connection)
        assert said.startswith((b"HTTP/1.1 408", b"HTTP/1.1 411")) and b"content-security-policy" in said.lower()
        assert is_served(connect)


def test_a_body_that_nobody_reads_keeps_no_connection_open(app):
    with serving(app, least_rate=0.0) as connect:
        connection = connect(GET + b"Content-Length: 1000000\r\n\r\n")
        said = rest(connection)
        assert said.startswith(b"HTTP/1.1 200") and said.count(b"HTTP/1.1") == 1


def test_a_body_has_a_time_of_its_own(app):
    """At any rate."""
    with serving(app, body_seconds=0.4, stall_seconds=50.0) as connect:
        assert rest(connect(POST + b"Content-Length: 500\r\n\r\ncsrf=")).startswith(b"HTTP/1.1 408")


def test_who_does_not_take_an_answer_is_closed():
    ended = threading.Event()

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while (await wait_or(receive)) != "http.disconnect":
                await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
        finally:
            ended.set()

    async def wait_or(receive):
        import asyncio

        try:
            return (await asyncio.wait_for(receive(), 0.001))["type"]
        except TimeoutError:
            return ""

    with serving(endless) as connect:
        connection = connect(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(HANG), "the server waits for a reader who takes nothing"
        del connection


def test_a_client_has_so_many_connections_and_no_more(app):
    """The one that has waited longest for a request makes room, so that half-open ones keep nobody out."""
    with serving(app, client_connections=5, **LONG) as connect:
        first = connect(b"GET / HT")
        assert all(is_served(connect) for _ in range(3))
        half = [connect(b"GET / HT") for _ in range(12)]
        assert is_served(connect)
        assert rest(first) == b""
        half[-1].sendall(b"TP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert rest(half[-1]).startswith(b"HTTP/1.1 200"), "the newest one was closed"


def test_all_clients_have_so_many_connections_together(app):
    """From a proxy, which one client's limit does not hold for."""
    with serving(app, proxies="127.0.0.1", connections=8, client_connections=2, **LONG) as connect:
        half = [connect(b"GET / HT") for _ in range(7)]
        assert is_served(connect)
        half[0].sendall(b"TP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert rest(half[0]).startswith(b"HTTP/1.1 200"), "a proxy has no more than one client"
        half += [connect(b"GET / HT") for _ in range(20)]
        assert is_served(connect) and rest(half[1]) == b""


def test_who_comes_where_all_are_answered_is_told_to_come_again(caplog):
    held = threading.Event()

    async def slow(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        held.set()
        await receive()
        await receive()

    with serving(slow, client_connections=1, **LONG) as connect:
        first = connect(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert held.wait(HANG)
        said = rest(connect())
        assert said.startswith(b"HTTP/1.1 503") and b"retry-after" in said.lower() and is_ours(said)
        rest(connect())
        first.close()
    assert len([line for line in caplog.messages if "connections are closed" in line]) == 1


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 400),
        (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 400),
        (POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (GET + b"X: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (GET + b"X: " + b"a" * 200_000, 431),
        (GET + b"".join(b"X%d: a\r\n" % number for number in range(200)) + b"\r\n", 431),
        (b"GET /?" + b"&".join(b"a=1" for _ in range(3000)) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    ],
)
def test_what_is_no_request_of_a_browser_is_refused_on_a_page_of_ours(app, said, status):
    with serving(app, **LONG) as connect:
        connection = connect()
        try:
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = rest(connection)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and answer.count(b"HTTP/1.1 ") == 1
        assert b"content-security-policy: default-src 'none'" in answer.lower() and b"prove<b>nn</b>" in answer


def test_a_request_behind_a_doubtful_one_is_not_read(app):
    """Two lengths: what one proxy takes for a body, another takes for a request."""
    body = b"0\r\n\r\nGET /static/mark.svg HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n" % len(body)
    with serving(app, **LONG) as connect:
        answer = rest(connect(GET + head + body))
    assert answer.count(b"HTTP/1.1 ") == 1 and answer.startswith(b"HTTP/1.1 400")


def test_requests_that_follow_each_other_are_answered_in_turn(app):
    with serving(app, **LONG) as connect:
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
        connection = connect(2 * (GET + b"\r\n") + GET.replace(b"GET", b"HEAD") + b"Connection: close\r\n\r\n")
        answer = rest(connection)
        assert answer.count(b"HTTP/1.1 200 OK") == 3 and answer.count(b"</svg>") == 2
        answer = rest(connect(GET + upgrade + b"\r\n" + GET + b"Connection: close\r\n\r\n"))
        assert answer.startswith(b"HTTP/1.1 200 OK"), "who asks for another protocol gets HTTP"


def test_there_are_never_more_connections_than_files(monkeypatch):
    limits = ConnectionLimits(1000, 100, 10.0, 300.0, 20.0, 500.0, 5)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (300, 4096))
    assert limits.fitting().connections == 300 - KEPT_FREE - BACKLOG
    monkeypatch.setattr(resource, "getrlimit", lambda what: (100_000, 100_000))
    assert limits.fitting() == limits
    monkeypatch.setattr(resource, "getrlimit", lambda what: (100, 100))
    with pytest.raises(UserError, match="ulimit -n"):
        limits.fitting()


def test_every_process_of_a_server_has_its_limits():
    gate = Gate(ConnectionLimits(1000, 100, 10.0, 300.0, 20.0, 500.0, 5), secure=True)
    assert pickle.loads(pickle.dumps(gate)).limits == gate.limits


def test_options_change_the_limits_and_help_names_them(settings, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **options: given.update(options))
    options = ["--connections", "7", "--client-connections", "3", "--header-seconds", "2", "--body-seconds", "9"]
    options += ["--least-rate", "50", "--stall-seconds", "4", "--idle-seconds", "6", "--proxies", "10.0.0.0/8"]
    assert main(["web", "serve", "--home", str(settings.home), *options]) == 0
    assert given["http"].limits == ConnectionLimits(7, 3, 2.0, 9.0, 4.0, 50.0, 6)
    assert given["timeout_keep_alive"] == 6 and given["ws"] == "none" and given["backlog"] == BACKLOG
    assert given["forwarded_allow_ips"] == "10.0.0.0/8"
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "200")
    main(["web", "serve", "--help"])
    said = capsys.readouterr().out
    for words in (*options[::2], "FORWARDED_ALLOW_IPS", "PROVENN_HOSTS", "default: 1000", "default: 100", "10.0"):
        assert words in said, words


def test_a_server_with_few_descriptors_serves_beside_half_open_connections(tmp_path):
    """As its users start it: three hundred descriptors, and more clients that say nothing than those."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    starts = "import sys, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300)); "
    starts += "from provenn.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", starts, "web", "serve", "--home", str(tmp_path), "--port", str(port)]
    environment = os.environ | {"PROVENN_DEMOS": "false"}
    with (tmp_path / "log").open("w") as log, ExitStack() as opened:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            request = GET.replace(b"localhost", b"127.0.0.1:%d" % port) + b"Connection: close\r\n\r\n"
            deadline = time.monotonic() + 4 * HANG
            while not _asks(port, request):
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
            for _ in range(350):
                opened.enter_context(socket.create_connection(("127.0.0.1", port), timeout=HANG)).sendall(b"GET / HT")
            for _ in range(5):
                assert _asks(port, request), (tmp_path / "log").read_text()
        finally:
            server.kill()
            server.wait()
    assert "108 connections at once" in (tmp_path / "log").read_text()


def _asks(port: int, request: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=HANG) as connection:
            connection.sendall(request)
            return b" 200 OK" in rest(connection)
    except OSError:
        return False

"""A catalogue of its own for each test, in a temporary folder; on PostgreSQL too, where that is installed."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from provenn.web import Settings, create_app
from provenn.web.catalogue import Catalogue
from provenn.web.outbox import Sender


@pytest.fixture(scope="session")
def papers() -> Catalogue:
    """This package's own, read once."""
    return Catalogue()


@pytest.fixture(scope="module", autouse=True)
def one_reading(papers: Catalogue) -> Iterator[None]:
    """The papers are read once for all tests of this folder; other tests read them anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Catalogue, "__init__", lambda self: vars(self).update(vars(papers)))
        yield


START = Sender.start


@pytest.fixture(scope="module", autouse=True)
def nothing_is_sent_unasked() -> Iterator[None]:
    """The outbox is emptied when a test looks for mails; only tests that ask for `sending` have its thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sender, "start", lambda self: None)
        yield


@pytest.fixture
def sending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of this test send what is in the outbox."""
    monkeypatch.setattr(Sender, "start", START)


@pytest.fixture
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """On SQLite; on the real PostgreSQL where a test asks for it by `both`."""
    url = request.getfixturevalue("postgresql")() if getattr(request, "param", "") == "postgresql" else ""
    return Settings(home=tmp_path / "home", database_url=url, secret="of the tests", demos=False)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url=settings.url) as client:
        yield client


@pytest.fixture(scope="session")
def postgresql():
    """Empties the database of a PostgreSQL server of the tests' own, which is gone after them; gives its address."""
    import psycopg

    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: file.parts[4].zfill(3))
    if not installed:
        pytest.skip("no PostgreSQL is installed here (Debian's `postgresql`)")
    binaries = installed[-1].parent
    root = Path(tempfile.mkdtemp(prefix="provenn-pg-"))
    # The server refuses to run as root.
    other = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    if other:
        shutil.chown(root, "postgres", "postgres")
    make = [
        binaries / "initdb",
        "--auth=trust",
        "--username=postgres",
        "--no-sync",
        "--encoding=UTF8",
        "-D",
        root / "d",
    ]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd=root, **other)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    set_to = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": root, "fsync": "off"}
    options = [word for name, value in set_to.items() for word in ("-c", f"{name}={value}")]
    with (root / "log").open("w") as log:
        server = subprocess.Popen([binaries / "postgres", "-D", root / "d", *options], stderr=log, cwd=root, **other)
    address = f"postgresql://postgres@127.0.0.1:{port}/postgres"

    def database() -> str:
        with psycopg.connect(address) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return address

    try:
        for _ in range(600):
            try:
                psycopg.connect(address).close()
                break
            except psycopg.OperationalError:
                assert server.poll() is None, (root / "log").read_text()
                time.sleep(0.05)
        yield database
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(root, ignore_errors=True)

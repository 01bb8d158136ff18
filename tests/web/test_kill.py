"""`kill -9` under load: what was acknowledged is there, and the database is whole."""

import http.client
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from urllib.parse import urlencode

import pytest

from provenn.web import Settings, accounts
from provenn.web.database import Database
from provenn.web.models import Person
from provenn.web.signing import signed
from provenn.web.visitors import Visitor

KILLS, PEOPLE, THREADS = 20, 60, 4
# The command line as users start it, in a process of its own each time; what it imports is loaded once.
SERVE = """
import os, signal, sys
import uvicorn, provenn.web
from provenn import catalog
from provenn.cli import main
catalog.cards()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    child = os.fork()
    if not child:
        os._exit(main(["web", "serve", *sys.argv[1:]]))
    print(child, flush=True)
"""


class Load:
    """Readers who vote, comment and suggest until told to stop, and remember what the server said that it took."""

    def __init__(self, port: int, readers: list[tuple[str, str]], papers: list[str]):
        self.port, self.readers, self.papers = port, readers, papers
        self.taken: set[tuple[int, str, str]] = set()
        self.troubles: list[str] = []
        self.over = threading.Event()

    def write(self, seed: int) -> None:
        """One thread of it."""
        draw, number = random.Random(seed), 0
        while not self.over.is_set():
            number += 1
            index = draw.randrange(len(self.readers))
            cookie, csrf = self.readers[index]
            kind, paper = draw.choice(("vote", "comment", "suggestion")), draw.choice(self.papers)
            path, fields, what = {
                "vote": (f"/papers/{paper}/vote", {}, paper),
                "comment": (f"/papers/{paper}/comments", {"text": f"{seed} {number}"}, f"{seed} {number}"),
                "suggestion": ("/suggestions", {"arxiv": f"99{seed:02}.{number:05}"}, f"99{seed:02}.{number:05}"),
            }[kind]
            body = urlencode({"csrf": csrf, **fields})
            headers = {"Cookie": f"provenn={cookie}", "Content-Type": "application/x-www-form-urlencoded"}
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
            try:
                connection.request("POST", path, body, headers)
                status = connection.getresponse().status
            except (OSError, http.client.HTTPException):
                time.sleep(0.01)  # killed: whether it was taken, nobody said
                continue
            finally:
                connection.close()
            if status == 303:
                self.taken.add((index + 1, kind, what))
            elif status != 429:
                self.troubles.append(f"{path}: {status}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed as POSIX has it")
def test_twenty_kills_lose_nothing_that_was_acknowledged(tmp_path, monkeypatch):
    monkeypatch.setenv("PROVENN_DEMOS", "false")
    settings = Settings(home=tmp_path, demos=False)
    database = Database(settings.database)
    database.migrate()
    with database.session() as session:
        session.add_all(Person(id=number, email=f"{number}@example.org") for number in range(1, PEOPLE + 1))
        session.flush()
        secrets = [accounts.begin_session(session, number) for number in range(1, PEOPLE + 1)]
    database.close()
    readers = [(signed(settings, "cookie", secret), Visitor(settings, secret).csrf) for secret in secrets]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "--home", str(tmp_path), "--port", str(port)]
    parent = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    load = Load(port, readers, ["rat", "craft", "eca_net", "aaren", "titans"])
    threads = [threading.Thread(target=load.write, args=(seed,), daemon=True) for seed in range(1, THREADS + 1)]
    draw, server = random.Random(0), 0
    for thread in threads:
        thread.start()
    try:
        for _ in range(KILLS):
            parent.stdin.write("\n")
            parent.stdin.flush()
            server = int(parent.stdout.readline())
            wanted = len(load.taken) + draw.randint(3, 15)
            deadline = time.monotonic() + 60
            while len(load.taken) < wanted:
                assert time.monotonic() < deadline, f"{len(load.taken)} writes, then none: {load.troubles[:3]}"
                time.sleep(0.001)
            time.sleep(draw.random() * 0.02)  # in the midst of anything
            os.kill(server, signal.SIGKILL)
    finally:
        load.over.set()
        parent.kill()
        parent.communicate()
        if server:
            with pytest.raises(ProcessLookupError):
                for _ in range(1000):
                    os.kill(server, signal.SIGKILL)
                    time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert not load.troubles
    assert {kind for _, kind, _ in load.taken} == {"vote", "comment", "suggestion"} and len(load.taken) >= 3 * KILLS
    with sqlite3.connect(tmp_path / "catalogue.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        columns = {"vote": ("votes", "paper"), "comment": ("comments", "text"), "suggestion": ("suggestions", "arxiv")}
        there = {
            (person, kind, what)
            for kind, (table, column) in columns.items()
            for person, what in connection.execute(f"SELECT person_id, {column} FROM {table}")
        }
    assert load.taken <= there, f"{len(load.taken - there)} of {len(load.taken)} acknowledged writes are lost"
    # What nobody said that it was taken may be there: at most what was under way at each kill.
    assert len(there) <= len(load.taken) + KILLS * THREADS

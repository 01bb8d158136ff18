"""A bounded load on the catalogue on this machine's loopback address; it starts its own server and ends by itself.

    python tests/load/pages.py [--workers 2] [--connections 100] [--seconds 8]

First pages are asked for one at a time, which tells what the server takes for one; then over many connections at once,
which tells how many a second it gives, and whether any fails. It is no test of the suite: a busy machine is no fault.
"""

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from provenn import catalog

LEAD = 60.0  # seconds that the server has to start


async def get(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> tuple[int, int]:
    """One request on an open connection: status and length of what came."""
    words = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept-encoding: gzip\r\n\r\n"
    writer.write(words.encode())
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    body = await reader.readexactly(int(headers[b"content-length"]))
    return int(head.split(b" ", 2)[1]), len(head) + len(body)


async def client(port: int, paths: list[str], start: int, until: float, most: float, seen: list) -> None:
    """Requests one after another until the time is over or so many are done."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number = start
    while time.perf_counter() < until and number - start < most:
        began = time.perf_counter()
        try:
            status, size = await get(reader, writer, paths[number % len(paths)])
        except (OSError, asyncio.IncompleteReadError, ValueError, KeyError):
            status, size = 0, 0
        seen.append((time.perf_counter() - began, status, size))
        if not status:
            break
        number += 1
    writer.close()


async def load(port: int, paths: list[str], connections: int, seconds: float, most: float) -> tuple[list, float]:
    """All that was seen, and how long it took."""
    seen: list = []
    began = time.perf_counter()
    until = began + seconds
    await asyncio.gather(*(client(port, paths, 7 * n, until, most, seen) for n in range(connections)))
    return seen, time.perf_counter() - began


def cpu(server: int) -> float:
    """Seconds of processor time that a process and its children took so far: what a busy machine does not change."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    parents = [tuple(map(int, line.split())) for line in listed.splitlines()]
    total = 0.0
    for process in (server, *(pid for pid, parent in parents if parent == server)):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def told(what: str, seen: list, seconds: float, took: float) -> None:
    times = [1e3 * each for each, _, _ in seen]
    errors = sum(status != 200 for _, status, _ in seen)
    last = quantiles(times, n=100)[98]
    size = max(size for _, _, size in seen)
    each = 1e3 * took / len(seen)
    print(
        f"{what}: {len(seen)} requests in {seconds:.1f} s, {len(seen) / seconds:.0f} a second, "
        f"median {median(times):.1f} ms, 99th percentile {last:.1f} ms, "
        f"{each:.1f} ms of processor time each, {errors} errors, largest {size / 1e3:.1f} KB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=8.0)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        words = ["web", "serve", "--port", str(port), "--home", home, "--workers", str(given.workers)]
        command = [sys.executable, "-c", "from provenn.cli import main; main()", *words]
        server = subprocess.Popen(command, env={**os.environ, "PROVENN_DEMOS": "false"}, stderr=subprocess.DEVNULL)
        try:
            wait_for(port, server)
            kinds = {"the list": ["/"], "papers": [f"/papers/{slug}" for slug in catalog.cards()]}
            for what, paths in kinds.items():
                asyncio.run(load(port, paths, 4 * given.workers, 60.0, len(paths)))  # each process renders once
                for connections, seconds, most in (
                    (1, 20.0, 200),
                    (given.connections, min(given.seconds, 60.0), 10**6),
                ):
                    before = cpu(server.pid)
                    seen, wall = asyncio.run(load(port, paths, connections, seconds, most))
                    told(f"{what}, {connections} at a time", seen, wall, cpu(server.pid) - before)
        finally:
            server.terminate()
            server.wait()


def wait_for(port: int, server: subprocess.Popen) -> None:
    until = time.monotonic() + LEAD
    while time.monotonic() < until:
        if server.poll() is not None:
            raise SystemExit("the server ended before it answered")
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"no server after {LEAD:.0f} s")


if __name__ == "__main__":
    main()

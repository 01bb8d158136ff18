"""Connections of readers: how many there are, and for how long one may keep the others waiting.

uvicorn reads HTTP and has one limit of its own, on the time between two requests of a connection. All others are here.
A connection that breaks one is answered with a page where it still can be, and closed.
"""

import asyncio
import http
import logging
import resource
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import h11
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from provenn.core.errors import UserError
from provenn.web.failures import TITLES, bare
from provenn.web.headers import headers
from provenn.web.visitors import network_of

LOG = logging.getLogger("provenn.web")
BACKLOG = 64  # connections that the system takes at once, before one of them can be refused
KEPT_FREE = 128  # descriptors that are left for the database, files, demos and the connections that are refused
LOOKS = 4  # at the connections within the shortest of the limits
QUIET = 60.0  # seconds between two lines about connections that are refused


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may take.

    Args:
        connections, client_connections: open at once, of all clients and of one.
        header_seconds: in which the header of a request is there.
        body_seconds: in which its body is there.
        stall_seconds: over which it is counted how fast a client sends a body or takes an answer.
        least_rate: bytes a second that it moves at least.
        idle_seconds: between two requests.
    """

    connections: int
    client_connections: int
    header_seconds: float
    body_seconds: float
    stall_seconds: float
    least_rate: float
    idle_seconds: int

    def fitting(self) -> "ConnectionLimits":
        """With no more connections than this process may open files.

        Raises:
            UserError: it may open too few files for any reader.
        """
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        room = files - KEPT_FREE - BACKLOG if files != resource.RLIM_INFINITY else self.connections
        if room < 1:
            least = KEPT_FREE + BACKLOG + 1
            raise UserError(
                f"a process may open {files} files here, and the catalogue needs {least}: raise `ulimit -n`"
            )
        return ConnectionLimits(**{**vars(self), "connections": min(self.connections, room)})


class Counted:
    """A transport that counts what was written to it."""

    def __init__(self, transport: Any):
        self.transport, self.written = transport, 0

    def write(self, data: bytes) -> None:
        """Hand over bytes."""
        self.written += len(data)
        self.transport.write(data)

    @property
    def waiting(self) -> int:
        """Bytes that the client has not taken."""
        return int(self.transport.get_write_buffer_size())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


class Connection(H11Protocol):
    """A connection that its gate may end.

    Args:
        gate: what all connections of a process have in common.
        given: as uvicorn gives it.
    """

    def __init__(self, gate: "Gate", **given: Any):
        super().__init__(**given)
        self.gate = gate
        self.client_name = ""
        self.since = self.loop.time()  # the beginning of what the client is at
        self.state: Any = h11.IDLE  # what that is
        self.silent = True  # nothing of the next request has come
        self.received = 0  # bytes of it
        self.window, self.taken = self.since, 0  # the beginning of a span in which an answer waits, and what was taken

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Count it, or refuse it."""
        self.counted = Counted(transport)
        super().connection_made(self.counted)  # type: ignore[arg-type]  # by its methods it is one
        if self.client is not None:
            self.client_name = network_of(self.client[0])
        self.gate.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is no longer counted."""
        self.gate.connections.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Part of a request, whose time runs from its first byte."""
        if self.transport.is_closing():
            return
        if self.silent:
            self.silent, self.since = False, self.loop.time()
        self.received += len(data)
        super().data_received(data)
        self.look()

    def on_response_complete(self) -> None:
        """The time of the next request begins, or of what is left of this one."""
        super().on_response_complete()
        self.state = None
        self.look()

    def look(self) -> None:
        """Note what the client is at: the header of a request, its body, or the wait for an answer."""
        state = self.conn.their_state
        if state is not self.state:
            self.state, self.since, self.received = state, self.loop.time(), 0
            self.silent = state is h11.IDLE and not self.conn.trailing_data[0]

    @property
    def answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _should_upgrade(self) -> bool:
        """Nothing here speaks anything but HTTP; a client that asks is answered as if it had not."""
        return False

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, with the status that the parser holds for right."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        self.refuse(status, "This is no request that a browser sends.")

    def refuse(self, status: int, words: str) -> None:
        """Close it, with a page where no answer has begun."""
        if self.transport.is_closing():
            return
        begun = self.answering and self.cycle.response_started
        if not begun:
            if status >= 500:
                LOG.error("%d before a request was read, from %s: %s", status, self.client_name, words)
            self.transport.write(page(status, words, self.gate.secure))
        self.cut()

    def cut(self) -> None:
        """Close it; who waits for the rest of a body learns that none comes."""
        if self.answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def check(self, now: float) -> None:
        """End it where it takes too long."""
        limits, elapsed = self.gate.limits, now - self.since
        self._check_answer(now)
        if self.state is h11.IDLE and not self.answering:
            if self.silent and elapsed > (limits.header_seconds if self.cycle is None else limits.idle_seconds):
                self.cut()
            elif not self.silent and elapsed > limits.header_seconds:
                self.refuse(408, f"The header of a request comes within {limits.header_seconds:g} seconds here.")
        elif self.state is h11.SEND_BODY:
            if not self.answering:  # the answer is there, and nobody reads the rest
                if elapsed > limits.header_seconds:
                    self.cut()
            elif elapsed > limits.body_seconds:
                self.refuse(408, f"A request comes within {limits.body_seconds:g} seconds here.")
            elif elapsed > limits.stall_seconds and self.received < limits.least_rate * elapsed:
                self.refuse(408, f"A request comes by at least {limits.least_rate:g} bytes a second here.")

    def _check_answer(self, now: float) -> None:
        limits, taken = self.gate.limits, self.counted.written - self.counted.waiting
        if not self.counted.waiting or taken - self.taken >= limits.least_rate * limits.stall_seconds:
            self.window, self.taken = now, taken
        elif now - self.window > limits.stall_seconds:
            self.cut()
            self.transport.abort()  # a close would wait until all is taken


class Gate:
    """Makes the protocol of every connection, and ends those that keep others waiting.

    Args:
        limits: what a connection may take.
        secure: whether readers come by TLS.
    """

    def __init__(self, limits: ConnectionLimits, secure: bool):
        self.limits, self.secure = limits, secure
        self.connections: set[Connection] = set()
        self.refused, self.said = 0, -QUIET
        self.looking = False

    def __call__(self, **given: Any) -> Connection:
        """The protocol of a new connection, as uvicorn makes one."""
        return Connection(self, **given)

    def enter(self, connection: Connection) -> None:
        """Take a connection in. Where there are too many, the one that has waited longest for a request makes room."""
        self.connections.add(connection)
        if not self.looking:
            self.looking = True
            self._look_later(connection.loop)
        application, limits = connection.app, self.limits
        trusted = application.trusted_hosts if isinstance(application, ProxyHeadersMiddleware) else ()
        theirs = {other for other in self.connections if other.client_name == connection.client_name}
        if len(theirs) > limits.client_connections and (connection.client or ("",))[0] not in trusted:
            self._make_room(theirs, connection, f"more than {limits.client_connections} of {connection.client_name}")
        elif len(self.connections) > limits.connections:
            self._make_room(self.connections, connection, f"more than {limits.connections} in all")

    def _make_room(self, among: set[Connection], new: Connection, why: str) -> None:
        waiting = [other for other in among if other is not new and other.state is h11.IDLE and not other.answering]
        victim = min(waiting, key=lambda other: other.since, default=new)
        self.connections.discard(victim)
        self.refused += 1
        now = new.loop.time()
        if now - self.said >= QUIET:
            LOG.warning("connections are closed, since there are %s; %d since the last such line", why, self.refused)
            self.refused, self.said = 0, now
        if victim is new:
            victim.transport.write(page(503, "The server is busy: try again in a moment.", self.secure))
        victim.cut()

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        shortest = min(self.limits.header_seconds, self.limits.body_seconds, self.limits.stall_seconds)
        loop.call_later(shortest / LOOKS, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        for connection in list(self.connections):
            connection.check(loop.time())
        self.looking = bool(self.connections)
        if self.looking:
            self._look_later(loop)


@cache
def page(status: int, words: str, secure: bool) -> bytes:
    """A whole answer that closes its connection, as bytes."""
    body = bare(TITLES.get(status, "Not possible"), words).encode()
    phrase = http.HTTPStatus(status).phrase
    given = {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(body)), "Connection": "close"}
    given |= {"Cache-Control": "no-store"} | ({"Retry-After": "5"} if status == 503 else {})
    lines = [f"HTTP/1.1 {status} {phrase}", *(f"{name}: {value}" for name, value in (given | headers(secure)).items())]
    return "\r\n".join([*lines, "", ""]).encode() + body

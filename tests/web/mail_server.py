"""A real SMTP server on the loopback address, which keeps what it accepted and can be told to misbehave."""

import asyncio
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword

USER, PASSWORD = "post@example.org", "p ä/ss:word"


class Server:
    """What a server accepted, and how it answers.

    Args:
        at_recipient: called with each address; what it returns is the answer, None for yes.
        at_data: called with each mail before it is kept; an answer that is returned refuses it.
        kept: called with each mail that was kept, before the server says so.
        slow: seconds before the answer to a mail.
    """

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.recipients: list[str] = []
        self.sessions: set[int] = set()
        self.encrypted: list[bool] = []
        self.users: list[str | None] = []
        self.at_recipient: Callable[[str], str | None] = lambda address: None
        self.at_data: Callable[[EmailMessage], str | None] = lambda message: None
        self.kept: Callable[[EmailMessage], None] = lambda message: None
        self.slow = 0.0
        self.peers: list[Any] = []
        self.port = 0

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        answer = self.at_recipient(address)
        if answer is None:
            envelope.rcpt_tos.append(address)
        return answer or "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        message = message_from_bytes(envelope.content, policy=policy.SMTP)
        assert isinstance(message, EmailMessage)
        answer = self.at_data(message)
        if answer is None:
            self.mails.append(message)
            self.recipients += envelope.rcpt_tos
            self.sessions.add(id(session))
            self.peers.append(session)  # kept, so that no two have the same id
            self.encrypted.append(session.ssl is not None)
            self.users.append(session.auth_data)
            self.kept(message)
        await asyncio.sleep(self.slow)
        return answer or "250 OK"


@contextmanager
def mail_server(*, certificate: Path | None = None, password: bool = False, **options: Any) -> Iterator[Server]:
    """A running server; with STARTTLS where it has a certificate, and for who has the password alone where it asks."""

    def check(server: Any, session: Any, envelope: Any, mechanism: str, given: Any) -> AuthResult:
        known = isinstance(given, LoginPassword) and (given.login, given.password) == (USER.encode(), PASSWORD.encode())
        return AuthResult(success=known, handled=False, auth_data=USER if known else None)

    handler = Server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        handler.port = probe.getsockname()[1]
    if certificate is not None:
        options["tls_context"] = served_with(certificate)
    if password:
        options |= {"authenticator": check, "auth_required": True, "auth_require_tls": certificate is not None}
    running = Controller(handler, hostname="127.0.0.1", port=handler.port, **options)
    running.start()
    try:
        yield handler
    finally:
        running.stop()


def served_with(certificate: Path) -> ssl.SSLContext:
    """A server's side of TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


def self_signed(folder: Path) -> Path:
    """A certificate of 127.0.0.1 that nobody vouches for, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: it makes the certificate of this test")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key)]
    subprocess.run([*made, *names, "-out", str(certificate)], check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return both

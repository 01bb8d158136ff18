"""Handing over mails, to the operator's server or, without one, as files in a folder.

Whether a server has a mail is decided by its answer to the end of the data, the dot on a line of its own. Before that
dot it has nothing, whatever becomes of the connection; after its answer it has the mail. Between the two nobody can
know: RFC 5321 leaves that open. `Transport` therefore sends all of a mail but the dot, asks `decide` once more, and
then sends the dot. The errors say what is known: `Refused`, `Later` and `Down` mean that the server does not have the
mail, `Unknown` that it may.

Each step has a limit on its whole time, since a server that sends a byte a second would keep within any limit on a
single answer. Another thread may end all of it by `Transport.leave`.
"""

import re
import smtplib
import socket
import ssl
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email import policy
from email.parser import BytesParser
from ipaddress import ip_address
from threading import Event, Timer
from urllib.parse import unquote, urlsplit

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.web.letters import Letter, host_name
from provenn.web.settings import Settings, make_home

SECONDS = 20.0  # that a mail server has for one answer
MAIL_SECONDS = 60.0  # for all of a mail before its end, with the connection
END_SECONDS = 120.0  # to answer the end of the data, where an early hang-up would leave us in the dark
QUIT_SECONDS = 3.0  # to say goodbye
SYNTAX, CLOSING = 500, 421  # replies from the one on are final; the other ends the connection


class MailError(OSError):
    """A mail did not go, or may not have gone."""


class Refused(MailError):
    """The server does not take this mail, and will not."""


class Later(MailError):
    """The server does not take this mail now."""


class Lost(Later):
    """The connection was lost before the server had the mail."""


class Down(MailError):
    """The server takes no mail at all: it cannot be reached, trusted or logged in to, or refuses the sender."""


class Unknown(MailError):
    """The server was given all of a mail and did not answer: it may have it."""


def forget(settings: Settings, email: str) -> int:
    """Delete the mails to an address that became files; returns how many. What a server took is out of reach."""
    to_them = []
    for file in (settings.home / "mails").glob("*.eml"):
        with suppress(FileNotFoundError), file.open("rb") as lines:  # another may delete it at this moment
            to = BytesParser(policy=policy.default).parse(lines, headersonly=True)["To"]
            people = to.addresses if to is not None else ()  # not every file there need be ours
            if any(one.addr_spec.encode(errors="surrogateescape") == email.encode() for one in people):
                to_them.append(file)
    for file in to_them:
        file.unlink(missing_ok=True)
    return len(to_them)


def route(settings: Settings) -> str:
    """Where mails go, in words; no password."""
    if not settings.smtp:
        return f"mails become files in {settings.home / 'mails'}; {settings.variable('smtp')} names a server"
    server = urlsplit(settings.smtp)
    return f"mails go to {server.scheme}://{server.hostname}:{port_of(settings)} from {settings.mail_from}"


def port_of(settings: Settings) -> int:
    """The mail server's port; by default its scheme's."""
    server = urlsplit(settings.smtp)
    return server.port or (465 if server.scheme == "smtps" else 25)


class Transport:
    """Hands over mails, all by one connection while it lasts; without a server, writes them to `home/mails`.

    A file's name begins with the date of its mail and ends with its identifier, so that a folder lists them in order,
    and a mail that is written twice is one file.

    Args:
        settings: where the server is, and what it must prove (`smtp`, `smtp_tls`).
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self._server: smtplib.SMTP | None = None
        self._line: socket.socket | None = None  # the connection once more, which another thread may end
        self._late = False
        self._left = Event()

    def __enter__(self) -> "Transport":
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            with suppress(OSError), self._within(QUIT_SECONDS):
                self._server.quit()
        self._drop()

    @property
    def repeatable(self) -> bool:
        """Whether the same mail may be handed over again without a second one coming of it."""
        return not self.settings.smtp

    def leave(self) -> None:
        """End what goes on, from another thread: the server is left in the middle, and called no more."""
        self._left.set()
        self._hang_up()

    def send(self, letter: Letter, decide: Callable[[], None] = lambda: None) -> None:
        """Hand over a mail.

        Args:
            letter: the mail.
            decide: called when all but the end is handed over. Where it raises, the server never has the mail.

        Raises:
            MailError: see its kinds.
            Unsound: the mail is not what it was meant to be; nothing of it was handed over.
        """
        data = letter.as_bytes()
        if not self.settings.smtp:
            decide()
            self._file(letter, data)
            return
        fresh = self._server is None
        try:
            self._begin(letter, data)
        except Lost:
            if fresh or self._left.is_set():
                raise
            self._begin(letter, data)  # servers end a connection after so many mails, or after a while
        try:
            decide()
        except BaseException:
            self._drop()
            raise
        self._end()

    def _file(self, letter: Letter, data: bytes) -> None:
        folder = self.settings.home / "mails"
        name = re.sub(r"[^\w.-]", "", letter.identifier.replace("@", ".at."))
        try:
            make_home(folder)  # links that sign people in lie here
            with atomic_write(folder / f"{letter.made:%Y-%m-%dT%H%M%S}_{name}.eml", mode=0o600) as path:
                path.write_bytes(data)
        except UserError as error:  # a full disk among others
            raise Down(str(error)) from None

    def _begin(self, letter: Letter, data: bytes) -> None:
        """All of a mail but its end."""
        with self._within(MAIL_SECONDS):
            server = self._connected()
            if letter.beyond_ascii and not server.has_extn("smtputf8"):
                raise Refused("the address has letters beyond ASCII, and this mail server takes none (SMTPUTF8)")
            try:
                server.rset()
                code, said = server.mail(letter.sender.addr_spec, ["SMTPUTF8"] if letter.beyond_ascii else [])
                if code >= 300:
                    raise self._refusal(code, said, Down if code >= SYNTAX else Later)
                code, said = server.rcpt(letter.to)
                if code >= 300:
                    raise self._refusal(code, said)
                code, said = server.docmd("DATA")
                if code != 354:
                    raise self._refusal(code, said)
                server.send(re.sub(rb"(?m)^\.", b"..", data.removesuffix(b"\r\n") + b"\r\n"))
            except MailError:
                raise
            except OSError as error:  # a timeout and a lost connection are among them
                self._drop()
                raise Lost(f"the mail server left in the middle of a mail: {_words(error)}") from None

    def _end(self) -> None:
        """The end of a mail, and the server's answer to it."""
        server = self._connected()
        try:
            assert server.sock is not None
            server.sock.settimeout(END_SECONDS)
            with self._within(END_SECONDS):
                server.send(b".\r\n")
                code, said = server.getreply()
            if not 200 <= code < 600:
                raise OSError(f"it answered {code}, which is no answer")
            server.sock.settimeout(SECONDS)
        except OSError as error:
            self._drop()
            raise Unknown(f"the mail server did not say whether it has the mail: {_words(error)}") from None
        if code >= 300:
            raise self._refusal(code, said)

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """Hang up where the block takes longer, however often the server says something."""
        self._late = False
        timer = Timer(seconds, self._hang_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _hang_up(self) -> None:
        """End the connection beneath whoever waits for it, in any thread and below any TLS."""
        self._late = True
        if (line := self._line) is not None:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def _refusal(self, code: int, said: bytes, kind: type[MailError] | None = None) -> MailError:
        if code == CLOSING:
            self._drop()
            kind = Lost
        words = " ".join(said.decode("utf-8", "replace").split())[:300]
        return (kind or (Refused if code >= SYNTAX else Later))(f"the mail server said {code} {words}")

    def _connected(self) -> smtplib.SMTP:
        if self._server is None:
            try:
                self._server = self._connect()
            except (OSError, ValueError) as error:
                self._drop()
                raise Down(f"{route(self.settings)}, which fails: {_words(error)}") from None
        return self._server

    def _connect(self) -> smtplib.SMTP:
        where, tls = urlsplit(self.settings.smtp), self.settings.smtp_tls
        host = where.hostname or ""
        context = ssl.create_default_context()
        if tls == "unverified":
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

        def call(host: str, port: int, timeout: float) -> socket.socket:
            line = socket.create_connection((host, port), timeout)
            self._line = line.dup()
            if self._late or self._left.is_set():  # time was over before there was anything to end
                line.close()
                raise TimeoutError("it took too long")
            return context.wrap_socket(line, server_hostname=host) if where.scheme == "smtps" else line

        server = _Client(call, host, port_of(self.settings), host_name(self.settings))
        try:
            server.ehlo_or_helo_if_needed()
            encrypted = where.scheme == "smtps"
            if not encrypted and server.has_extn("starttls"):
                server.starttls(context=context)
                server.ehlo()
                encrypted = True
            if not encrypted and tls != "auto":
                raise Down(f"it offers no TLS, which {self.settings.variable('smtp_tls')}={tls} asks for")
            if where.username:
                if not encrypted and not _is_here(host):
                    raise Down("it offers no TLS, and a password goes by TLS alone")
                _log_in(server, unquote(where.username), unquote(where.password or ""))
        except BaseException:
            server.close()
            raise
        return server

    def _drop(self) -> None:
        """Leave the server without a word: what it has not the end of, it forgets."""
        server, line = self._server, self._line
        self._server = self._line = None
        if server is not None:
            server.close()
        if line is not None:
            line.close()


class _Client(smtplib.SMTP):
    """A client on a connection that `call` makes; smtplib's own SMTP_SSL uses the same hook."""

    def __init__(self, call: Callable[[str, int, float], socket.socket], host: str, port: int, greeting: str):
        self._call = call
        super().__init__(host, port, greeting, timeout=SECONDS)  # by default it asks a name server for a greeting

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        return self._call(host, port, timeout)


def _log_in(server: smtplib.SMTP, user: str, password: str) -> None:
    """By what both sides know; beyond ASCII, which smtplib leaves out, by PLAIN (RFC 4616)."""
    if (user + password).isascii():
        server.login(user, password)
        return
    code, said = server.docmd("AUTH", "PLAIN " + b64encode(f"\0{user}\0{password}".encode()).decode("ascii"))
    if code != 235:
        raise smtplib.SMTPAuthenticationError(code, said)


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _words(error: Exception) -> str:
    """What went wrong, on one line."""
    if isinstance(error, smtplib.SMTPResponseException):
        said = error.smtp_error
        words = f"{error.smtp_code} {said.decode('utf-8', 'replace') if isinstance(said, bytes) else said}"
    else:
        words = str(error) or type(error).__name__
    return " ".join(words.split())[:300]

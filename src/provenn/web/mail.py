"""Mails, by the operator's server or, without one, as files in a folder.

Whether a server has a mail is decided by its answer to the end of the data, the dot on a line of its own. Before that
dot it has nothing, whatever becomes of the connection; after its answer it has the mail. Between the two nobody can
know: RFC 5321 leaves that open. `Outbox` therefore sends all of a mail but the dot, asks `decide` once more, and then
sends the dot. The errors tell what is known: `Refused`, `Later` and `Down` mean that the server does not have the mail,
`Unknown` that it may.
"""

import re
import smtplib
import ssl
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from email import policy
from email.headerregistry import Address
from email.message import EmailMessage
from email.parser import BytesParser
from email.utils import formatdate, make_msgid, parsedate_to_datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from provenn.files import whole
from provenn.web.addresses import address, mailbox
from provenn.web.settings import Settings
from provenn.web.site import Site

SECONDS = 20.0  # that a mail server has to answer
END_SECONDS = 120.0  # and to answer the end of the data, where an early hang-up would leave us in the dark
# Passes through every server and can be read in a file. A link in a header is not folded to the next line, where some
# programs do not look for it.
POLICY = policy.SMTP.clone(cte_type="7bit", max_line_length=200)
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


def compose(site: Site, to: str, template: str, **context: Any) -> EmailMessage:
    """A mail from `templates/mail/<template>.txt`, whose first line is the subject, and `.html` beside it.

    Raises:
        ValueError: `to` is no address.
    """
    subject, _, text = site.render(f"mail/{template}.txt", **context).partition("\n")
    message = EmailMessage(policy=POLICY)
    message["From"] = mailbox(site.settings.mail_from)
    name, _, domain = address(to).rpartition("@")
    message["To"] = Address(username=name, domain=domain)  # as one text, names beyond ASCII would be refused
    message["Subject"] = " ".join(subject.split())
    message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain=host_of(site.settings))
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(text.strip() + "\n")
    message.add_alternative(site.render(f"mail/{template}.html", **context), subtype="html")
    return message


def send(site: Site, message: EmailMessage) -> None:
    """Hand over one mail.

    Raises:
        MailError: an OSError; the server cannot be reached, or does not take it.
    """
    with Outbox(site.settings) as outbox:
        outbox.send(message)


def forget(settings: Settings, email: str) -> int:
    """Delete the mails to an address that became files; returns how many. What a server took is out of reach."""
    to_them = []
    for file in (settings.home / "mails").glob("*.eml"):
        with file.open("rb") as lines:
            header = BytesParser(policy=POLICY).parse(lines, headersonly=True)
        if _recipient(header).encode(errors="surrogateescape") == email.encode():
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


def host_of(settings: Settings) -> str:
    """The host of the catalogue's address, which identifies its mails."""
    return urlsplit(settings.url).hostname or "localhost"


def port_of(settings: Settings) -> int:
    """The mail server's port; by default its scheme's."""
    server = urlsplit(settings.smtp)
    return server.port or (465 if server.scheme == "smtps" else 25)


class Outbox:
    """Hands over mails, all by one connection while it lasts; without a server, writes them to `home/mails`.

    A file's name begins with the date of its mail and ends with its identifier, so that a folder lists them in order,
    and a mail that is written twice is one file.

    Args:
        settings: where the server is, and what it must prove (`smtp`, `smtp_tls`).
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self._server: smtplib.SMTP | None = None

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            with suppress(OSError):
                self._server.quit()
            self._drop()

    @property
    def repeatable(self) -> bool:
        """Whether the same mail may be handed over again without a second one coming of it."""
        return not self.settings.smtp

    def send(self, message: EmailMessage, decide: Callable[[], None] = lambda: None) -> None:
        """Hand over a mail.

        Args:
            message: with `To` and `From`, one address each.
            decide: called when all but the end is handed over. Where it raises, the server never has the mail.

        Raises:
            MailError: see its kinds.
        """
        if not self.settings.smtp:
            decide()
            self._file(message)
            return
        fresh = self._server is None
        try:
            self._begin(message)
        except Lost:
            if fresh:
                raise
            self._begin(message)  # servers end a connection after so many mails, or after a while
        try:
            decide()
        except BaseException:
            self._drop()
            raise
        self._end()

    def _file(self, message: EmailMessage) -> None:
        folder = self.settings.home / "mails"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # links that sign people in lie here
        name = message["Message-ID"].strip("<>").replace("@", ".at.")
        with whole(folder / f"{parsedate_to_datetime(message['Date']):%Y-%m-%dT%H%M%S}_{name}.eml") as place:
            Path(place).write_bytes(message.as_bytes(policy=POLICY.clone(utf8=not _recipient(message).isascii())))

    def _begin(self, message: EmailMessage) -> None:
        """All of a mail but its end."""
        server = self._connected()
        to, beyond_ascii = _recipient(message), not _recipient(message).isascii()
        if beyond_ascii and not server.has_extn("smtputf8"):
            raise Refused(f"{to}: this mail server takes no address beyond ASCII")
        data = message.as_bytes(policy=POLICY.clone(utf8=beyond_ascii))
        try:
            server.rset()
            code, said = server.mail(message["From"].addresses[0].addr_spec, ["SMTPUTF8"] if beyond_ascii else [])
            if code >= 300:
                raise self._refusal(code, said, Down if code >= SYNTAX else Later)
            code, said = server.rcpt(to)
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
                raise Down(f"{route(self.settings)}, which fails: {_words(error)}") from None
        return self._server

    def _connect(self) -> smtplib.SMTP:
        address, tls = urlsplit(self.settings.smtp), self.settings.smtp_tls
        host, port = address.hostname or "", port_of(self.settings)
        context = ssl.create_default_context()
        if tls == "unverified":
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        greeting = _greeting(host_of(self.settings))
        if address.scheme == "smtps":
            server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, greeting, timeout=SECONDS, context=context)
        else:
            server = smtplib.SMTP(host, port, greeting, timeout=SECONDS)
        try:
            server.ehlo_or_helo_if_needed()
            encrypted = address.scheme == "smtps"
            if not encrypted and server.has_extn("starttls"):
                server.starttls(context=context)
                server.ehlo()
                encrypted = True
            if not encrypted and tls != "auto":
                raise Down(f"it offers no TLS, which {self.settings.variable('smtp_tls')}={tls} asks for")
            if address.username:
                if not encrypted and not _is_here(host):
                    raise Down("it offers no TLS, and a password goes by TLS alone")
                _log_in(server, unquote(address.username), unquote(address.password or ""))
        except BaseException:
            server.close()
            raise
        return server

    def _drop(self) -> None:
        """Leave the server without a word: what it has not the end of, it forgets."""
        if self._server is not None:
            self._server.close()
            self._server = None


def _log_in(server: smtplib.SMTP, user: str, password: str) -> None:
    """By what both sides know; beyond ASCII, which smtplib leaves out, by PLAIN (RFC 4616)."""
    if (user + password).isascii():
        server.login(user, password)
        return
    code, said = server.docmd("AUTH", "PLAIN " + b64encode(f"\0{user}\0{password}".encode()).decode("ascii"))
    if code != 235:
        raise smtplib.SMTPAuthenticationError(code, said)


def _recipient(message: EmailMessage) -> str:
    return str(message["To"].addresses[0].addr_spec)


def _greeting(host: str) -> str:
    """The name by which a client greets a server; smtplib's own asks a name server, which may take long."""
    try:
        number = ip_address(host)
    except ValueError:
        return host
    return f"[IPv6:{number}]" if number.version == 6 else f"[{number}]"


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

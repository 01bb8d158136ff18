"""Mails as they are written: composed from templates, serialised, and read again before one leaves.

A `Letter` holds what is meant, as plain text. `Letter.as_bytes` makes an `EmailMessage` of it, serialises that, and
compares each header and both bodies of what came out with what was meant. The comparison splits lines by itself, since
`email` decodes encoded words (RFC 2047) in values that it is given, and may write out the ends of lines in them.
"""

import re
from dataclasses import dataclass, field
from datetime import datetime
from email import policy
from email.headerregistry import Address
from email.message import EmailMessage
from email.parser import Parser
from email.utils import format_datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from provenn.core.errors import UserError
from provenn.web.addresses import ENCODED, address, has_unseen, mailbox
from provenn.web.models import now
from provenn.web.settings import Settings
from provenn.web.site import Site

# Passes through every server and can be read in a file. A link in a body is not folded to the next line, where some
# programs do not look for it; an address or a link in a header never is.
POLICY = policy.SMTP.clone(cte_type="7bit", max_line_length=200)
LONGEST_LINE = 998  # RFC 5322, 2.1.1
SUBJECT = 200  # characters of a subject that are kept
BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n|\0")


class Unsound(UserError):
    """A mail would not say what it was meant to say, so it does not leave."""


@dataclass(frozen=True)
class Letter:
    """One mail to one address.

    Args:
        sender: whom it is from.
        to: the address, as `addresses.address` spells it.
        subject: one line.
        text, html: the two forms of its body.
        made: its date.
        identifier: its Message-ID, which is the same when it is written again.
        more: further headers, whose values are one word each.
    """

    sender: Address
    to: str
    subject: str
    text: str
    html: str
    made: datetime
    identifier: str
    more: dict[str, str] = field(default_factory=dict)

    @property
    def beyond_ascii(self) -> bool:
        """Whether a server must speak SMTPUTF8 (RFC 6531) to take it."""
        return not (self.to + self.sender.addr_spec).isascii()

    def as_bytes(self) -> bytes:
        """The mail as it goes over the wire.

        Raises:
            Unsound: what comes out is not what was meant.
        """
        try:
            data = self._message().as_bytes(policy=POLICY.clone(utf8=self.beyond_ascii, max_line_length=LONGEST_LINE))
            difference = self._difference(data)
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # of `email`, by values it cannot hold
            difference = f"it cannot be written: {' '.join(str(error).split())[:200]}"
        if difference:
            raise Unsound(f"the mail {self.identifier!r} is held back: {difference}")
        return data

    def _exact(self) -> dict[str, str]:
        """Headers that stand in the bytes letter by letter."""
        return {
            "To": self.to,
            "Date": format_datetime(self.made),
            "Message-ID": self.identifier,
            "Auto-Submitted": "auto-generated",
            **self.more,
            "MIME-Version": "1.0",
        }

    def _message(self) -> EmailMessage:
        message = EmailMessage(policy=POLICY)
        local, _, host = self.to.rpartition("@")
        # As one text, names beyond ASCII would be refused.
        values = {"From": self.sender, "Subject": self.subject, **self._exact(), "To": Address("", local, host)}
        for name, value in values.items():
            if name != "MIME-Version":  # which the body brings
                message[name] = value
        message.set_content(self.text)
        message.add_alternative(self.html, subtype="html")
        return message

    def _difference(self, data: bytes) -> str:
        """In what the bytes are other than meant; "" where they are not."""
        if BARE.search(data):
            return "a line does not end as lines of mails do"
        head, _, _ = data.decode().partition("\r\n\r\n")
        if max(map(len, data.split(b"\r\n"))) > LONGEST_LINE:
            return "a line is longer than a server takes"
        lines = [line.partition(":") for line in re.sub(r"\r\n(?=[ \t])", "", head).split("\r\n")]
        exact = self._exact()
        meant = sorted([*exact, "From", "Subject", "Content-Type"])
        if sorted(name for name, _, _ in lines) != meant:
            return f"its headers are {', '.join(sorted(name[:40] for name, _, _ in lines))}"
        wrong = [name for name, _, value in lines if name in exact and value.strip() != exact[name]]
        message = Parser(_class=EmailMessage, policy=policy.default).parsestr(data.decode())
        if message["From"].addresses != (self.sender,):
            wrong.append("From")
        if str(message["Subject"]) != self.subject:
            wrong.append("Subject")
        if message["To"].addresses[0].addr_spec != self.to or len(message["To"].addresses) != 1:
            wrong.append("To")
        kinds = [part.get_content_type() for part in message.walk()]
        bodies = [part.get_content().replace("\r\n", "\n") for part in message.iter_parts()]
        if kinds != ["multipart/alternative", "text/plain", "text/html"] or bodies != [self.text, self.html]:
            wrong.append("body")
        return f"other than meant: {', '.join(wrong)}" if wrong else ""


def compose(
    site: Site, to: str, template: str, identifier: str, made: datetime | None = None, **context: Any
) -> Letter:
    """A mail from `templates/mail/<template>.txt`, whose first line is the subject, and `.html` beside it.

    Args:
        site: where its templates and its sender come from.
        to: the address that it goes to.
        template: which it is.
        identifier: what stands before the @ of its Message-ID.
        made: its date; by default now.
        context: what the templates name.

    Raises:
        UserError: `to` is no address.
    """
    subject, _, text = site.render(f"mail/{template}.txt", **context).partition("\n")
    html = site.render(f"mail/{template}.html", **context)
    return Letter(
        sender=mailbox(site.settings.mail_from),
        to=address(to),
        subject=one_line(subject)[:SUBJECT].strip(),
        text=_lines(text.strip()),
        html=_lines(html),
        made=made or now(),
        identifier=f"<{identifier}@{host_name(site.settings)}>",
    )


def one_line(text: str) -> str:
    """Text as a header has it: on one line, nothing unseen, and nothing that a program decodes."""
    seen = "".join(" " if has_unseen(letter) else letter for letter in text)
    return " ".join(seen.replace(ENCODED, "= ?").split())


def host_of(settings: Settings) -> str:
    """The host of the catalogue's address, which identifies its mails."""
    return urlsplit(settings.url).hostname or "localhost"


def host_name(settings: Settings) -> str:
    """The same as mail has it: a number in brackets (RFC 5321, 4.1.3)."""
    host = host_of(settings)
    try:
        number = ip_address(host)
    except ValueError:
        return host
    return f"[IPv6:{number}]" if number.version == 6 else f"[{number}]"


def _lines(text: str) -> str:
    """Text whose lines all end in the same way, without what no mail program shows."""
    text = "\n".join(re.split(r"\r\n|[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]", text))
    return text.encode(errors="replace").decode().replace("\0", " ").rstrip("\n") + "\n"

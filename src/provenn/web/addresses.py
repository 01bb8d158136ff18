"""Addresses of mail: one spelling of each, and nothing that carries more than an address.

Every address that comes in is read by `address`: at the forms, by the operator's command, from the settings, and once
more where a mail is composed. It takes the dot-atoms of RFC 5322 with the letters of RFC 6532, and less than they do:

- no encoded words (RFC 2047). They mean nothing in an address, and a program that decodes one adds lines to a header.
- no quoted local parts, comments, folding, names, lists of addresses, routes (`<@a:b@c>`, `b%c@a`, `c!b@a`), and no
  hosts by number.
- no letter that cannot be seen: controls, ends of lines in any of Unicode's forms, marks of direction.
"""

import re
import unicodedata
from email.headerregistry import Address

import idna

from provenn.core.errors import UserError

ATOM = re.compile(r"[a-z0-9#$&'*+/=?^_`{|}~-]*")  # RFC 5322, 3.2.3, without the signs of a route
HOST = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
NUMBER = re.compile(r"\d+|0x[0-9a-f]*")  # a last label that makes a host one by number
MAILBOX = re.compile(
    r"""(?P<bare>[^<>"]+) | ("(?P<quoted>([^"\\]|\\["\\])*)" | (?P<name>[^"<>()@,;:\\]*)) \s* <(?P<spec>[^<>]*)>""",
    re.X,
)
ENCODED = "=?"  # begins an encoded word
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # categories of Unicode
JOINERS = "\u200c\u200d"  # within words of some scripts; where, `idna` knows
LONGEST, LONGEST_LOCAL = 254, 64  # bytes; RFC 5321, 4.5.3.1
SHOWN = 60  # characters of what is no address


def address(text: str) -> str:
    """The one spelling of an address: small letters, the domain as name servers know it.

    Raises:
        UserError: it is none; see the module for what counts as none.

    >>> address(" Ada@Bücher.example ")
    'ada@xn--bcher-kva.example'
    """
    if len(text) > 4 * LONGEST:  # what follows takes the longer for it
        raise UserError(f"a mail address has at most {LONGEST} letters, got {len(text)}")
    local, _, domain = unicodedata.normalize("NFC", text.strip(" ")).rpartition("@")
    local = unicodedata.normalize("NFC", local.lower())
    try:
        host = idna.encode(domain, uts46=True).decode("ascii").removesuffix(".")
    except UnicodeError:
        host = ""
    spelling = f"{local}@{host}"
    of_a_name = HOST.fullmatch(host) and not NUMBER.fullmatch(host.rpartition(".")[2])
    if not of_a_name or has_unseen(domain) or not _is_dot_atom(local) or len(local.encode()) > LONGEST_LOCAL:
        raise UserError(f"{text[:SHOWN]!r} is not a mail address: write one as ada@example.org")
    if len(spelling.encode()) > LONGEST:
        raise UserError(f"a mail address has at most {LONGEST} letters, got {len(spelling.encode())}")
    return spelling


def spelled(text: str) -> str:
    """The one spelling of what may be an address: `text` itself where it is none."""
    try:
        return address(text)
    except UserError:
        return text


def mailbox(text: str) -> Address:
    """An address with or without a name before it, as `From` has them.

    Raises:
        UserError: it is none, or more than one, or its name has an encoded word or a control in it.

    >>> str(mailbox("provenn's digest <Digest@Example.org>"))
    "provenn's digest <digest@example.org>"
    """
    parts = MAILBOX.fullmatch(text.strip(" "))
    if parts is None or has_unseen(text) or ENCODED in text:
        raise UserError(f"expected one mailbox such as 'provenn <digest@example.org>', got {text!r}")
    name = parts["name"] or re.sub(r"\\(.)", r"\1", parts["quoted"] or "")
    local, _, host = address(parts["bare"] or parts["spec"]).rpartition("@")
    return Address(" ".join(name.split()), username=local, domain=host)


def has_unseen(text: str) -> bool:
    """Whether a control, an end of a line or another sign that nobody sees is in a text."""
    return any(unicodedata.category(letter) in UNSEEN and letter not in JOINERS for letter in text)


def _is_dot_atom(local: str) -> bool:
    """Whether a local part is atoms with dots between them, with letters beyond ASCII as `idna` takes them."""
    if ENCODED in local:
        return False
    for part in local.split("."):
        beyond = "".join(letter for letter in part if not letter.isascii())
        try:
            if beyond:
                idna.check_label(beyond)
        except UnicodeError:
            return False
        if not part or not ATOM.fullmatch("".join(letter for letter in part if letter.isascii())):
            return False
    return True

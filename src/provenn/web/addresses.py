"""Addresses of mail: one spelling of each, and nothing that carries more than an address."""

import re
import unicodedata
from email import policy
from email.headerregistry import Address
from typing import cast

import idna

from provenn.errors import UserError

LOCAL = re.compile(r"[\w!#$%&'*+/=?^`{|}~-]+(\.[\w!#$%&'*+/=?^`{|}~-]+)*")
LONGEST, LONGEST_LOCAL = 254, 64  # RFC 5321, 4.5.3.1
SHOWN = 60  # characters of what is no address


def address(text: str) -> str:
    """The one spelling of an address: small letters, the domain as name servers know it.

    Raises:
        UserError: it is none; quoted local parts, comments and addresses of machines by number count as none.

    >>> address(" Ada@Bücher.example ")
    'ada@xn--bcher-kva.example'
    """
    local, at, domain = unicodedata.normalize("NFC", text.strip()).lower().rpartition("@")
    try:
        domain = idna.encode(domain.removesuffix("."), uts46=True).decode("ascii")
    except UnicodeError:
        at = ""
    whole = f"{local}@{domain}"
    of_a_name = not domain.rpartition(".")[2].isdecimal()
    if not (at and of_a_name and LOCAL.fullmatch(local) and len(local.encode()) <= LONGEST_LOCAL):
        raise UserError(f"{text[:SHOWN]!r} is not a mail address: write one as ada@example.org")
    if len(whole.encode()) > LONGEST:
        raise UserError(f"a mail address has at most {LONGEST} letters, got {len(whole.encode())}")
    return whole


def spelled(text: str) -> str:
    """The one spelling of what may be an address: `text` itself where it is none."""
    try:
        return address(text)
    except UserError:
        return text


def mailbox(text: str) -> Address:
    """An address with or without a name before it, as `From` has them.

    Raises:
        UserError: it is none, or more than one, or has a line's end in it.

    >>> str(mailbox("provenn's digest <Digest@Example.org>"))
    "provenn's digest <digest@example.org>"
    """
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise UserError(f"a mailbox stands on one line without control characters, got {text!r}")
    header = policy.default.header_factory("from", text)
    found = cast(tuple[Address, ...], getattr(header, "addresses", ()))
    if len(found) != 1 or header.defects:
        raise UserError(f"expected one mailbox such as 'provenn <digest@example.org>', got {text!r}")
    return Address(found[0].display_name, addr_spec=address(found[0].addr_spec))

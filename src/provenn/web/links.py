"""The files of the catalogue's addresses in its static copy, and how they link to each other."""

import posixpath
from urllib.parse import parse_qsl, urlsplit

# What an address of the server gives that does not say so by its end.
SUFFIXES = (".atom", ".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp", "/evidence.json", "/openapi.json")
STATES = ("sort", "task", "slot", "tag", "verdict", "has")  # of the list, that have a page each in the copy


def file_of(address: str) -> str:
    """The file of an address in a static copy, with its fragment.

    >>> file_of("/"), file_of("/papers/craft#use"), file_of("/?slot=channel-gate"), file_of("/api/papers/craft")
    ('index.html', 'papers/craft.html#use', 'slot/channel-gate.html', 'api/papers/craft.json')
    """
    parts = urlsplit(address)
    path, after = parts.path.strip("/"), f"#{parts.fragment}" if parts.fragment else ""
    if path.startswith("static/"):
        return path + (f"?{parts.query}" if parts.query else "") + after
    if not path:
        state = dict(parse_qsl(parts.query))
        if len(state) == 1 and (name := next(iter(state))) in STATES:
            return f"{name}/{named(state[name])}.html{after}"
        return "index.html" + (f"?{parts.query}" if parts.query else "") + after
    if path.endswith(SUFFIXES):
        return path
    return path + (".json" if path.startswith("api/") else ".html") + after


def named(value: str) -> str:
    """A task, a tag or the like as the name of a file.

    >>> named("mixture of experts"), named("O(n) time"), named("a/../b")
    ('mixture-of-experts', 'o-n-time', 'a-b')
    """
    words = "".join(sign if sign.isalnum() and sign.isascii() else " " for sign in value.lower())
    return "-".join(words.split())


def beside(page: str, address: str) -> str:
    """An address as the file of the page at another links to it.

    >>> beside("/papers/craft", "/"), beside("/", "/papers/craft"), beside("/papers/craft", "#use")
    ('../index.html', 'papers/craft.html', '#use')
    """
    if not address.startswith("/") or address.startswith("//"):
        return address
    here, there = file_of(page), file_of(address)
    file, sign, rest = there.partition("#" if "?" not in there else "?")
    return posixpath.relpath(file, posixpath.dirname(here) or ".") + sign + rest

"""Requests that are refused before anything reads them: for other hosts, too long, or framed in two ways at once."""

import re
from collections.abc import Callable, Iterable
from urllib.parse import unquote, urlsplit

from fastapi import Request, Response

from provenn.web.failures import Receive, Scope, Send, refusal
from provenn.web.settings import Settings

LONGEST_TARGET = 8_000  # bytes of a path and its query string
LONGEST_HEADER, MOST_FIELDS = 16_000, 100  # bytes of a header, and its fields
HERE = ("localhost", "127.0.0.1", "::1")
SHOWN = 80  # characters of a host
ABSOLUTE = re.compile(rb"https?://(?P<host>[^/?#]*)", re.I)


class Admission:
    """Lets requests through that name this catalogue's host and keep to its limits.

    A host that anybody may choose would make every check of where a form comes from worthless: a page of theirs, whose
    name they let lead here, would count as ours.

    Args:
        settings: `url` and `hosts` say by which names readers come.
    """

    def __init__(self, app: Callable, settings: Settings):
        self.app = app
        self.hosts = {*HERE, *settings.hosts, (urlsplit(settings.url).hostname or "").lower()} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application's answer, or a refusal."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = in_origin_form(scope)
        await (self._refusal(Request(scope)) or self.app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        fields = request.scope["headers"]
        close = {"Connection": "close"}
        if len(fields) > MOST_FIELDS or sum(len(name) + len(value) for name, value in fields) > LONGEST_HEADER:
            most = f"at most {MOST_FIELDS} fields and {LONGEST_HEADER:,} bytes"
            return refusal(request, 431, f"The header of a request has {most}.", close)
        if len(request.scope.get("raw_path") or b"") + len(request.scope["query_string"]) > LONGEST_TARGET:
            return refusal(request, 414, f"An address here has at most {LONGEST_TARGET:,} bytes.", close)
        names = [name for name, _ in fields]
        if b"transfer-encoding" in names and (
            b"content-length" in names or request.scope["http_version"] not in ("1.1", "2")
        ):
            # A proxy that goes by one length and a server by the other find two requests where there is one.
            return refusal(request, 400, "A request says once how long it is.", close)
        hosts = request.headers.getlist("host")
        if len(hosts) != 1:
            return refusal(request, 400, f"A request names one host, and this one names {len(hosts)}.")
        if not self._is_ours(hosts[0], request.scope.get("server")):
            words = f"This catalogue is not at {hosts[0][:SHOWN]!r}."
            hint = " Its operator names other hosts by provenn web serve --url or PROVENN_HOSTS."
            return refusal(request, 400, words + hint)
        return None

    def _is_ours(self, host: str, server: Iterable | None) -> bool:
        """Whether a host is among those of the settings, or is the very address that the connection came to."""
        try:
            parts = urlsplit(f"//{host}")
            name, _ = (parts.hostname or "").removesuffix("."), parts.port  # a dot ends a name that is whole
        except ValueError:
            return False
        return bool(name) and parts.netloc == host and "@" not in host and name in {*self.hosts, *(server or ())}


def in_origin_form(scope: Scope) -> Scope:
    """A request for a whole address as one for its path; its host goes before the header's (RFC 9112, 3.2.2)."""
    whole = ABSOLUTE.match(scope.get("raw_path") or b"")
    if whole is None:
        return scope
    path = scope["raw_path"][whole.end() :] or b"/"
    fields = [(name, value) for name, value in scope["headers"] if name != b"host"]
    return {
        **scope,
        "path": unquote(path.decode("ascii")),
        "raw_path": path,
        "headers": [(b"host", whole["host"]), *fields],
    }

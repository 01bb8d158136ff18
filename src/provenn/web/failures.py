"""What is answered where no page can be: each failure has a page of ours, and one line in the log with its cause."""

import errno
import logging
import secrets
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.requests import ClientDisconnect

import provenn
from provenn.core.files import Unwritable
from provenn.web.site import asset, site_of

LOG = logging.getLogger("provenn.web")
AGAIN = {"Retry-After": "5"}  # seconds
# What ends by itself or by the operator: no room, no descriptor, a disk that only reads.
FOR_A_WHILE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
TITLES = {
    400: "Not understood",
    401: "Sign in first",
    403: "Not taken",
    404: "Not found",
    405: "Not done this way",
    408: "Too slow",
    413: "Too large",
    414: "Too long an address",
    415: "Not of this kind",
    422: "Not understood",
    429: "Too often",
    431: "Too large a header",
    500: "Something broke here",
    503: "Not now",
}
# What uvicorn says of clients, and of answers that are cut off, which have a line of ours.
NOT_SAID = ("Invalid HTTP request received.", "ASGI callable returned without completing response.")
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"ours": {"()": "provenn.web.failures.unsaid"}},
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"lines": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["ours"]}},
    "loggers": {
        name: {"handlers": ["lines"], "level": "WARNING", "propagate": False} for name in ("uvicorn", "provenn.web")
    },
}
LONGEST_PATH, LONGEST_CAUSE, FRAMES = 200, 500, 3  # of a line in the log
PACKAGE = Path(provenn.__file__).parent
# Without the templates, which may be what is broken.
BARE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · provenn</title>
<link rel="stylesheet" href="{style}">
</head>
<body>
<header class="top"><a class="name" href="/">prove<b>nn</b></a></header>
<main>
<h1>{title}</h1>
<p class="lead">{words}</p>
{request}<p><a href="/">All papers</a></p>
</main>
</body>
</html>
"""
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Failures:
    """Answers every exception that nothing else answers, and writes one line of it."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application's answer; instead, where it fails before it begins, a page that says so."""
        begun = False

        async def sent(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            await self.app(scope, receive, sent)
        except ClientDisconnect:  # nobody is there to be answered
            return
        except Exception as error:
            if begun:  # the server closes the connection, so that nobody takes the part for the whole
                note(request, "cut off", cause_of(error))
                return
            await answer_to(request, error)(scope, receive, send)


def answer_to(request: Request, error: Exception) -> Response:
    """What is answered instead of a page that could not be made."""
    if isinstance(error, OperationalError | NoConnection):
        return failed(request, 503, "The database does not answer: try again in a moment.", cause_of(error))
    if isinstance(error, Unwritable) or (isinstance(error, OSError) and error.errno in FOR_A_WHILE):
        return failed(request, 503, "The server has no room for this: try again in a moment.", cause_of(error))
    return failed(request, 500, "This is a fault of ours, and the operator can find it by its number.", cause_of(error))


def failed(request: Request, status: int, words: str, cause: str, headers: dict[str, str] | None = None) -> Response:
    """An answer for what could not be done, with the number of its line in the log. Reads no database."""
    number = note(request, str(status), cause)
    headers = (AGAIN if status == 503 else {}) | {"Cache-Control": "no-store"} | (headers or {})
    return refusal(request, status, words, headers, number)


def note(request: Request, what: str, cause: str) -> str:
    """Write one line of a failure; returns the number that a page may show."""
    number = secrets.token_hex(4)
    path = quote(request.scope["path"], errors="replace")[:LONGEST_PATH]
    LOG.error("%s %s %s, request %s: %s", what, request.method, path, number, cause)
    return number


def refusal(
    request: Request, status: int, words: str, headers: dict[str, str] | None = None, number: str = ""
) -> Response:
    """The page of a refusal, the same for every reader; JSON for programs.

    Args:
        words: why, in sentences.
        number: of its line in the log, where it has one.
    """
    if wants_json(request):
        return JSONResponse({"error": words} | ({"request": number} if number else {}), status, headers)
    title = TITLES.get(status, "Not possible")
    context = {"request": request, "visitor": None, "title": title, "words": words, "number": number}
    try:
        text = site_of(request).render("refused.html", **context)
    except Exception as error:
        note(request, "page of a refusal", cause_of(error))
        text = bare(title, words, number)
    return HTMLResponse(text, status, headers)


def bare(title: str, words: str, number: str = "") -> str:
    """A refusal as a page that needs no templates, database or site."""
    request = f'<p class="soft">Request {number}</p>\n' if number else ""
    return BARE.format(title=escape(title), style=asset("style.css"), words=escape(words), request=request)


def wants_json(request: Request) -> bool:
    """Whether a program asks."""
    return request.scope["path"].startswith("/api/") or "application/json" in request.headers.get("accept", "")


def cause_of(error: BaseException) -> str:
    """An exception on one line: what it is, what it says, where it was raised, and where in this package before that.

    A database's own words stand for a statement's, which carry addresses of people.
    """
    said = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    words = " ".join(str(said).split())[:LONGEST_CAUSE]
    trace = traceback.extract_tb(error.__traceback__)
    ours = [
        f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.lineno}"
        for frame in trace
        if PACKAGE in Path(frame.filename).parents and frame.name != "__call__"  # every request comes through those
    ]
    last = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in trace[-1:]]  # of another package, it may be
    lines = ", ".join(dict.fromkeys([*last, *reversed(ours[-FRAMES:])]))
    return f"{type(said).__name__}: {words}" + (f" (at {lines})" if lines else "")


def unsaid() -> Callable[[logging.LogRecord], bool]:
    """The filter of a server's log."""
    return lambda record: record.msg not in NOT_SAID

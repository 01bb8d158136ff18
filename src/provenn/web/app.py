"""The application: its pages, its headers and its errors."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware

from provenn import __version__
from provenn.web import boards, figures, machines, pages, people, subscriptions, tries
from provenn.web.database import Database
from provenn.web.demos import Demos
from provenn.web.digest import Clock
from provenn.web.settings import Settings
from provenn.web.site import HERE, Site, page

ROUTERS = (
    pages.router,
    figures.router,
    boards.router,
    machines.router,
    people.router,
    subscriptions.router,
    tries.router,
)

# No script, style or picture from elsewhere, none inside a page, and no page inside another's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cross-Origin-Opener-Policy": "same-origin",
}
TITLES = {
    401: "Sign in first",
    403: "Not taken",
    404: "Not found",
    413: "Too large",
    415: "Not of this kind",
    422: "Not understood",
    429: "Too often",
    503: "Not now",
}
HOST = re.compile(rb"^https?://[^/]*")  # of a redirect: none of ours leads to another site
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Kept(StaticFiles):
    """Files whose address changes with what is in them (`site.asset`): browsers keep them without asking again."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file, kept for a year where its address says which version of it is meant."""
        response = await super().get_response(path, scope)
        if scope["query_string"] and response.status_code in (200, 206, 304):
            response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response


class Heads:
    """Answers HEAD as GET, without the body."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Any) -> None:
            await send(message | {"body": b""} if message["type"] == "http.response.body" else message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self.app({**scope, "method": "GET"}, receive, sent)
        else:
            await self.app(scope, receive, send)


class SafeHeaders:
    """Adds `HEADERS` to every answer that does not have its own, and HSTS where readers come by TLS.

    What leads elsewhere on the site names no host: the one that a request names may be anybody's.
    """

    def __init__(self, app: Callable, secure: bool):
        self.app = app
        more = {"Strict-Transport-Security": "max-age=31536000"} if secure else {}
        self.headers = [(name.lower().encode(), value.encode()) for name, value in (HEADERS | more).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = [
                    (name, HOST.sub(b"", value) if name.lower() == b"location" else value)
                    for name, value in message.get("headers", [])
                ]
                names = {name.lower() for name, _ in given}
                message["headers"] = [*given, *(header for header in self.headers if header[0] not in names)]
            await send(message)

        await self.app(scope, receive, sent if scope["type"] == "http" else send)


def create_app(settings: Settings | None = None, *, copied: bool = False) -> FastAPI:
    """The catalogue as an ASGI application; its database is brought to this version's form.

    Args:
        settings: by default those of the environment.
        copied: whether its pages are written as files; see `provenn.web.static_copy`.

    Raises:
        UserError: the settings or the database cannot be used.
    """
    settings = Settings.read() if settings is None else settings
    settings.signing_key()  # drawn here where it is new, before two requests can draw one each
    database = Database(settings.database)
    database.migrate()
    demos = Demos(settings) if settings.demos else None

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        clock = Clock(app.state.site)
        clock.start()
        yield
        clock.stop()
        if demos is not None:
            demos.close()
        database.close()

    app = FastAPI(title="provenn", version=__version__, docs_url=None, redoc_url=None, lifespan=living)
    app.state.site = Site(settings, database, copied=copied)
    app.state.demos = demos
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)
    app.add_middleware(SafeHeaders, secure=settings.secure)
    app.add_middleware(Heads)
    app.mount("/static", Kept(directory=HERE / "static"), name="static")
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _unread)
    for error in (OperationalError, NoConnection):
        app.add_exception_handler(error, _unavailable)
    return app


def _wants_json(request: Request) -> bool:
    return request.url.path.startswith("/api/") or "application/json" in request.headers.get("accept", "")


def _answer(request: Request, status: int, words: str, headers: dict[str, str] | None = None) -> Response:
    if _wants_json(request):
        return JSONResponse({"error": words}, status, headers)
    answer = page(request, "refused.html", status=status, title=TITLES.get(status, "Not possible"), words=words)
    answer.headers.update(headers or {})
    return answer


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers) if error.headers else None
    return _answer(request, error.status_code, str(error.detail), headers)


def _unread(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    words = "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors())
    return _answer(request, 422, words)


def _unavailable(request: Request, error: Exception) -> Response:
    """The database is away, or it or every connection to it is busy for longer than anybody waits: no page can be drawn
    that reads it.
    """
    words = "The database does not answer: try again in a moment."
    if _wants_json(request):
        return JSONResponse({"error": words}, 503, {"Retry-After": "5"})
    return PlainTextResponse(words, 503, {"Retry-After": "5"})

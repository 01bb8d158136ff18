"""The application: its pages, its headers and its errors."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware

from provenn import __version__
from provenn.web import boards, figures, machines, pages, people, subscriptions, tries
from provenn.web.admission import Admission
from provenn.web.database import Database
from provenn.web.demos import Demos
from provenn.web.digest import Clock
from provenn.web.failures import TITLES, Failures, Receive, Scope, Send, cause_of, failed, refusal, wants_json
from provenn.web.headers import headers
from provenn.web.outbox import Sender
from provenn.web.rendering import page
from provenn.web.settings import Settings
from provenn.web.site import HERE, Site

ROUTERS = (
    pages.router,
    figures.router,
    boards.router,
    machines.router,
    people.router,
    subscriptions.router,
    tries.router,
)

HOST = re.compile(rb"^https?://[^/]*")  # of a redirect: none of ours leads to another site


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
    """Adds the headers of every answer to those that do not have their own.

    What leads elsewhere on the site names no host: the one that a request names may be anybody's.
    """

    def __init__(self, app: Callable, secure: bool):
        self.app = app
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers(secure).items()]

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
    settings.keep_private()
    settings.signing_key()  # drawn here where it is new, before two requests can draw one each
    database = Database(settings.database)
    database.migrate()
    demos = Demos(settings) if settings.demos else None

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        clock, sender = Clock(app.state.site), Sender(app.state.site)
        clock.start()
        sender.start()
        yield
        clock.stop()
        sender.stop()
        if demos is not None:
            demos.close()
        database.close()

    app = FastAPI(title="provenn", version=__version__, docs_url=None, redoc_url=None, lifespan=living)
    app.state.site = Site(settings, database, copied=copied)
    app.state.demos = demos
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)
    app.add_middleware(Admission, settings=settings)
    app.add_middleware(Failures)
    app.add_middleware(SafeHeaders, secure=settings.secure)
    app.add_middleware(Heads)
    app.mount("/static", Kept(directory=HERE / "static"), name="static")
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _unread)
    return app


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    given, words = dict(error.headers or {}), str(error.detail)
    if error.status_code >= 500:
        return failed(request, error.status_code, words, cause_of(error.__cause__) if error.__cause__ else words, given)
    return _answer(request, error.status_code, words, given)


def _unread(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    words = "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors())
    return _answer(request, 422, words)


def _answer(request: Request, status: int, words: str, headers: dict[str, str] | None = None) -> Response:
    """A refusal, on the page of whoever reads it."""
    if wants_json(request):
        return refusal(request, status, words, headers)
    title = TITLES.get(status, "Not possible")
    answer = page(request, "refused.html", status=status, title=title, words=words, number="")
    answer.headers.update(headers or {})
    return answer

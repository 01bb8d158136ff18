"""An application that a paper brings, in a process of its own: what it answers, sent over HTTP.

Uploads are held in memory and written nowhere. No page may load anything from another machine, be framed, or be kept by
a cache. A form is taken from the application's own pages alone.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

from provenn.core.apps import Answer, App, Asked
from provenn.core.errors import UserError
from provenn.inference.paper import paper

MODULE = "app"
LARGEST = 40_000_000  # bytes of a request
AT_ONCE = 3  # forms that are read at once: each is held in memory
SLOWEST = 120.0  # seconds that a form may take to arrive
SAFE = {
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "cache-control": "no-store",
    "referrer-policy": "same-origin",  # with "no-referrer" a browser says no origin of a form, not even of our own
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def make_app(slug: str, home: Path, environment: Mapping[str, str]) -> App:
    """The application of a paper.

    Args:
        slug: the paper.
        home: a folder for what it keeps.
        environment: variables that it may read.

    Raises:
        UserError: the paper brings none, or it cannot start.
    """
    chosen = paper(slug)
    if not chosen.card.has(MODULE):
        raise UserError(f"{slug} brings no application of its own: leave --app out for the catalogue")

    def load() -> tuple[Any, Mapping[str, Any]]:
        model, label = chosen.load()
        return model, label.meta

    made: App = chosen.card.resolve(f"{MODULE}:create_app")(load, home, environment)
    return made


def served(app: App) -> FastAPI:
    """The application as an ASGI one."""
    server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    reading = asyncio.Semaphore(AT_ONCE)

    def sent(made: Answer) -> Response:
        return Response(made.body, made.status, {**SAFE, **made.headers}, made.kind)

    @server.api_route("/{path:path}", methods=["GET", "POST"])
    async def answer(request: Request) -> Response:
        """All of it goes to the application; a request of another site, or a large one, does not."""
        origin = request.headers.get("origin")
        if request.method == "POST" and origin and urlsplit(origin).netloc != request.headers.get("host", ""):
            return Response("a form of another site", 403, SAFE, "text/plain")
        asked = Asked(request.method, request.url.path, dict(request.query_params), cookies=dict(request.cookies))
        refused = app.refuse(asked)  # before anything is read that a stranger sends
        if refused is not None:
            return sent(refused)
        if request.method != "POST":
            return sent(await run_in_threadpool(app.answer, asked))
        if reading.locked():
            busy = {**SAFE, "retry-after": "10"}
            return Response(
                "others are sending photographs: go back and try again in a moment", 503, busy, "text/plain"
            )
        async with reading:
            try:
                form, files = await asyncio.wait_for(_form(request), SLOWEST)
            except ValueError as error:
                return Response(str(error), 413, SAFE, "text/plain")
            except TimeoutError:
                return Response(f"the form took over {SLOWEST:.0f} seconds to arrive", 408, SAFE, "text/plain")
            return sent(await run_in_threadpool(app.answer, replace(asked, form=form, files=files)))

    return server


async def _form(request: Request) -> tuple[dict[str, str], dict[str, bytes]]:
    """Fields and files of a form, in memory.

    Raises:
        ValueError: it is larger than 40 MB, or no form.
    """
    too_much = ValueError(f"more than {LARGEST // 1_000_000} MB")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > LARGEST:
        raise too_much
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > LARGEST:
            raise too_much

    async def stream() -> Any:
        yield bytes(content)

    kind = request.headers.get("content-type", "")
    try:
        if kind.startswith("multipart/form-data"):
            parser = MultiPartParser(request.headers, stream(), max_files=1, max_fields=20)
            parser.spool_max_size = LARGEST + 1  # else what is larger than 1 MB would be written to a file
            found = await parser.parse()
        else:
            found = await FormParser(request.headers, stream()).parse()
    except MultiPartException as error:
        raise ValueError(error.message) from None
    fields = {name: value for name, value in found.items() if isinstance(value, str)}
    files = {name: await value.read() for name, value in found.items() if isinstance(value, UploadFile)}
    return fields, files

"""The catalogue as files that any host serves: without people and demos, under any path."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fastapi import FastAPI

from provenn import __version__
from provenn.core.errors import UserError
from provenn.web import boards
from provenn.web.app import create_app
from provenn.web.links import file_of
from provenn.web.settings import Settings
from provenn.web.site import Site

MARK = ".provenn-export"  # the file by which a folder is known as an earlier export
FOR_PROGRAMS = (
    "/api/papers", "/api/daily_papers", "/api/not_held", "/api/boards", "/feeds/papers.atom", "/feeds/verdicts.atom",
)  # fmt: skip


def export(folder: Path, settings: Settings) -> int:
    """Write the whole catalogue; the folder has the old files or the new ones, never a part.

    Args:
        folder: is made, or is an earlier export, which is replaced.
        settings: `url` is where the copy will be, for what feeds and JSON link to.

    Returns:
        How many files were written.

    Raises:
        UserError: there is something else in the folder, or it cannot be written.
    """
    folder = folder.resolve()  # what a link leads to is replaced, not the link
    _check(folder)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        beside.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as home:
            alone = settings.model_copy(update={"home": Path(home), "database_url": "", "secret": "", "demos": False})
            app = create_app(alone, copied=True)
            try:
                count = asyncio.run(_write(app, beside))
            finally:
                app.state.site.database.close()
        (beside / MARK).write_text(f"provenn {__version__}\n", encoding="ascii")
        if folder.exists():
            os.rename(folder, old)
        os.rename(beside, folder)
        return count
    except OSError as error:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise UserError(f"{folder} is not empty and is no earlier export: give an empty folder or a new one")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder that the export goes to")


async def _write(app: FastAPI, folder: Path) -> int:
    """Every page that a page links to, from the list on, and what programs read."""
    site: Site = app.state.site
    site.linked.update(("/", *_for_programs(site)))
    written: set[str] = set()
    while True:
        waiting = {file: address for address in site.linked if (file := _file(address)) not in written}
        if not waiting:
            return len(written)
        for file, address in sorted(waiting.items()):
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(await _answer(app, address))
            written.add(file)


def _for_programs(site: Site) -> Iterable[str]:
    yield from FOR_PROGRAMS
    yield from (f"/api/papers/{slug}" for slug in site.catalogue)
    yield from (f"/api/boards/{name}" for name in boards.names(site.catalogue))


def _file(address: str) -> str:
    return unquote(file_of(address).partition("#")[0].partition("?")[0])


async def _answer(app: FastAPI, address: str) -> bytes:
    """What the application answers to an address, asked without a network."""
    parts = urlsplit(address)
    content: list[bytes] = []
    status: list[int] = []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": unquote(parts.path), "raw_path": parts.path.encode(), "query_string": parts.query.encode(),
        "root_path": "", "headers": [(b"host", b"localhost")], "server": ("localhost", 80), "client": ("127.0.0.1", 0),
    }  # fmt: skip

    asked = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> dict:
        for message in asked:
            return message
        await asyncio.Event().wait()  # who listens for the end of the connection is stopped with the answer
        raise AssertionError

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])
        content.append(message.get("body", b""))

    await app(scope, receive, send)  # type: ignore[arg-type]  # whose own types are mappings that may change
    if status != [200]:
        raise RuntimeError(f"a page links to {address}, which answers {status}: a copy as files cannot hold it")
    return b"".join(content)

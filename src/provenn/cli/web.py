"""Verbs of the web catalogue: `provenn web serve`, `mail`, `admin` and `export`."""

import json as text_of
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from provenn.cli.app import Json, app, log
from provenn.core.errors import UserError
from provenn.core.files import atomic_write, check_output

if TYPE_CHECKING:  # slow to import, and not there without the extra
    from provenn.web.database import Database

NEEDED = "the web catalogue needs more packages: pip install 'provenn[web]'"
LEAVE_SECONDS = 5  # that an ending server waits for answers: one that streams a demo may take minutes
LIMITS = "Limits on clients"
Home = Annotated[Path | None, typer.Option(help="Folder of the embedded database. Default: ~/.local/share/provenn.")]
web = typer.Typer(
    help="""The web catalogue: serve it, mail its digest, administer it, write it as files.

    \b
    provenn web serve
    provenn web mail
    """
)
admin = typer.Typer(
    help="""Administer a catalogue: list, hide, approve, export, delete.

    \b
    provenn web admin list reports
    provenn web admin hide 17
    """
)
app.add_typer(web, name="web")
web.add_typer(admin, name="admin")


@web.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 accepts other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    home: Home = None,
    app_of: Annotated[
        str | None,
        typer.Option(
            "--app",
            help="Serve the application of this paper in the place of the catalogue; what it keeps is in --home.",
            metavar="SLUG",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Public address of the catalogue, for links in mails and feeds. Default: http://HOST:PORT."),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            help="Number of processes that answer. With several, papers cannot be tried and each has its own limits.",
            min=1,
            max=64,
        ),
    ] = 1,
    proxies: Annotated[
        str,
        typer.Option(
            help="Addresses or networks of trusted proxies, separated by commas. From these, X-Forwarded-For names "
            "the client, so that limits count for each reader. From others it is ignored.",
            envvar="FORWARDED_ALLOW_IPS",
        ),
    ] = "127.0.0.1",
    connections: Annotated[
        int, typer.Option(help="Open connections of all clients together.", min=1, rich_help_panel=LIMITS)
    ] = 1000,
    client_connections: Annotated[
        int, typer.Option(help="Open connections of one client; a proxy may have more.", min=1, rich_help_panel=LIMITS)
    ] = 100,
    header_seconds: Annotated[
        float,
        typer.Option(help="Longest time for the header of a request, in seconds.", min=0.1, rich_help_panel=LIMITS),
    ] = 10.0,
    body_seconds: Annotated[
        float, typer.Option(help="Longest time for the body of a request, in seconds.", min=0.1, rich_help_panel=LIMITS)
    ] = 300.0,
    least_rate: Annotated[
        float,
        typer.Option(
            help="Lowest rate at which a client may send or receive, in bytes a second.", min=0, rich_help_panel=LIMITS
        ),
    ] = 500.0,
    stall_seconds: Annotated[
        float,
        typer.Option(help="Time over which --least-rate is measured, in seconds.", min=0.1, rich_help_panel=LIMITS),
    ] = 20.0,
    idle_seconds: Annotated[
        int,
        typer.Option(
            help="Longest time between two requests of a connection, in seconds.", min=1, rich_help_panel=LIMITS
        ),
    ] = 5,
) -> None:
    """Serve the web catalogue: every paper, its claims with their evidence, and demos to try.

    Only requests for the host of --url, of --host or of this machine are answered. PROVENN_HOSTS adds other hosts,
    separated by commas. A request may have a header of 16,000 bytes with 100 fields, an address of 8,000 bytes and a
    form of 64,000 bytes. PROVENN_UPLOAD_MEGABYTES limits the files that readers try.

    \b
    provenn web serve
    DATABASE_URL=postgresql://me@localhost/provenn provenn web serve --host 0.0.0.0 --url https://papers.example.org
    """
    if app_of is not None:
        _serve_app(app_of, host, port, home)
        return
    try:
        import uvicorn

        from provenn.web import Settings, create_app, mail
        from provenn.web.connections import BACKLOG, ConnectionLimits, Gate
        from provenn.web.failures import LOGGING
    except ModuleNotFoundError as error:
        raise UserError(f"{NEEDED} (there is no {error.name})") from None
    named = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    hosts = ",".join([host, os.environ.get("PROVENN_HOSTS", "")])
    environment = {"PROVENN_URL": f"http://{named}:{port}", **os.environ, "PROVENN_HOSTS": hosts}
    settings = Settings.read(environment, home=home, url=url)
    check_proxies(proxies)
    settings.keep_private()
    log(f"provenn: the catalogue is at {settings.url} (Ctrl-C ends it)")
    at = f"; the digest goes at {settings.digest_at} UTC" if settings.digest_at else ""
    log(f"provenn: {mail.route(settings)}{at}")
    limits = ConnectionLimits(
        connections, client_connections, header_seconds, body_seconds, stall_seconds, least_rate, idle_seconds
    ).fitting()
    if limits.connections < connections:
        log(f"provenn: at most {limits.connections} connections at once, by the limit on open files (`ulimit -n`)")
    options = {
        "host": host,
        "port": port,
        "http": Gate(limits, settings.secure),
        "ws": "none",
        "backlog": BACKLOG,
        "timeout_keep_alive": idle_seconds,
        "timeout_graceful_shutdown": LEAVE_SECONDS,
        "log_level": "warning",
        "log_config": LOGGING,
        "forwarded_allow_ips": proxies,
        "server_header": False,
    }
    if workers == 1:
        application = create_app(settings)
        try:
            uvicorn.run(application, **options)  # type: ignore[arg-type]  # a mapping has one type of value
        except SystemExit as error:
            if error.code:
                raise UserError(f"cannot listen at {host}, port {port}: the line above says why") from None
        return
    from uvicorn.supervisors import Multiprocess

    # Each process makes its own application, from the environment. A demo is kept by one of them, and the next request
    # about it would come to another.
    if settings.demos:
        log("provenn: several processes cannot share demos, so papers cannot be tried here; --workers 1 has them")
    log(f"provenn: limits count in each process by itself, so that they are up to {workers} times as high")
    os.environ |= {"PROVENN_HOME": str(settings.home), "PROVENN_URL": settings.url, "PROVENN_DEMOS": "false"}
    os.environ["PROVENN_HOSTS"] = hosts
    settings.signing_key()  # drawn once, before two of them would
    config = uvicorn.Config("provenn.web:create_app", factory=True, workers=workers, **options)  # type: ignore[arg-type]
    listening = config.bind_socket()
    # A socket that processes share is not set so by asyncio, and each answer would wait 40 ms for an acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    Multiprocess(config, sockets=[listening]).run()


def _serve_app(slug: str, host: str, port: int, home: Path | None) -> None:
    """Serve a paper's own application until Ctrl-C."""
    try:
        import uvicorn

        from provenn.web.apps import make_app, served
        from provenn.web.failures import LOGGING
    except ModuleNotFoundError as error:
        raise UserError(f"{NEEDED} (there is no {error.name})") from None
    application = make_app(slug, home or Path.home() / ".local/share/provenn" / slug, os.environ)
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    log(f"provenn: {application.title} is at http://{shown}:{port}{application.path} (Ctrl-C ends it)")
    if host not in ("127.0.0.1", "::1", "localhost"):
        log(
            "provenn: this is no HTTPS: put a proxy with a certificate before it, or photographs cross the network open"
        )
    try:
        uvicorn.run(
            served(application), host=host, port=port, log_level="warning", log_config=LOGGING, server_header=False
        )
    except SystemExit as error:
        if error.code:
            raise UserError(f"cannot listen at {host}, port {port}: the line above says why") from None


def check_proxies(proxies: str) -> None:
    """Whether each is an address or a network: what is neither would be trusted by nobody, in silence.

    Raises:
        UserError: one is not.
    """
    for proxy in filter(None, (part.strip() for part in proxies.split(","))):
        try:
            if proxy != "*":
                ip_network(proxy)
        except ValueError:
            raise UserError(
                f"proxies must be addresses or networks such as 10.0.0.0/8, with commas between, or *, got {proxy!r}"
            ) from None


@web.command("export")
def export_site(
    folder: Annotated[Path, typer.Argument(help="Folder to write the files to.")],
    url: Annotated[str | None, typer.Option(help="Public address of the files, for links in feeds and JSON.")] = None,
) -> None:
    """Write the catalogue as files that any host serves, without accounts, votes and demos.

    \b
    provenn web export site/ --url https://me.example.org/papers
    """
    try:
        from provenn.web import Settings
        from provenn.web.static_copy import export
    except ModuleNotFoundError as error:
        raise UserError(f"{NEEDED} (there is no {error.name})") from None
    settings = Settings.read({"PROVENN_URL": "http://127.0.0.1:8000", **os.environ}, url=url)
    count = export(folder, settings)
    log(f"provenn: {count} files are in {folder}; feeds and JSON say that they are at {settings.url}")


@web.command()
def mail(
    send: Annotated[
        bool, typer.Option("--send", help="Send the mails. Default: print them, and record nothing.")
    ] = False,
    daily: Annotated[bool, typer.Option("--daily", help="Only to daily subscribers.")] = False,
    weekly: Annotated[bool, typer.Option("--weekly", help="Only to weekly subscribers.")] = False,
    date: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Day of the digest. Default: today in UTC.")
    ] = None,
    home: Home = None,
    url: Annotated[str | None, typer.Option(help="Public address of the catalogue, for links in the mails.")] = None,
) -> None:
    """Mail the digest to its subscribers. Made for cron: a subscriber gets at most one digest a day.

    A weekly digest goes on the first run of a week, which begins on Monday. A server on the same database sends these
    mails too: give both the same options.

    \b
    provenn web mail
    PROVENN_SMTP=smtp://me:password@mail.example.org:587 provenn web mail --send --url https://papers.example.org
    """
    with _database(home) as database:
        from provenn.web import Settings
        from provenn.web import digest as mails
        from provenn.web.site import Site

        site = Site(Settings.read(home=home, url=url), database)
        day = mails.a_day(date.date()) if date else datetime.now(UTC).date()
        frequencies = [name for name, wanted in (("daily", daily), ("weekly", weekly)) if wanted] or mails.FREQUENCIES
        if not send:
            typer.echo(mails.preview(site, day, frequencies), nl=False)
            return
        tally = mails.run(site, day, frequencies)
    for trouble in tally.troubles:
        log(f"provenn: {trouble}")
    if tally.down:
        raise UserError(f"digest of {day}: {tally}: {tally.down}")
    typer.echo(f"digest of {day}: {tally}")


class What(StrEnum):
    """What people leave behind, as the operator lists it."""

    COMMENTS = "comments"
    REPORTS = "reports"
    SUGGESTIONS = "suggestions"
    PEOPLE = "people"


@admin.command("list")
def list_rows(what: What, home: Home = None, json: Json = False) -> None:
    """List comments, reports, suggestions or people, the newest first.

    \b
    provenn web admin list reports
    provenn web admin list comments --json
    """
    from provenn.cli import console

    with _database(home) as database:
        from provenn.web import overview

        with database.reading() as session:
            rows = overview.rows(session, what.value)
    if json:
        console.machine(rows)
    elif rows:
        cells = [[console.escape(_cell(value)) for value in row.values()] for row in rows]
        console.console().print(console.table([name.replace("_", " ") for name in rows[0]], cells))
    else:
        log(f"there are no {what.value}")


@admin.command()
def mails(home: Home = None) -> None:
    """Print one line on the mails that wait: how many, of which kinds, for how long, and the last error.

    \b
    provenn web admin mails
    """
    with _database(home) as database:
        from provenn.web import outbox

        with database.reading() as session:
            typer.echo(outbox.summary(session))


@admin.command()
def hide(number: Annotated[int, typer.Argument(help="The comment's number.")], home: Home = None) -> None:
    """Hide a comment: readers see that the operator hid it.

    \b
    provenn web admin hide 17
    """
    _set_hidden(number, home, True)


@admin.command()
def show(number: Annotated[int, typer.Argument(help="The comment's number.")], home: Home = None) -> None:
    """Show a hidden comment again.

    \b
    provenn web admin show 17
    """
    _set_hidden(number, home, False)


@admin.command()
def approve(arxiv: Annotated[str, typer.Argument(help="The suggestion's arXiv number.")], home: Home = None) -> None:
    """Announce that a suggested paper will come.

    \b
    provenn web admin approve 2502.02040
    """
    _decide(arxiv, home, True)


@admin.command()
def decline(arxiv: Annotated[str, typer.Argument(help="The suggestion's arXiv number.")], home: Home = None) -> None:
    """Announce that a suggested paper will not come.

    \b
    provenn web admin decline 2502.02040
    """
    _decide(arxiv, home, False)


@admin.command()
def export(
    file: Annotated[
        Path, typer.Argument(help="File of JSON lines to write. An existing file is replaced once all is written.")
    ],
    home: Home = None,
) -> None:
    """Write all data of people to a file, one row in each line. The file is written completely or not at all.

    \b
    provenn web admin export rows.jsonl
    """
    check_output(file)
    with _database(home) as database:
        from provenn.web import accounts

        count = 0
        with (
            database.reading() as session,
            atomic_write(file, mode=0o600) as path,
            path.open("w", encoding="utf-8") as lines,
        ):
            for count, row in enumerate(accounts.every_row(session), start=1):  # noqa: B007
                lines.write(text_of.dumps(row, ensure_ascii=False) + "\n")
    log(f"{count} rows are in {file}")


@admin.command()
def delete(
    who: Annotated[str, typer.Argument(help="Mail address or number of a person.")],
    home: Home = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete a person and all their data, for good.

    SQLite's files keep none of it. PostgreSQL keeps deleted rows until its next vacuum, and its backups longer.

    \b
    provenn web admin delete ada@example.org
    """
    with _database(home) as database:
        from provenn.web import Settings, accounts, mail
        from provenn.web.addresses import spelled

        with database.reading() as session:
            person = accounts.find_person(session, who)
        email = person.email if person else spelled(who)
        if not yes:
            if not sys.stdin.isatty():
                raise UserError(f"nothing was deleted: give --yes to delete {email} without being asked")
            typer.confirm(f"Delete {email} with everything that is theirs?", abort=True)
        with database.erasing() as session:
            count = accounts.delete_person(session, email)
        count += mail.forget(Settings.read(home=home), email)  # after the rows of mails that would become files
    if not count:
        raise UserError(f"no person has the address or number {who!r}; `provenn web admin list people` names them all")
    log(f"{email} is deleted, with everything that was theirs")


@contextmanager
def _database(home: Path | None) -> "Iterator[Database]":
    """The catalogue's database, which must be there."""
    try:
        from provenn.web import Settings
        from provenn.web.database import Database
    except ModuleNotFoundError as error:
        raise UserError(f"{NEEDED} (there is no {error.name})") from None
    settings = Settings.read(home=home)
    if not settings.database_url and not (settings.home / "catalogue.db").is_file():
        raise UserError(f"no catalogue in {settings.home}: give --home or DATABASE_URL, as for `provenn web serve`")
    database = Database(settings.database)
    try:
        database.migrate()
        yield database
    finally:
        database.close()


def _cell(value: Any) -> str:
    return "" if value is None else ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _set_hidden(number: int, home: Path | None, hidden: bool) -> None:
    with _database(home) as database:
        from provenn.web import models, opinions

        with database.session() as session:
            if not 0 < number <= models.MOST or not opinions.hide(session, number, hidden):
                raise UserError(f"there is no comment {number}; `provenn web admin list comments` names them all")
    log(f"comment {number} is {'hidden' if hidden else 'shown'}")


def _decide(arxiv: str, home: Path | None, approved: bool) -> None:
    with _database(home) as database:
        from provenn.web import opinions

        number = opinions.canonical_number(arxiv)
        with database.session() as session:
            if not opinions.decide(session, number, approved):
                raise UserError(f"nobody suggested {number}; `provenn web admin list suggestions` names them all")
    log(f"arXiv:{number} is {'approved' if approved else 'declined'}")

"""What every page is made from, and how: one object that lives as long as the application."""

import hashlib
import textwrap
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from threading import Event
from typing import Any, cast

import jinja2
from fastapi import Request, Response
from jinja2.runtime import Context
from markupsafe import Markup

from provenn import __version__
from provenn.evidence import view
from provenn.web import drawing, opinions, plots, readme, results, words
from provenn.web.catalogue import Catalogue, Entry
from provenn.web.database import Database
from provenn.web.keeping import Keep
from provenn.web.limits import Limits
from provenn.web.links import beside, file_of
from provenn.web.offers import LONGEST_PROMPT, offers_of
from provenn.web.settings import Settings
from provenn.web.uploads import UPLOADS

HERE = Path(__file__).parent
COLUMNS = 78  # of a plain mail


@dataclass(frozen=True)
class Site:
    """The catalogue, the database, the settings and the limits that all pages share.

    Args:
        settings: of the operator.
        database: what people left behind.
        catalogue: the papers.
        limits: on what one visitor may ask for.
        copied: whether pages are written as files, for hosts that run nothing: without people and demos, and with links
            from file to file.
        linked: every address that pages of a copy link to.
        pieces: parts of pages that follow from the catalogue alone; see `provenn.web.keeping`.
        outgoing: set when a mail was put in the outbox, and when it is to be looked at.
    """

    settings: Settings
    database: Database
    catalogue: Catalogue = field(default_factory=Catalogue)
    limits: Limits = field(default_factory=Limits)
    copied: bool = False
    linked: set[str] = field(default_factory=set)
    pieces: dict[object, str] = field(default_factory=dict)
    outgoing: Event = field(default_factory=Event)

    def counts(self) -> opinions.Counts:
        """How many votes and comments each paper has."""
        with self.database.reading() as session:
            return opinions.counts(session)

    def address(self, path: str) -> str:
        """The whole address of a page, for feeds and whatever else is no page."""
        return f"{self.settings.url}/{file_of(path)}" if self.copied else self.settings.url + path

    @cached_property
    def templates(self) -> jinja2.Environment:
        """The templates, with what all of them may use."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=lambda name: not (name or "").endswith(".txt"),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.do", Keep],
        )
        environment.filters |= {
            "slug": lambda words: str(words).replace(" ", "-"),
            "cell": view.cell,
            "plainly": words.plainly,
            "coded": words.coded,
            "wrapped": wrapped,
        }
        environment.globals |= {
            "site": self,
            "version": __version__,
            "view": view,
            "drawing": drawing,
            "amount": words.amount,
            "markdown": opinions.as_html,
            "plots": plots,
            "results": results,
            "offers_of": offers_of,
            "uploads": UPLOADS,
            "longest_prompt": LONGEST_PROMPT,
            "asset": jinja2.pass_context(lambda context, name: _link(context, asset(name))),
            "link": jinja2.pass_context(_link),
            "readme_of": jinja2.pass_context(_readme),
        }
        return environment

    def render(self, name: str, /, **context: Any) -> str:
        """A template as text."""
        return self.templates.get_template(name).render(**context)


def wrapped(text: str, first: str = "", later: str | None = None) -> str:
    """Lines of at most 78 columns, as plain mails have them; an address that is longer stands on a line of its own."""
    rest = " " * len(first) if later is None else later
    return textwrap.fill(
        " ".join(text.split()),
        COLUMNS,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _link(context: Context, address: str) -> str:
    """An address of this site as a page links to it: in a static copy, the way from its file to the other."""
    if not context["site"].copied:
        return address
    context["site"].linked.add(address)
    here = context["request"].url
    return beside(f"{here.path}?{here.query}" if here.query else here.path, address)


def _readme(context: Context, entry: Entry) -> Markup:
    """A paper's README, with its pictures where this site serves them."""
    return readme.of_folder(entry.card.folder, lambda name: _link(context, f"/papers/{entry.slug}/pictures/{name}"))


@cache
def asset(name: str) -> str:
    """The address of a file in `static/`, which changes with what is in it: browsers may keep it for ever."""
    return f"/static/{name}?{_digest((HERE / 'static' / name).read_bytes())}"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def site_of(request: Request) -> Site:
    """The site that a request came to."""
    return cast(Site, request.app.state.site)


def tagged(request: Request, response: Response, keep: str = "private, no-cache") -> Response:
    """The response with an ETag, or 304 without a body where the client has it already."""
    response.headers["Cache-Control"] = keep
    if response.status_code != 200:
        return response
    tag = f'"{_digest(bytes(response.body))}"'
    response.headers["ETag"] = tag
    known = {name.strip().removeprefix("W/") for name in request.headers.get("if-none-match", "").split(",")}
    if tag in known or "*" in known:
        return Response(status_code=304, headers={"ETag": tag, "Cache-Control": keep})
    return response

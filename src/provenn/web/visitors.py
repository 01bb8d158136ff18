"""Who reads a page, by a cookie that names a session; and whether a form that they post is ours."""

import secrets
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from typing import Annotated
from urllib.parse import quote, urlsplit

from fastapi import Depends, Form, HTTPException, Request, Response
from pydantic import AfterValidator

from provenn.web import accounts
from provenn.web.models import Person
from provenn.web.settings import Settings
from provenn.web.signing import signed, unsigned
from provenn.web.site import Site, site_of


def written(text: str) -> str:
    """A field of a form as text that every page and database takes: a form may name an encoding that has halves of
    characters.

    >>> written("a\\ud800b")
    'a?b'
    """
    return text.encode(errors="replace").decode()


Field = Annotated[str, Form(), AfterValidator(written)]
OURS = (None, "same-origin", "none")  # what a browser says of where a request comes from; None is said by old ones


class Visitor:
    """Somebody who reads a page.

    Args:
        secret: what their cookie carries; "" where they have none yet.
        person: the row of who is signed in; None for anybody.
    """

    def __init__(self, settings: Settings, secret: str = "", person: Person | None = None):
        self.secret, self.person = secret, person
        self.settings, self.fresh = settings, False

    @property
    def csrf(self) -> str:
        """Goes with every form, and belongs to the cookie: whoever has none yet gets one with the page."""
        if not self.secret:
            self.secret, self.fresh = secrets.token_urlsafe(32), True
        return signed(self.settings, "form", self.secret).removeprefix(f"{self.secret}.")

    def sent(self, csrf: str) -> bool:
        """Whether a form with that field came from a page of this visitor's."""
        return bool(self.secret) and unsigned(self.settings, "form", f"{self.secret}.{csrf}") == self.secret


def visitor_of(request: Request) -> Visitor:
    """Who sent a request, by their cookie."""
    if not hasattr(request.state, "visitor"):
        request.state.visitor = _visitor(request)
    visitor: Visitor = request.state.visitor
    return visitor


def _visitor(request: Request) -> Visitor:
    site = site_of(request)
    secret = unsigned(site.settings, "cookie", request.cookies.get(cookie_name(site), ""))
    if secret is None:
        return Visitor(site.settings)
    with site.database.reading() as session:
        return Visitor(site.settings, secret, accounts.person_of(session, secret))


def client_of(request: Request) -> str:
    """Who asks, as far as their network says."""
    return network_of(request.client.host if request.client else "")


def network_of(host: str) -> str:
    """An address, or the network that one household has of the longer kind."""
    with suppress(ValueError):
        number = ip_address(host)
        if isinstance(number, IPv6Address) and number.ipv4_mapped is None:
            return number.exploded[:19]
    return host


def cookie_name(site: Site) -> str:
    """The cookie's name; behind TLS one that no other host of the domain can set."""
    return "__Host-provenn" if site.settings.secure else "provenn"


def keep(request: Request, response: Response) -> None:
    """Give the visitor the cookie that a form on the page belongs to, where they had none."""
    visitor = visitor_of(request)
    if visitor.fresh:
        _give(site_of(request), response, visitor.secret, None)


def welcome(request: Request, response: Response, secret: str) -> None:
    """Give the cookie of a new session, whatever the browser had before."""
    _give(site_of(request), response, secret, accounts.SESSION_LASTS.days * 86_400)


def part(request: Request, response: Response) -> None:
    """Take the cookie back."""
    site = site_of(request)
    response.delete_cookie(cookie_name(site), httponly=True, samesite="lax", secure=site.settings.secure)


def _give(site: Site, response: Response, secret: str, seconds: int | None) -> None:
    value, secure = signed(site.settings, "cookie", secret), site.settings.secure
    response.set_cookie(cookie_name(site), value, seconds, path="/", httponly=True, samesite="lax", secure=secure)


def check_origin(request: Request) -> None:
    """Refuse a form that a browser says was sent from another site's page; 403."""
    hosts = request.headers.get("host"), urlsplit(site_of(request).settings.url).netloc
    known = {None, *(f"{scheme}://{host}" for host in hosts for scheme in ("http", "https"))}
    if request.headers.get("origin") not in known or request.headers.get("sec-fetch-site") not in OURS:
        raise HTTPException(403, "This form was sent from another site: open the page here and send it again.")


def posted(request: Request, csrf: Field = "") -> Visitor:
    """The visitor who posts a form, which must come from a page of ours that they read."""
    check_origin(request)
    visitor = visitor_of(request)
    if not visitor.sent(csrf):
        raise HTTPException(403, "This form is out of date: open the page again and send it from there.")
    return visitor


def posted_by_person(request: Request, visitor: Annotated[Visitor, Depends(posted)]) -> Person:
    """Who posts a form that wants somebody who is signed in; others are led to where they can."""
    if visitor.person is None:
        if "application/json" in request.headers.get("accept", ""):
            raise HTTPException(401, "Sign in first.")
        paper = request.path_params.get("name", "")
        raise HTTPException(303, "Sign in first.", {"Location": f"/sign-in?paper={quote(paper[:100], safe='')}"})
    return visitor.person

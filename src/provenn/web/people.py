"""What people do on the pages: sign in, vote, comment, suggest a paper, and see or delete what is theirs."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, Form, HTTPException, Path, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.routing import APIRoute
from sqlalchemy.orm import Session

from provenn.core.errors import UserError
from provenn.web import accounts, letters, mail, opinions, outbox, visitors
from provenn.web.addresses import address
from provenn.web.limits import TooOften
from provenn.web.listing import Listing
from provenn.web.models import MOST, Comment, Person
from provenn.web.outbox import Draft, Kind, Mailing
from provenn.web.pages import found
from provenn.web.rendering import page
from provenn.web.signing import signed, unsigned
from provenn.web.site import Site, site_of
from provenn.web.visitors import Field, Visitor, client_of, posted, posted_by_person, visitor_of, written

LARGEST_FORM = 64_000  # bytes
USED_UP = "This link has expired, or was used already: ask for another one below."


class SmallForms(APIRoute):
    """A route whose requests are refused unread where they are larger than any form of ours."""

    def get_route_handler(self) -> Callable:
        """The handler, behind a look at the length."""
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            length = request.headers.get("content-length", "0")
            if "transfer-encoding" in request.headers:
                raise HTTPException(411, "A form must say how long it is.")
            if not length.isdecimal() or len(length) > 12 or int(length) > LARGEST_FORM:
                raise HTTPException(413, f"A form has at most {LARGEST_FORM} bytes.")
            answer: Response = await handle(request)
            return answer

        return checked


router = APIRouter(route_class=SmallForms, default_response_class=HTMLResponse, tags=["people"])
Posted = Annotated[Visitor, Depends(posted)]
Someone = Annotated[Person, Depends(posted_by_person)]
Listed = Annotated[str | None, Form()]
Number = Annotated[int, Path(ge=1, le=MOST)]


def own(request: Request, template: str, **context: Any) -> Response:
    """A page that no browser keeps: it shows what is one person's alone."""
    response = page(request, template, **{"error": "", **context})
    response.headers["Cache-Control"] = "no-store"
    return response


def status_of(error: UserError) -> int:
    """What a refused form is answered with."""
    return 429 if isinstance(error, TooOften) else 422


def to(path: str) -> Response:
    """The way to a page, after a form was taken."""
    return RedirectResponse(path, 303)


def known_paper(request: Request, name: str) -> str:
    """The slug of a paper, and of anything else ""."""
    return name if name in site_of(request).catalogue else ""


@router.get("/sign-in", include_in_schema=False)
def sign_in(request: Request, paper: str = "") -> Response:
    """Where to ask for a link."""
    if visitor_of(request).person:
        return to("/me")
    return own(request, "sign_in.html", paper=known_paper(request, paper), email="")


def write_link(known: bool, session: Session, site: Site, mailing: Mailing) -> Draft | None:
    """The mail with a link that signs in; None where one that went before is enough.

    Args:
        known: whether it goes to those alone who have signed in before.
        session, site, mailing: as every kind of mail has them.
    """
    lasts = accounts.link_lasts(session, mailing.email)
    if mailing.tries:  # what went before may be this very mail, with a link that nobody has
        lasts = lasts or accounts.LINK_LASTS
    if lasts is None or (known and accounts.find_person(session, mailing.email) is None):
        return None
    link, secret = accounts.new_link(mailing.email, mailing.about, lasts)
    where = f"{site.settings.url}/sign-in/{signed(site.settings, 'sign-in', secret)}"
    name, context = outbox.identifier(site, mailing), {"address": where, "lasts": in_words(lasts)}
    return Draft(letters.compose(site, mailing.email, "sign_in", name, mailing.made, **context), link)


def in_words(span: timedelta) -> str:
    """A span in minutes or, where it is whole ones, hours.

    >>> in_words(timedelta(minutes=30)), in_words(timedelta(hours=2))
    ('30 minutes', '2 hours')
    """
    minutes = int(span.total_seconds() / 60)
    number, unit = (minutes, "minute") if minutes % 60 else (minutes // 60, "hour")
    return f"{number} {unit}" + "s" * (number > 1)


SIGN_IN, SIGN_IN_KNOWN = (
    outbox.register(
        Kind(name, 0, accounts.LINK_LASTS, partial(write_link, name == "known"), tidy=accounts.forget_links)
    )
    for name in ("sign-in", "known")
)


@router.post("/sign-in")
def send_link(request: Request, visitor: Posted, email: Field = "", paper: Field = "") -> Response:
    """Have a link sent to an address, whether anybody is known by it or not: nothing here looks."""
    site, paper = site_of(request), known_paper(request, paper)
    kind, status, error = SIGN_IN, 200, ""
    try:
        whom = address(email)
        try:
            site.limits.links_for.spend(client_of(request), "links asked for from here")
        except TooOften as often:
            site.limits.links_known.spend(client_of(request), "links asked for from here")
            kind, status = SIGN_IN_KNOWN, 429
            error = f"{often}. Where somebody has signed in here by this address before, a link is on its way to it."
    except UserError as refused:
        status, error = status_of(refused), str(refused)
        return own(request, "sign_in.html", status=status, error=error, paper=paper, email=email[:300])
    with site.database.session() as session:
        outbox.put(session, kind, whom, paper)
    site.outgoing.set()
    if error:
        return own(request, "sign_in.html", status=status, error=error, paper=paper, email=whom)
    return own(request, "sign_in_sent.html", email=whom, to_folder=not site.settings.smtp)


@router.get("/sign-in/{token}", include_in_schema=False)
def show_link(request: Request, token: str) -> Response:
    """What a link leads to: a button. Programs that look into mails follow links, and would use this one up."""
    site = site_of(request)
    secret = unsigned(site.settings, "sign-in", token)
    with site.database.reading() as session:
        link = accounts.usable_link(session, secret) if secret else None
    if link is None:
        return own(request, "sign_in.html", status=410, error=USED_UP, paper="", email="")
    return own(request, "sign_in_link.html", token=token, email=link.email)


@router.post("/sign-in/{token}")
def use_link(request: Request, token: str, visitor: Posted) -> Response:
    """Sign in by a link. The browser gets a new cookie, whatever it had; the session that it had ends."""
    site = site_of(request)
    secret = unsigned(site.settings, "sign-in", token)
    with site.database.session() as session:
        came = accounts.sign_in(session, secret) if secret else None
        if came:
            accounts.end_session(session, visitor.secret)
    if came is None:
        return own(request, "sign_in.html", status=410, error=USED_UP, paper="", email="")
    response = to(f"/me?new=yes&paper={came.paper}" if came.new else f"/papers/{came.paper}" if came.paper else "/")
    visitors.welcome(request, response, came.secret)
    return response


@router.post("/sign-out")
def sign_out(request: Request, visitor: Posted, everywhere: Field = "") -> Response:
    """End this session, or all of this person's."""
    with site_of(request).database.session() as session:
        accounts.end_session(session, visitor.secret)
        if everywhere and visitor.person:
            accounts.end_sessions(session, visitor.person.id)
    response = to(f"/sign-in?said={'everywhere' if everywhere else 'out'}")
    visitors.part(request, response)
    return response


@router.get("/me", include_in_schema=False)
def me(request: Request, paper: str = "") -> Response:
    """What is one's own."""
    person = visitor_of(request).person
    return mine(request, person, paper) if person else to("/sign-in")


def mine(request: Request, person: Person, paper: str = "", name: str | None = None, **context: Any) -> Response:
    """The page of what is one's own; where a form on it was refused, with what was in it."""
    site = site_of(request)
    with site.database.reading() as session:
        voted = opinions.votes_by(session, person.id)
        comments = opinions.comments_by(session, person.id)
        suggested = opinions.suggested_by(session, person.id)
        suggestions = [row for row in opinions.suggestions(session) if row.arxiv in suggested]
    return own(
        request,
        "me.html",
        person=person,
        chosen=name if name is not None else person.name or "",
        new="new" in request.query_params,
        paper=known_paper(request, paper),
        voted=[entry for entry in site.catalogue.values() if entry.slug in voted],
        comments=comments,
        suggestions=suggestions,
        **context,
    )


@router.post("/me/name")
def rename(request: Request, person: Someone, name: Field = "", paper: Field = "") -> Response:
    """Be called by another name."""
    site, paper = site_of(request), known_paper(request, paper)
    try:
        site.limits.names.spend(person.id, "changes of a name")
        with site.database.erasing() as session:
            accounts.rename(session, person.id, name)
    except UserError as error:
        return mine(request, person, paper, name[:200], status=status_of(error), error=str(error))
    return to(f"/papers/{paper}" if paper else "/me?said=name")


@router.get("/me/data.json", include_in_schema=False)
def data(request: Request) -> Response:
    """Everything that is kept of who asks, as a file."""
    person = visitor_of(request).person
    if person is None:
        return to("/sign-in")
    with site_of(request).database.reading() as session:
        everything = accounts.everything_of(session, person)
    headers = {"Content-Disposition": 'attachment; filename="provenn.json"', "Cache-Control": "no-store"}
    return JSONResponse(everything, headers=headers)


@router.post("/me/delete")
def delete(request: Request, person: Someone, confirm: Field = "") -> Response:
    """Delete one's account, with everything that is one's own."""
    if confirm != "yes":
        return mine(request, person, status=422, error="nothing was deleted: tick the box that confirms it first")
    site = site_of(request)
    with site.database.erasing() as session:
        accounts.delete_person(session, person.email)
    mail.forget(site.settings, person.email)  # after the rows of mails that would become files
    response = to("/sign-in?said=deleted")
    visitors.part(request, response)
    return response


@router.post("/papers/{name}/vote")
def vote(request: Request, name: str, person: Someone, wanted: Field = "yes", shown: Listed = None) -> Response:
    """Vote for a paper, or take the vote back (`wanted=no`).

    Args:
        shown: the query string of the list that the form stood on, to which a browser without scripts goes back.
    """
    entry = found(request, name)
    site = site_of(request)
    try:
        site.limits.votes.spend(person.id, "votes")
    except TooOften as error:
        raise HTTPException(429, str(error)) from None
    with site.database.session() as session:
        count = opinions.vote(session, person.id, entry.slug, wanted != "no")
    if "application/json" in request.headers.get("accept", ""):
        return JSONResponse({"votes": count, "voted": wanted != "no"})
    if shown is None:
        return to(f"/papers/{entry.slug}")
    return to(f"/{Listing.of(dict(parse_qsl(written(shown).removeprefix('?')))).query}#p-{entry.slug}")


def draft(request: Request, slug: str, action: str, text: str, error: UserError) -> Response:
    """A comment that was refused, so that it is not lost."""
    entry, status = found(request, slug), status_of(error)
    return own(request, "comment.html", status=status, entry=entry, action=action, text=text, error=str(error))


@router.post("/papers/{name}/comments")
def comment(request: Request, name: str, person: Someone, text: Field = "") -> Response:
    """Write under a paper."""
    entry, site = found(request, name), site_of(request)
    try:
        opinions.checked(text)
        site.limits.comments.spend(person.id, "comments")
        with site.database.session() as session:
            number = opinions.comment(session, person.id, entry.slug, text)
    except UserError as error:
        return draft(request, entry.slug, f"/papers/{entry.slug}/comments", text, error)
    return to(f"/papers/{entry.slug}#comment-{number}")


@router.post("/comments/{number}/edit")
def edit(request: Request, number: Number, person: Someone, text: Field = "", paper: Field = "") -> Response:
    """Change a comment of one's own."""
    site = site_of(request)
    try:
        opinions.checked(text)
        site.limits.comments.spend(person.id, "comments")
        with site.database.erasing() as session:
            row = opinions.edit(session, person.id, number, text)
    except UserError as error:
        return draft(request, paper, f"/comments/{number}/edit", text, error)
    return to(f"/papers/{existing(row).paper}#comment-{number}")


@router.post("/comments/{number}/delete")
def remove(request: Request, number: Number, person: Someone) -> Response:
    """Delete a comment of one's own."""
    with site_of(request).database.erasing() as session:
        row = opinions.remove(session, person.id, number)
    return to(f"/papers/{existing(row).paper}?said=removed#comments")


@router.post("/comments/{number}/report")
def report(request: Request, number: Number, person: Someone, reason: Field = "") -> Response:
    """Report to the operator somebody else's comment."""
    site = site_of(request)
    try:
        site.limits.reports.spend(person.id, "reports")
    except TooOften as error:
        raise HTTPException(429, str(error)) from None
    with site.database.session() as session:
        row = opinions.report(session, person.id, number, reason)
    return to(f"/papers/{existing(row).paper}?said=reported#comments")


def existing(row: Comment | None) -> Comment:
    """The comment, or 404."""
    if row is None:
        raise HTTPException(404, "There is no such comment, or it is not for you to change.")
    return row


@router.get("/suggestions", include_in_schema=False)
def suggestions(request: Request) -> Response:
    """What readers would like to see here."""
    return suggested(request)


def suggested(request: Request, arxiv: str = "", **context: Any) -> Response:
    """The page of suggestions; where one was refused, with what was in the form."""
    site = site_of(request)
    person = visitor_of(request).person
    with site.database.reading() as session:
        rows = opinions.suggestions(session)
        own_ones = opinions.suggested_by(session, person.id) if person else set()
    there = {row.arxiv: entry for row in rows if (entry := site.catalogue.named(row.arxiv))}
    more = {"rows": rows, "mine": own_ones, "there": there, "arxiv": arxiv, "entry": None}
    return own(request, "suggestions.html", **{**more, **context})


@router.post("/suggestions")
def suggest(request: Request, person: Someone, arxiv: Field = "") -> Response:
    """Suggest a paper by its arXiv number; of one that is here already, the way to it."""
    site = site_of(request)
    try:
        number = opinions.canonical_number(arxiv)
        if entry := site.catalogue.named(number):
            return suggested(request, arxiv[:200], entry=entry)
        site.limits.suggestions.spend(person.id, "suggestions")
    except UserError as error:
        return suggested(request, arxiv[:200], status=status_of(error), error=str(error))
    with site.database.session() as session:
        new = opinions.suggest(session, person.id, number)
    return to(f"/suggestions?said={'suggested' if new else 'before'}")

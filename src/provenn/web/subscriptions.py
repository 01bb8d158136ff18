"""Who gets the digest: asked for by an address, confirmed by a link in a mail, and ended by one click.

No answer here depends on whether an address is known: who asks for a digest that they have gets the same mail, whose
link then changes how often it comes. Two kinds of links go out, both signed. The one that confirms works once, within
two days; the one that every digest carries does not expire, and is valid for that one subscription alone.
"""

import secrets
from datetime import date, datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Form, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from sqlalchemy import Date, String, delete, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from provenn.core.errors import UserError
from provenn.web import letters, news, outbox
from provenn.web.accounts import added, digest, next_lasts
from provenn.web.addresses import address
from provenn.web.models import EMAIL, SUBSCRIPTION, Base, Moment, SubscriptionLink, now
from provenn.web.outbox import Draft, Kind, Mailing
from provenn.web.people import Posted, SmallForms, own, status_of
from provenn.web.signing import signed, unsigned
from provenn.web.site import Site, site_of
from provenn.web.visitors import Field, client_of, visitor_of

Often = Literal["daily", "weekly"]
FREQUENCIES: tuple[Often, ...] = ("daily", "weekly")
LASTS = timedelta(days=2)
EXPIRED = "This link has expired, or was used already: ask for another one below."
ENDED = "This subscription has ended: no mail comes any more. It begins again below, where you want it to."


class Subscription(Base):
    """Somebody who gets the digest.

    Args:
        id: drawn, so that the links of one that has ended are never valid for another.
        often: daily or weekly.
        considered: the last day on which it was decided whether they get one.
        seen: the number of the last change that they were sent.
    """

    __tablename__ = "subscriptions"

    id: Mapped[str] = mapped_column(String(SUBSCRIPTION), primary_key=True)
    email: Mapped[str] = mapped_column(String(EMAIL), unique=True)
    often: Mapped[str] = mapped_column(String(SUBSCRIPTION))
    considered: Mapped[date] = mapped_column(Date)
    seen: Mapped[int]
    made: Mapped[datetime] = mapped_column(Moment, default=now)


def forget(session: Session, email: str) -> None:
    """Delete all that the digest keeps of an address; what is planned or was sent goes with the subscription."""
    session.execute(delete(Mailing).where(Mailing.email == email, Mailing.kind == CONFIRM.name))
    session.execute(delete(Subscription).where(Subscription.email == email))
    session.execute(delete(SubscriptionLink).where(SubscriptionLink.email == email))


def new_link(email: str, often: str) -> tuple[SubscriptionLink, str]:
    """A link that subscribes an address, and its secret, which is kept nowhere."""
    secret = secrets.token_urlsafe(18)
    return SubscriptionLink(digest=digest(secret), email=email, often=often), secret


def write_link(session: Session, site: Site, mailing: Mailing) -> Draft | None:
    """The mail with a link that confirms; None where one that went before is enough (see `provenn.web.accounts`)."""
    lately = SubscriptionLink.email == mailing.email, SubscriptionLink.often == mailing.about
    made = session.scalars(select(SubscriptionLink.made).where(*lately, SubscriptionLink.made > now() - LASTS)).all()
    if not mailing.tries and next_lasts([(moment, moment + LASTS) for moment in made], LASTS, LASTS) is None:
        return None
    link, secret = new_link(mailing.email, mailing.about)
    where = f"{site.settings.url}/subscribe/{signed(site.settings, 'subscribe', secret)}"
    name, context = outbox.identifier(site, mailing), {"address": where, "often": mailing.about, "days": LASTS.days}
    return Draft(letters.compose(site, mailing.email, "subscribe", name, mailing.made, **context), link)


def forget_links(session: Session) -> None:
    """Delete the rows of links that have expired."""
    session.execute(delete(SubscriptionLink).where(SubscriptionLink.made < now() - LASTS))


CONFIRM = outbox.register(Kind("subscribe", 1, timedelta(days=1), write_link, tidy=forget_links))


def usable_link(session: Session, secret: str) -> SubscriptionLink | None:
    """The link with that secret; None where it has expired, was used or never was."""
    return session.scalar(select(SubscriptionLink).where(*_usable(secret)))


def _usable(secret: str) -> tuple:
    return SubscriptionLink.digest == digest(secret), SubscriptionLink.made > now() - LASTS


def subscribe(session: Session, site: Site, secret: str) -> Subscription | None:
    """Use a link: its address gets the digest from tomorrow on, as often as the link says. None where it is not usable.

    Two who use one link at the same moment delete one row, and the second finds none.
    """
    taken = delete(SubscriptionLink).where(*_usable(secret))
    link = session.execute(taken.returning(SubscriptionLink.email, SubscriptionLink.often)).one_or_none()
    if link is None:
        return None
    news.observe(session, site.catalogue)
    seen, today = news.latest(session), now().date()
    key = secrets.token_urlsafe(9)
    added(session, Subscription(id=key, email=link.email, often=link.often, considered=today, seen=seen))
    subscription = session.scalars(select(Subscription).where(Subscription.email == link.email)).one()
    subscription.often = link.often
    return subscription


def address_of(site: Site, subscription: Subscription) -> str:
    """The page on which a subscription is changed or ended, as every mail links to it."""
    return f"{site.settings.url}/subscription/{signed(site.settings, 'subscription', subscription.id)}"


router = APIRouter(route_class=SmallForms, default_response_class=HTMLResponse, tags=["digest"])


@router.get("/subscribe", include_in_schema=False)
def ask(request: Request) -> Response:
    """Where to ask for the digest."""
    person = visitor_of(request).person
    return own(request, "subscribe.html", email=person.email if person else "", often="weekly")


@router.post("/subscribe")
def send_link(
    request: Request, visitor: Posted, email: Field = "", often: Annotated[Often, Form()] = "weekly"
) -> Response:
    """Have a link sent that confirms a subscription of an address, whether it has one or not: nothing here looks."""
    site = site_of(request)
    try:
        to = address(email)
        site.limits.links_for.spend(client_of(request), "links asked for from here")
    except UserError as error:
        return own(
            request, "subscribe.html", status=status_of(error), error=str(error), email=email[:EMAIL], often=often
        )
    with site.database.session() as session:
        outbox.put(session, CONFIRM, to, often)
    site.outgoing.set()
    return own(request, "subscribe_sent.html", email=to, often=often, days=LASTS.days, to_folder=not site.settings.smtp)


@router.get("/subscribe/{token}", include_in_schema=False)
def show_link(request: Request, token: str) -> Response:
    """What a link that confirms leads to: a button. Programs that look into mails follow links, and none has asked."""
    site = site_of(request)
    secret = unsigned(site.settings, "subscribe", token)
    with site.database.reading() as session:
        link = usable_link(session, secret) if secret else None
    if link is None:
        return own(request, "subscribe.html", status=410, error=EXPIRED, email="", often="weekly")
    return own(request, "subscribe_link.html", token=token, email=link.email, often=link.often)


@router.post("/subscribe/{token}")
def use_link(request: Request, token: str, visitor: Posted) -> Response:
    """Begin a subscription, or change how often it comes, by a link."""
    site = site_of(request)
    secret = unsigned(site.settings, "subscribe", token)
    with site.database.session() as session:
        subscription = subscribe(session, site, secret) if secret else None
    if subscription is None:
        return own(request, "subscribe.html", status=410, error=EXPIRED, email="", often="weekly")
    return _managed(request, subscription, "You are subscribed.")


@router.get("/subscription/{token}", include_in_schema=False)
def show(request: Request, token: str) -> Response:
    """A subscription, to be changed or ended by whoever has its link."""
    with site_of(request).database.reading() as session:
        subscription = _of_token(request, session, token)
    return _ended(request) if subscription is None else _managed(request, subscription)


@router.post("/subscription/{token}")
def change(request: Request, token: str, visitor: Posted, often: Annotated[Often, Form()]) -> Response:
    """Change how often a digest comes."""
    with site_of(request).database.session() as session:
        subscription = _of_token(request, session, token)
        if subscription is not None:
            subscription.often = often
    return _ended(request) if subscription is None else _managed(request, subscription, f"It comes {often} now.")


@router.get("/subscription/{token}/leave", include_in_schema=False)
def show_leave(request: Request, token: str) -> Response:
    """A button that ends a subscription."""
    with site_of(request).database.reading() as session:
        subscription = _of_token(request, session, token)
    if subscription is None:
        return _ended(request)
    return own(request, "subscription_leave.html", token=token, email=subscription.email, often=subscription.often)


@router.post("/subscription/{token}/leave")
def leave(request: Request, token: str) -> Response:
    """End a subscription at once. Mail programs post here by themselves (RFC 8058): the token is all they need."""
    with site_of(request).database.erasing() as session:
        subscription = _of_token(request, session, token)
        if subscription is not None:
            forget(session, subscription.email)
    return own(request, "subscription_left.html")


def _of_token(request: Request, session: Session, token: str) -> Subscription | None:
    """The subscription of a link; None where it has ended."""
    key = unsigned(site_of(request).settings, "subscription", token)
    if key is None:
        raise HTTPException(404, "This link is not whole: copy all of it from the mail.")
    return session.get(Subscription, key)


def _managed(request: Request, subscription: Subscription, said: str = "") -> Response:
    token = signed(site_of(request).settings, "subscription", subscription.id)
    return own(request, "subscription.html", token=token, email=subscription.email, often=subscription.often, said=said)


def _ended(request: Request) -> Response:
    return own(request, "subscribe.html", status=410, error=ENDED, email="", often="weekly")

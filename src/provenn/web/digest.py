"""The digest: who gets one is planned in one transaction, and `provenn.web.outbox` sends it once a person and day.

A digest is a row of the outbox, unique by subscription and day, which stays when it has gone. It goes at most once.
Where a server was killed between the claim and the mail server's answer, or the mail server gave none, nobody can know
whether it went, and it is not sent again. What was in it is repeated in the person's next digest, since
`Subscription.seen` moves on with a digest that went, and with nothing else: no news is lost.

A day whose mails could not go (the mail server is down) is not lost either. The rows wait, and on a later day the new
mail takes over (`LATE`), with all since the last that went.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from threading import Event, Thread

from sqlalchemy import and_, delete, or_, select, update
from sqlalchemy.orm import Session

from provenn.core.errors import UserError
from provenn.web import letters, news, outbox
from provenn.web.letters import Letter
from provenn.web.models import now
from provenn.web.news import News
from provenn.web.outbox import LATE, PLANNED, Draft, Kind, Mailing, Tally
from provenn.web.signing import signed
from provenn.web.site import Site
from provenn.web.subscriptions import FREQUENCIES, Subscription, address_of

LOG = logging.getLogger(__name__)
KEPT = timedelta(days=90)  # for which rows of digests stay
LASTS = timedelta(days=4)  # within which a digest goes; then the next one has its news
AGAIN = timedelta(minutes=10)  # after which the server's own clock looks again
LEAVE_SECONDS = 2.0  # that a plan which is under way gets when the server ends


def a_day(day: date) -> date:
    """A day for which digests can be sent; whoever was considered for a later one would get none until then.

    Raises:
        UserError: it is to come, or long past.
    """
    first, last = now().date() - KEPT, now().date() + timedelta(days=1)  # where it may be tomorrow already
    if not first <= day <= last:
        raise UserError(f"digests are sent for days from {first} to {last}, got {day}")
    return day


def plan(session: Session, site: Site, day: date, frequencies: Sequence[str] = FREQUENCIES) -> int:
    """Decide who gets a digest on a day, and with what; returns how many. In the same transaction the standings are
    written down as seen. Done again on the same day, it adds nobody but those who were not there before.

    A daily digest is due on each day, a weekly one on the first day from Monday on that is planned.
    """
    news.observe(session, site.catalogue)
    upto, moment = news.latest(session), now()
    monday = day - timedelta(days=day.weekday())
    since_when = {"daily": day, "weekly": monday}
    due = or_(*(and_(Subscription.often == o, Subscription.considered < since_when[o]) for o in frequencies))
    subscriptions = session.scalars(select(Subscription).where(due).order_by(Subscription.id).with_for_update()).all()
    older = and_(Mailing.state == PLANNED, Mailing.day < day)
    waiting = dict(session.execute(select(Mailing.subscription_id, Mailing.id).where(older)).tuples().all())
    late = [waiting[subscription.id] for subscription in subscriptions if subscription.id in waiting]
    worth = {seen: bool(news.between(session, site.catalogue, seen, upto)) for seen in {s.seen for s in subscriptions}}
    planned = [
        Mailing(
            kind=DIGEST.name,
            rank=DIGEST.rank,
            until=moment + LASTS,
            email=subscription.email,
            subscription_id=subscription.id,
            day=day,
            since=subscription.seen,
            upto=upto,
        )
        for subscription in subscriptions
        if worth[subscription.seen]
    ]
    for subscription in subscriptions:
        subscription.considered = day
    session.add_all(planned)
    session.flush()
    for number in late:
        outbox.move(session, number, PLANNED, LATE)
    session.execute(delete(Mailing).where(Mailing.day < day - KEPT))
    return len(planned)


def run(site: Site, day: date, frequencies: Sequence[str] = FREQUENCIES) -> Tally:
    """Plan a day, and send what is due of it and of the days before it that waited."""
    with site.database.session() as session:
        plan(session, site, day, frequencies)
    return outbox.deliver(site, [DIGEST.name])


def write(session: Session, site: Site, mailing: Mailing) -> Draft | None:
    """A digest as the outbox sends it; None where its subscription has ended."""
    subscription = session.get(Subscription, mailing.subscription_id)
    if subscription is None:
        return None
    changes = news.between(session, site.catalogue, mailing.since or 0, mailing.upto or 0)
    return Draft(letter(site, subscription, mailing, changes))


def was_sent(session: Session, mailing: Mailing) -> None:
    """Note the changes that a person has been sent."""
    heard = update(Subscription).where(Subscription.id == mailing.subscription_id)
    session.execute(heard.where(Subscription.seen < mailing.upto).values(seen=mailing.upto))


DIGEST = outbox.register(Kind("digest", 2, LASTS, write, kept=True, sent=was_sent))


def letter(site: Site, subscription: Subscription, mailing: Mailing, changes: News) -> Letter:
    """A digest as a mail, whose identifier and date are the same however often it is made."""
    page = address_of(site, subscription)
    assert mailing.day is not None  # every digest has one
    context = {"news": changes, "often": subscription.often, "day": mailing.day, "page": page, "url": site.settings.url}
    key = signed(site.settings, "mailing", f"{mailing.day:%Y%m%d}.{subscription.id}").rpartition(".")[2]
    more = {
        "List-Id": f"<digest.{letters.host_of(site.settings)}>",
        "List-Unsubscribe": f"<{page}/leave>",
        "List-Unsubscribe-Post": "List-Unsubscribe=One-Click",
    }
    name = f"{mailing.day:%Y%m%d}.{key}"
    return replace(letters.compose(site, subscription.email, "digest", name, mailing.made, **context), more=more)


def preview(site: Site, day: date, frequencies: Sequence[str] = FREQUENCIES) -> str:
    """What a day's run would send: how many mails, and the plain text of one of each kind. Nothing is kept of it."""
    with site.database.session() as session:
        plan(session, site, day, frequencies)
        mine = and_(Mailing.state == PLANNED, Mailing.day <= day, Subscription.often.in_(frequencies))
        rows = session.execute(select(Mailing, Subscription).join(Subscription).where(mine)).tuples().all()
        kinds: dict[tuple[str, int, int], list[tuple[Mailing, Subscription]]] = {}
        for mailing, subscription in rows:
            kinds.setdefault((subscription.often, mailing.since or 0, mailing.upto or 0), []).append(
                (mailing, subscription)
            )
        shown = []
        for (often, since, upto), pairs in sorted(kinds.items()):
            mailing, subscription = pairs[0]
            mail = letter(site, subscription, mailing, news.between(session, site.catalogue, since, upto))
            text = mail.text.replace(address_of(site, subscription), f"{site.settings.url}/subscription/…")
            count = f"{len(pairs)} {often} mail" + "s" * (len(pairs) > 1)
            shown.append(f"{count}: {mail.subject}\n\n{text}")
        session.rollback()
    return "\n".join(shown) or "nothing to send\n"


class Clock:
    """The server's own clock: a thread that plans each day's digests from `digest_at` on; the outbox sends them.

    A server that was off at that time plans when it is on again, on the same day. Several servers may have one each.
    """

    def __init__(self, site: Site):
        self.site = site
        self._stop = Event()
        self._thread = Thread(target=self._keep, name="digest", daemon=True)
        self._done: date | None = None

    def start(self) -> None:
        """Begin, where there is a time to send at."""
        if self.site.settings.digest_at:
            self._thread.start()

    def stop(self) -> None:
        """End after the plan that is being made."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(LEAVE_SECONDS)

    def _keep(self) -> None:
        pause = timedelta()
        while not self._stop.wait(pause.total_seconds()):
            try:
                self.tick(now())
                pause = self.wait(now())
            except Exception:  # a database that is away for a while ends no clock
                LOG.exception("the digest could not be planned; the next try is in %s", AGAIN)
                pause = AGAIN

    def wait(self, moment: datetime) -> timedelta:
        """How long until the next look; never long, so that a machine that slept is not late."""
        at = self._at(moment)
        return min(at - moment if moment < at else at + timedelta(days=1) - moment, AGAIN)

    def tick(self, moment: datetime) -> int:
        """Plan what is due at a moment; returns how many mails."""
        if moment < self._at(moment) or self._done == moment.date():
            return 0
        with self.site.database.session() as session:
            planned = plan(session, self.site, moment.date())
        self._done = moment.date()
        self.site.outgoing.set()
        return planned

    def _at(self, moment: datetime) -> datetime:
        return datetime.combine(moment.date(), time.fromisoformat(self.site.settings.digest_at), UTC)

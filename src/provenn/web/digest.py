"""The digest: who gets one is planned in one transaction, and each mail goes out once a person and day.

A mail is a row, unique by subscription and day, and moves between states in transactions of its own:

    planned ──claim──▸ handed ──the server's answer──▸ sent
       ▲ │                │ ├── refused for good ─────▸ refused
       │ └─ a later day's │ └── no answer ────────────▸ unknown
       │    takes over:   │
       │    late          │
       └── refused for now┘

The claim is one conditional update (planned → handed). It is made when the server has all of a mail but its end, so:

- killed while planned: the server never had the end, and has nothing. The next run sends the mail.
- killed after the server's answer, before `sent` is written: the row stays handed, and is never handed over again.
- killed between the claim and the answer: whether the server has the mail cannot be known in SMTP. The row stays
  handed, too: nobody gets a mail twice. After a while it is called unknown, and what was in it is told again in the
  person's next digest, since `Subscription.seen` moves on with `sent` alone: no news is lost. The span is that of three
  bytes and their answer.
- two runs at once, on one machine or two: the claim succeeds for one, and the other takes back its mail, unended.
- a mail's identifier is made from subscription and day. Mails that become files are named by it, so that there even a
  handed one is written again, and is one file.

A day whose mails could not go (the server is down) is not lost either: the rows wait for the next run, and on a later
day the new mail takes over, with all since the last that went.
"""

import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from email.message import EmailMessage
from email.utils import format_datetime
from threading import Event, Thread
from typing import cast

from sqlalchemy import Date, ForeignKey, String, UniqueConstraint, and_, delete, or_, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from provenn.errors import UserError
from provenn.web import mail, news
from provenn.web.mail import Down, Later, Lost, Outbox, Refused, Unknown
from provenn.web.models import Base, Moment, now
from provenn.web.news import News
from provenn.web.signing import signed
from provenn.web.site import Site
from provenn.web.subscriptions import FREQUENCIES, KEY, Subscription, address_of

PLANNED, HANDED, SENT, REFUSED, UNKNOWN, LATE = "planned", "handed", "sent", "refused", "unknown", "late"
LOG = logging.getLogger(__name__)
SAID = 400  # characters of what a server said
KEPT = timedelta(days=90)  # for which rows of mails stay
ANSWERED = timedelta(seconds=mail.END_SECONDS + 60)  # within which a run that lives has its answer
MOST_LOST = 3  # connections in a row, after which the server is left alone until the next run
AGAIN = timedelta(minutes=10)  # after which the server's own clock tries what is left


class Mailing(Base):
    """A digest to a person on a day: the changes after `since` up to `upto`.

    Args:
        state: see the module.
        said: why the server did not take it.
        moved: when it came to its state.
    """

    __tablename__ = "mailings"
    __table_args__ = (UniqueConstraint("subscription_id", "day"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(primary_key=True)
    subscription_id: Mapped[str] = mapped_column(String(KEY), ForeignKey("subscriptions.id", ondelete="CASCADE"))
    day: Mapped[date] = mapped_column(Date)
    since: Mapped[int]
    upto: Mapped[int]
    state: Mapped[str] = mapped_column(String(10), default=PLANNED, index=True)
    said: Mapped[str] = mapped_column(String(SAID), default="")
    made: Mapped[datetime] = mapped_column(Moment, default=now)
    moved: Mapped[datetime] = mapped_column(Moment, default=now)


class Elsewhere(Exception):
    """Another run has claimed a mail, or its subscription has ended."""


@dataclass
class Tally:
    """What became of a run's mails.

    Args:
        counts: mails by the state that they came to.
        troubles: what the server said, with the numbers of the rows.
        down: why no mail could go at all; "" where some could.
    """

    counts: Counter[str] = field(default_factory=Counter)
    troubles: list[str] = field(default_factory=list)
    down: str = ""

    def __str__(self) -> str:
        words = {
            SENT: "sent",
            REFUSED: "refused by the mail server",
            UNKNOWN: "of which it is not known whether the server has them: they are not sent again",
            PLANNED: "left for the next run",
        }
        shown = [f"{self.counts[state]} {said}" for state, said in words.items() if self.counts[state]]
        return ", ".join(shown) or "nothing to send"


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
    upto = news.latest(session)
    monday = day - timedelta(days=day.weekday())
    since_when = {"daily": day, "weekly": monday}
    due = or_(*(and_(Subscription.often == o, Subscription.considered < since_when[o]) for o in frequencies))
    subscriptions = session.scalars(select(Subscription).where(due).order_by(Subscription.id).with_for_update()).all()
    older = and_(Mailing.state == PLANNED, Mailing.day < day)
    waiting = dict(session.execute(select(Mailing.subscription_id, Mailing.id).where(older)).tuples().all())
    late = [waiting[subscription.id] for subscription in subscriptions if subscription.id in waiting]
    worth = {seen: bool(news.between(session, site.catalogue, seen, upto)) for seen in {s.seen for s in subscriptions}}
    planned = [
        Mailing(subscription_id=subscription.id, day=day, since=subscription.seen, upto=upto)
        for subscription in subscriptions
        if worth[subscription.seen]
    ]
    for subscription in subscriptions:
        subscription.considered = day
    session.add_all(planned)
    session.flush()
    for number in late:
        _move(session, number, PLANNED, LATE)
    session.execute(delete(Mailing).where(Mailing.day < day - KEPT))
    return len(planned)


def _move(session: Session, number: int, before: str, after: str, said: str = "") -> bool:
    """Bring a mail from one state to another; False where it is not in the first one."""
    moved = update(Mailing).where(Mailing.id == number, Mailing.state == before)
    return bool(
        session.execute(moved.values(state=after, said=said[:SAID], moved=now()).returning(Mailing.id)).one_or_none()
    )


def run(site: Site, day: date, frequencies: Sequence[str] = FREQUENCIES, stop: Event | None = None) -> Tally:
    """Plan a day and send what is planned, of this day and of those before it that waited.

    Args:
        stop: ends the run between two mails.
    """
    with site.database.session() as session:
        plan(session, site, day, frequencies)
    return deliver(site, day, frequencies, stop)


def deliver(site: Site, day: date, frequencies: Sequence[str] = FREQUENCIES, stop: Event | None = None) -> Tally:
    """Send every mail that is planned, in an order of chance, so that two runs at once seldom meet at one."""
    tally, left, lost = Tally(), 0, 0
    with Outbox(site.settings) as outbox:
        with site.database.session() as session:
            tally.counts[UNKNOWN] += _settle(session, outbox)
            mine = and_(Mailing.state == PLANNED, Mailing.day <= day, Subscription.often.in_(frequencies))
            numbers = list(session.scalars(select(Mailing.id).join(Subscription).where(mine)))
        random.shuffle(numbers)
        left = len(numbers)
        for number in numbers:
            if tally.down or (stop is not None and stop.is_set()):
                break
            try:
                state, said = _deliver(site, outbox, number)
                lost = 0
            except Lost as error:
                state, said, lost = PLANNED, str(error), lost + 1
                tally.down = said if lost == MOST_LOST else ""
            except Down as error:
                state, said, tally.down = PLANNED, "", str(error)
            left -= state != PLANNED
            if state not in (PLANNED, None):
                tally.counts[state] += 1
            if said:
                tally.troubles.append(f"mail {number}: {said}")
    tally.counts[PLANNED] = left
    return tally


def _settle(session: Session, outbox: Outbox) -> int:
    """What a killed run left handed: unknown from some time on, or planned again where a repeat does no harm."""
    left = select(Mailing.id).where(Mailing.state == HANDED)
    if not outbox.repeatable:
        left = left.where(Mailing.moved < now() - ANSWERED)
    after = PLANNED if outbox.repeatable else UNKNOWN
    moved = sum(_move(session, number, HANDED, after) for number in session.scalars(left).all())
    return 0 if outbox.repeatable else moved


def _deliver(site: Site, outbox: Outbox, number: int) -> tuple[str | None, str]:
    """Hand over one mail, and write down what became of it: its state, None where it is another run's; and why."""
    with site.database.reading() as session:
        mailing = session.get(Mailing, number)
        subscription = session.get(Subscription, mailing.subscription_id) if mailing else None
        if mailing is None or subscription is None or mailing.state != PLANNED:
            return None, ""
        told = news.between(session, site.catalogue, mailing.since, mailing.upto)
    claimed = False

    def claim() -> None:
        nonlocal claimed
        with site.database.session() as session:
            if not _move(session, number, PLANNED, HANDED):
                raise Elsewhere
        claimed = True

    state, said = SENT, ""
    try:
        outbox.send(letter(site, subscription, mailing, told), claim)
    except Elsewhere:
        return None, ""
    except Refused as error:
        state, said = REFUSED, str(error)
    except Unknown as error:
        state, said = UNKNOWN, str(error)
    except (Down, Lost) as error:
        if claimed:  # the server closed the connection instead of taking the mail
            with site.database.session() as session:
                _move(session, number, HANDED, PLANNED, str(error))
        raise
    except Later as error:
        state, said = PLANNED, str(error)
    with site.database.session() as session:
        moved = _move(session, number, HANDED if claimed else PLANNED, state, said)
        if moved and state == SENT:
            heard = update(Subscription).where(Subscription.id == mailing.subscription_id)
            session.execute(heard.where(Subscription.seen < mailing.upto).values(seen=mailing.upto))
    return state, said


def letter(site: Site, subscription: Subscription, mailing: Mailing, told: News) -> EmailMessage:
    """A digest as a mail, whose identifier and date are the same however often it is made."""
    page = address_of(site, subscription)
    context = {"news": told, "often": subscription.often, "day": mailing.day, "page": page, "url": site.settings.url}
    message = mail.compose(site, subscription.email, "digest", **context)
    identifier = signed(site.settings, "mailing", f"{mailing.day:%Y%m%d}.{subscription.id}").rpartition(".")[2]
    message.replace_header("Date", format_datetime(mailing.made))
    message.replace_header("Message-ID", f"<{mailing.day:%Y%m%d}.{identifier}@{mail.host_of(site.settings)}>")
    message["List-Id"] = f"<digest.{mail.host_of(site.settings)}>"
    message["List-Unsubscribe"] = f"<{page}/leave>"
    message["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    return message


def preview(site: Site, day: date, frequencies: Sequence[str] = FREQUENCIES) -> str:
    """What a day's run would send: how many mails, and the plain text of one of each kind. Nothing is kept of it."""
    with site.database.session() as session:
        plan(session, site, day, frequencies)
        mine = and_(Mailing.state == PLANNED, Mailing.day <= day, Subscription.often.in_(frequencies))
        rows = session.execute(select(Mailing, Subscription).join(Subscription).where(mine)).tuples().all()
        kinds: dict[tuple[str, int, int], list[tuple[Mailing, Subscription]]] = {}
        for mailing, subscription in rows:
            kinds.setdefault((subscription.often, mailing.since, mailing.upto), []).append((mailing, subscription))
        shown = []
        for (often, since, upto), pairs in sorted(kinds.items()):
            mailing, subscription = pairs[0]
            message = letter(site, subscription, mailing, news.between(session, site.catalogue, since, upto))
            body = cast(EmailMessage, message.get_body(("plain",)))
            text = body.get_content().replace(address_of(site, subscription), f"{site.settings.url}/subscription/…")
            count = f"{len(pairs)} {often} mail" + "s" * (len(pairs) > 1)
            shown.append(f"{count}: {message['Subject']}\n\n{text}")
        session.rollback()
    return "\n".join(shown) or "nothing to send\n"


class Clock:
    """The server's own clock: a thread that sends each day's digests from `digest_at` on, and tries again what is left.

    A server that was off at that time sends when it is on again, on the same day. Several servers may have one each.
    """

    def __init__(self, site: Site):
        self.site = site
        self._stop = Event()
        self._thread = Thread(target=self._keep, name="digest", daemon=True)
        self._tried: date | None = None
        self._done: date | None = None

    def start(self) -> None:
        """Begin, where there is a time to send at."""
        if self.site.settings.digest_at:
            self._thread.start()

    def stop(self) -> None:
        """End after the mail that is on its way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(mail.SECONDS)

    def _keep(self) -> None:
        while not self._stop.wait(self.wait(now()).total_seconds()):
            try:
                tally = self.tick(now())
            except Exception:  # a database that is away for a while ends no clock
                LOG.exception("the digest could not be sent; the next try is in %s", AGAIN)
                continue
            if tally is not None and (tally.down or tally.troubles):
                LOG.warning("digest: %s; %s", tally, tally.down or "; ".join(tally.troubles))

    def wait(self, moment: datetime) -> timedelta:
        """How long until the next look; never long, so that a machine that slept is not late."""
        at = datetime.combine(moment.date(), time.fromisoformat(self.site.settings.digest_at), UTC)
        if self._done == moment.date():
            at += timedelta(days=1)
        elif moment >= at:
            return AGAIN if self._tried == moment.date() else timedelta()
        return min(at - moment, AGAIN)

    def tick(self, moment: datetime) -> Tally | None:
        """Send what is due at a moment; None where nothing is."""
        at = datetime.combine(moment.date(), time.fromisoformat(self.site.settings.digest_at), UTC)
        if moment < at or self._done == moment.date():
            return None
        self._tried = moment.date()
        tally = run(self.site, moment.date(), stop=self._stop)
        if not tally.counts[PLANNED]:
            self._done = moment.date()
        return tally

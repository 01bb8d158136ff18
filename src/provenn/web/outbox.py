"""The outbox: every mail that is to go is a row, written in the transaction of what causes it, and sent by a thread.

No request speaks with a mail server: a silent or slow one delays mails and nothing else. A row moves between states in
transactions of its own:

    planned ──claim──▸ handed ──the server's answer──▸ sent
      ▲ ▲ │               │ ├── refused for good ─────▸ refused
      │ │ └ too late:     │ └── no answer ────────────▸ unknown, or planned again
      │ │   expired       │
      │ └ after a while ──┘ refused for now
      └── a lease that ran out

Who takes a row moves its `due` ahead by `LEASE`, so that no other server, thread or cron job begins with it meanwhile.
What makes a mail go once is the claim: one conditional update (planned → handed), made when the mail server has all of
a mail but its end. So:

- killed before the claim: the mail server has nothing. The row is due again when its lease ends.
- killed after the mail server's answer, or between the claim and the answer: the row stays handed. Nobody can know then
  whether the mail went. After `ANSWERED` the kind decides. A link is sent again, with the same Message-ID: at least
  once. A digest is not: at most once, and its news come with the next one.
- two who hold one row, since a lease ran out: the claim succeeds for one, and the other takes its mail back, unended.

No secret lies in the table. The link of a mail is drawn while the mail is written, and its digest is kept from the
claim on; each try has a link of its own. A row of a link is deleted once its mail went, was refused, or came too late.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from threading import Event, Thread

from sqlalchemy import Date, ForeignKey, Index, String, UniqueConstraint, delete, func, or_, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapped, Session, mapped_column

from provenn.core.errors import UserError
from provenn.web import mail
from provenn.web.letters import Letter, Unsound
from provenn.web.mail import Down, Later, Lost, Refused, Transport, Unknown
from provenn.web.models import EMAIL, PAPER, SUBSCRIPTION, Base, Moment, SignInLink, SubscriptionLink, now
from provenn.web.signing import signed
from provenn.web.site import Site

PLANNED, HANDED, SENT = "planned", "handed", "sent"
REFUSED, UNKNOWN, LATE, EXPIRED = "refused", "unknown", "late", "expired"
LOG = logging.getLogger(__name__)
SAID, WORD = 400, 10  # characters of what a server said, of a kind and of a state
LEASE = timedelta(seconds=mail.MAIL_SECONDS * 2 + mail.END_SECONDS + 60)  # longer than any mail takes
ANSWERED = timedelta(seconds=mail.END_SECONDS + 60)  # within which a server that lives has its answer
FIRST_RETRY, LAST_RETRY = timedelta(seconds=30), timedelta(hours=1)  # the wait doubles from one to the other
MOST_LOST = 3  # connections in a row, after which the mail server is left alone for a while
POLL = 5.0  # seconds between two looks for mails that others planned
FIRST_PAUSE, LAST_PAUSE = 5.0, 300.0  # seconds for which a mail server is left alone; doubled each time
LEAVE_SECONDS = 2.0  # that a mail which is under way gets when the server ends


class Mailing(Base):
    """A mail that is to go, or a digest that went.

    Args:
        kind: which of `KINDS` it is.
        email: whom it goes to.
        about: what its kind needs to write it, which is no secret.
        subscription_id, day: of a digest, whose it is and for which day: one a subscription and day.
        since, upto: of a digest, the numbers of the changes that it covers.
        rank: mails of a smaller one go first.
        due: it is not sent before; whoever takes it moves that ahead.
        until: it is not sent after.
        tries: how often it was handed over in vain.
        state: see the module.
        said: why the server did not take it.
        moved: when it came to its state.
    """

    __tablename__ = "mailings"
    __table_args__ = (
        UniqueConstraint("subscription_id", "day"),
        Index("ix_mailings_state_rank_due", "state", "rank", "due"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(WORD))
    email: Mapped[str] = mapped_column(String(EMAIL), index=True)
    about: Mapped[str] = mapped_column(String(PAPER), default="")
    subscription_id: Mapped[str | None] = mapped_column(
        String(SUBSCRIPTION), ForeignKey("subscriptions.id", ondelete="CASCADE")
    )
    day: Mapped[date | None] = mapped_column(Date)
    since: Mapped[int | None]
    upto: Mapped[int | None]
    rank: Mapped[int]
    due: Mapped[datetime] = mapped_column(Moment, default=now)
    until: Mapped[datetime] = mapped_column(Moment)
    tries: Mapped[int] = mapped_column(default=0)
    state: Mapped[str] = mapped_column(String(WORD), default=PLANNED)
    said: Mapped[str] = mapped_column(String(SAID), default="")
    made: Mapped[datetime] = mapped_column(Moment, default=now)
    moved: Mapped[datetime] = mapped_column(Moment, default=now)


@dataclass(frozen=True)
class Draft:
    """A mail as written for one try, and the row of the link in it, which is kept from the claim on."""

    letter: Letter
    link: SignInLink | SubscriptionLink | None = None


@dataclass(frozen=True)
class Kind:
    """What is common to the mails of a kind.

    Args:
        name: as in the table.
        rank: those of the smallest go first.
        lasts: it is given up after that long.
        write: makes the mail; None where none is to go any more.
        kept: whether its rows stay when it has gone. Then it goes at most once; otherwise at least once.
        sent: called in the transaction that writes down that it went.
        tidy: deletes what is no longer needed of its links.
    """

    name: str
    rank: int
    lasts: timedelta
    write: Callable[[Session, Site, Mailing], Draft | None]
    kept: bool = False
    sent: Callable[[Session, Mailing], None] = lambda session, mailing: None
    tidy: Callable[[Session], None] = lambda session: None


KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Make a kind known to those who send."""
    KINDS[kind.name] = kind
    return kind


def put(session: Session, kind: Kind, email: str, about: str = "") -> Mailing:
    """Plan a mail. It goes when the transaction is committed, at once where `Site.outgoing` is set after that."""
    mailing = Mailing(kind=kind.name, email=email, about=about, rank=kind.rank, until=now() + kind.lasts)
    session.add(mailing)
    return mailing


def identifier(site: Site, mailing: Mailing) -> str:
    """The first half of a Message-ID, which is the same at each try."""
    return f"{mailing.kind}.{signed(site.settings, 'mailing', str(mailing.id)).replace('.', '-')}"


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
            EXPIRED: "given up: they could not be sent in time",
            PLANNED: "left for the next try",
        }
        shown = [f"{self.counts[state]} {said}" for state, said in words.items() if self.counts[state]]
        return ", ".join(shown) or "nothing to send"


def deliver(
    site: Site, kinds: Collection[str] = (), stop: Event | None = None, transport: Transport | None = None
) -> Tally:
    """Send every mail that is due.

    Args:
        site: whose mails.
        kinds: names of `KINDS`; by default all.
        stop: ends the run between two mails.
        transport: what hands them over; by default one for this run.
    """
    tally, lost, kinds = Tally(), 0, kinds or KINDS
    if not _anything(site, kinds):
        return tally
    with transport or Transport(site.settings) as transport:
        _settle(site, transport, kinds, tally)
        while not tally.down and not (stop is not None and stop.is_set()):
            number = _take(site, kinds)
            if number is None:
                break
            try:
                state, said = _deliver(site, transport, number)
                lost = 0
            except Lost as error:
                state, said, lost = PLANNED, str(error), lost + 1
                tally.down = said if lost == MOST_LOST else ""
            except Down as error:
                state, said, tally.down = PLANNED, "", str(error)
            if state not in (PLANNED, None):
                tally.counts[state] += 1
            if said:
                tally.troubles.append(f"mail {number}: {said}")
    with site.database.reading() as session:
        tally.counts[PLANNED] = waiting(session, kinds)
    return tally


def waiting(session: Session, kinds: Collection[str]) -> int:
    """How many mails wait."""
    planned = select(func.count()).where(Mailing.state == PLANNED, Mailing.kind.in_(kinds))
    return session.scalar(planned) or 0


def summary(session: Session) -> str:
    """What is in the outbox, on one line for the operator."""
    rows = session.execute(
        select(Mailing.kind, func.count(), func.min(Mailing.made))
        .where(Mailing.state.in_((PLANNED, HANDED)))
        .group_by(Mailing.kind)
        .order_by(Mailing.kind)
    ).all()
    said = session.scalar(
        select(Mailing.said).where(Mailing.said != "").order_by(Mailing.moved.desc(), Mailing.id.desc()).limit(1)
    )
    if not rows:
        return "no mail waits"
    kinds = ", ".join(f"{count} {name}" for name, count, _ in rows)
    minutes = int((now() - min(made for _, _, made in rows)).total_seconds() // 60)
    words = f"{sum(count for _, count, _ in rows)} mails wait ({kinds}), the oldest for {minutes} minutes"
    return f"{words}; last trouble: {said}" if said else words


def _anything(site: Site, kinds: Collection[str]) -> bool:
    """Whether there is something to do: a look that waits for no writer."""
    moment = now()
    planned = (Mailing.state == PLANNED) & (Mailing.due <= moment)
    handed = (Mailing.state == HANDED) & (Mailing.moved < moment - ANSWERED)
    with site.database.reading() as session:
        found = select(Mailing.id).where(or_(planned, handed), Mailing.kind.in_(kinds)).limit(1)
        return session.scalar(found) is not None


def _settle(site: Site, transport: Transport, kinds: Collection[str], tally: Tally) -> None:
    """What a killed server left handed is sent again, or called unknown; what is too late is given up."""
    moment = now()
    with site.database.session() as session:
        left = select(Mailing).where(Mailing.state == HANDED, Mailing.moved < moment - ANSWERED)
        for mailing in session.scalars(left.where(Mailing.kind.in_(kinds))).all():
            again = transport.repeatable or not KINDS[mailing.kind].kept
            if move(session, mailing.id, HANDED, PLANNED if again else UNKNOWN, tries=mailing.tries + 1):
                tally.counts[UNKNOWN] += not again
        late = select(Mailing).where(Mailing.state == PLANNED, Mailing.until <= moment)
        for mailing in session.scalars(late.where(Mailing.kind.in_(kinds))).all():
            if _end(session, mailing, PLANNED, EXPIRED, mailing.said):
                tally.counts[EXPIRED] += 1
                tally.troubles.append(f"mail {mailing.id}: given up after {KINDS[mailing.kind].lasts}")
        for name in kinds:
            KINDS[name].tidy(session)


def _take(site: Site, kinds: Collection[str]) -> int | None:
    """The number of the next mail that is due, which is nobody else's for the time of a lease."""
    moment = now()
    due = select(Mailing.id).where(
        Mailing.state == PLANNED, Mailing.due <= moment, Mailing.until > moment, Mailing.kind.in_(kinds)
    )
    first = due.order_by(Mailing.rank, Mailing.due, Mailing.id).limit(1).with_for_update(skip_locked=True)
    leased = update(Mailing).where(Mailing.id == first.scalar_subquery()).values(due=moment + LEASE)
    with site.database.session() as session:
        return session.execute(leased.returning(Mailing.id)).scalar_one_or_none()


def move(session: Session, number: int, before: str, after: str, said: str = "", **more: object) -> bool:
    """Bring a mail from one state to another, due at once; False where it is not in the first one."""
    values = {"state": after, "said": said[:SAID], "moved": now(), "due": now(), **more}
    moved = update(Mailing).where(Mailing.id == number, Mailing.state == before).values(values)
    return session.execute(moved.returning(Mailing.id)).one_or_none() is not None


def _end(session: Session, mailing: Mailing, before: str, after: str, said: str) -> bool:
    """Bring a mail to its last state, which is no state at all where its kind keeps no rows."""
    if KINDS[mailing.kind].kept:
        return move(session, mailing.id, before, after, said)
    gone = delete(Mailing).where(Mailing.id == mailing.id, Mailing.state == before)
    return session.execute(gone.returning(Mailing.id)).one_or_none() is not None


class Elsewhere(Exception):
    """Another has claimed a mail, or its row is gone with whom it was for."""


def _deliver(site: Site, transport: Transport, number: int) -> tuple[str | None, str]:
    """Hand over one mail, and write down what became of it: its state, None where none is to go; and why."""
    with site.database.reading() as session:
        mailing = session.get(Mailing, number)
        if mailing is None:
            return None, ""
        try:
            draft, said = KINDS[mailing.kind].write(session, site, mailing), ""
        except UserError as error:  # an address that is none
            draft, said = None, str(error)
    if draft is None:
        with site.database.session() as session:
            _end(session, mailing, PLANNED, REFUSED, said)
        return (REFUSED if said else None), said
    link, claimed = draft.link, False

    def claim() -> None:
        nonlocal claimed
        with site.database.session() as session:
            if not move(session, number, PLANNED, HANDED):
                raise Elsewhere
            if link is not None:
                session.add(link)
        claimed = True

    state, there, failed = SENT, True, None
    try:
        transport.send(draft.letter, claim)
    except Elsewhere:
        return None, ""
    except Unknown as error:
        again = transport.repeatable or not KINDS[mailing.kind].kept
        state, said = PLANNED if again else UNKNOWN, str(error)
    except (Refused, Unsound) as error:
        state, said, there = REFUSED, str(error), False
    except (Down, Later) as error:
        state, said, there, failed = PLANNED, str(error), False, error
    before = HANDED if claimed else PLANNED
    with site.database.session() as session:
        if claimed and link is not None and not there:  # nobody has it
            session.execute(delete(type(link)).where(type(link).digest == link.digest))
        if isinstance(failed, Down):
            move(session, number, before, PLANNED, said)
        elif state == PLANNED:
            wait = min(FIRST_RETRY * 2 ** min(mailing.tries, 10), LAST_RETRY)
            move(session, number, before, PLANNED, said, due=now() + wait, tries=mailing.tries + 1)
        elif _end(session, mailing, before, state, said):
            if state == SENT:
                KINDS[mailing.kind].sent(session, mailing)
        elif state == SENT and transport.repeatable and session.get(Mailing, number) is None:
            mail.forget(site.settings, mailing.email)  # they deleted their account before this file was there
    if isinstance(failed, (Down, Lost)):
        raise failed
    return state, said


class Sender:
    """The thread of a server that sends what is in the outbox. Several servers may have one each."""

    def __init__(self, site: Site):
        self.site = site
        self.transport = Transport(site.settings)
        self._stop = Event()
        self._thread = Thread(target=self._run, name="outbox", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the mail that is under way; where the mail server takes long over it, in the middle of it."""
        self._stop.set()
        self.site.outgoing.set()
        if self._thread.is_alive():
            self._thread.join(LEAVE_SECONDS)
            self.transport.leave()
            self._thread.join(LEAVE_SECONDS)

    def _run(self) -> None:
        pause = 0.0
        while not self._stop.is_set():
            try:
                tally = deliver(self.site, stop=self._stop, transport=self.transport)
            except DBAPIError as error:  # whose own words have the rows in them
                tally = Tally(down=f"the database: {str(error.orig).partition(chr(10))[0][:SAID]}")
            except Exception:  # one mail that cannot be written ends no other; its lease keeps it away for a while
                LOG.exception("outbox: a mail could not be written")
                self._stop.wait(FIRST_PAUSE)
                continue
            if self._stop.is_set():
                break
            for trouble in tally.troubles:
                LOG.warning("outbox: %s", trouble)
            pause = min(2 * pause or FIRST_PAUSE, LAST_PAUSE) if tally.down else 0.0
            if pause:
                LOG.warning("outbox: %d mails wait for %.0f seconds: %s", tally.counts[PLANNED], pause, tally.down)
                self._stop.wait(pause)
            else:
                self.site.outgoing.wait(POLL)
            self.site.outgoing.clear()

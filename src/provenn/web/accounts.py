"""Who people are: links to sign in by, sessions, names, and all that is somebody's. Nothing here knows of HTTP.

Anybody may ask for a link to any address, so that two things are guarded against. They are a stranger who floods a
mailbox, and a stranger who locks its owner out by asking until no link is sent any more. `link_lasts` keeps to one rule
for both. A mail is left out only while a link that went before still works for half its time or longer, and nobody has
used it. So the owner has a link at every moment, or gets one by asking. After `FREE` links that nobody used, each lasts
twice as long as the one before, up to `LONGEST_LASTS`: a mailbox gets some dozen mails a day, however many ask. Whoever
uses a link uses up all of them, and the count begins anew. Nobody who asks learns any of this: the answer is always the
same.
"""

import hashlib
import re
import secrets
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Table, delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, joinedload

from provenn.core.errors import UserError
from provenn.web.addresses import spelled
from provenn.web.models import NAME, Base, Person, SignedIn, SignInLink, now

LINK_LASTS, LONGEST_LASTS = timedelta(minutes=30), timedelta(hours=4)
FREE = 3  # links to an address that nobody used, before another must wait
SESSION_LASTS = timedelta(days=90)
LINK_KEPT = timedelta(days=1)  # as a row, used or not
SHORT_LIVED = ("sign_in_links", "sessions", "subscription_links")  # nothing that anybody wrote
SECRET = ("digest", "name_key")  # columns that mean nothing to anybody
CONTROLS = {"Cc", "Cs"}  # as Unicode's categories: controls, halves of characters
UNSEEN = {"Cf", "Co"}  # marks of direction and joints of letters, characters of nobody's
BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs that are drawn as nothing


class SignIn(NamedTuple):
    """What came of a link: who it is, what their cookie carries, where they came from, and whether they are new."""

    person: Person
    secret: str
    paper: str
    new: bool


def digest(secret: str) -> str:
    """What is kept of a secret: who reads the database cannot sign in by it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def plain(text: str, keep: str = "") -> str:
    """Text without controls, which not every database takes, but for those to `keep`; each character in one form."""
    kept = (c if c in keep or unicodedata.category(c) not in CONTROLS else " " for c in text)
    return unicodedata.normalize("NFC", "".join(kept)).strip()


def new_link(email: str, paper: str = "", lasts: timedelta = LINK_LASTS) -> tuple[SignInLink, str]:
    """A link that signs in as `email`, whether anybody is known by it or not, and its secret, which is kept nowhere."""
    secret = secrets.token_urlsafe(32)
    return SignInLink(digest=digest(secret), email=email, paper=paper, until=now() + lasts), secret


def link_lasts(session: Session, email: str) -> timedelta | None:
    """How long the next link to an address works; None where one that went before is enough (see the module)."""
    lately = SignInLink.email == email, SignInLink.used.is_(None), SignInLink.made > now() - LINK_KEPT
    unused = session.scalars(select(SignInLink).where(*lately)).all()
    return next_lasts([(link.made, link.until) for link in unused], LINK_LASTS, LONGEST_LASTS)


def next_lasts(
    unused: Sequence[tuple[datetime, datetime]], shortest: timedelta, longest: timedelta
) -> timedelta | None:
    """How long the next link works, after those with these makings and ends that nobody used; None for no link."""
    if len(unused) < FREE:
        return shortest
    made, until = max(unused)
    return None if now() < made + (until - made) / 2 else min(2 * (until - made), longest)


def forget_links(session: Session) -> None:
    """Delete the rows of links that are old, used or not."""
    session.execute(delete(SignInLink).where(SignInLink.made < now() - LINK_KEPT))


def usable_link(session: Session, secret: str) -> SignInLink | None:
    """The link with that secret; None where it has expired, was used or never was."""
    return session.scalar(select(SignInLink).where(*_usable(secret)))


def _usable(secret: str) -> tuple:
    return SignInLink.digest == digest(secret), SignInLink.used.is_(None), SignInLink.until > now()


def sign_in(session: Session, secret: str) -> SignIn | None:
    """Use a link: it and all others to its address are used up, and a session begins. None where it is not usable.

    Two who use one link at the same moment update one row, and the second finds it used.
    """
    link = usable_link(session, secret)
    moment = now()
    taken = session.execute(update(SignInLink).where(*_usable(secret)).values(used=moment).returning(SignInLink.digest))
    if link is None or taken.scalar() is None:
        return None
    others = update(SignInLink).where(SignInLink.email == link.email, SignInLink.used.is_(None))
    session.execute(others.values(used=moment))
    new = added(session, Person(email=link.email))
    person = session.scalars(select(Person).where(Person.email == link.email)).one()
    session.execute(delete(SignedIn).where(SignedIn.began < moment - SESSION_LASTS))
    return SignIn(person, begin_session(session, person.id), link.paper, new)


def begin_session(session: Session, person_id: int) -> str:
    """The secret that the cookie of a new session carries."""
    secret = secrets.token_urlsafe(32)
    session.add(SignedIn(digest=digest(secret), person_id=person_id))
    return secret


def person_of(session: Session, secret: str) -> Person | None:
    """Whose session it is; None where it has ended or never was."""
    lasting = SignedIn.digest == digest(secret), SignedIn.began > now() - SESSION_LASTS
    found = session.scalar(select(SignedIn).where(*lasting).options(joinedload(SignedIn.person)))
    return found.person if found else None


def end_session(session: Session, secret: str) -> None:
    """Sign out in one browser."""
    session.execute(delete(SignedIn).where(SignedIn.digest == digest(secret)))


def end_sessions(session: Session, person_id: int) -> None:
    """Sign out everywhere."""
    session.execute(delete(SignedIn).where(SignedIn.person_id == person_id))


def rename(session: Session, person_id: int, name: str) -> None:
    """Call a person by another name; by "" as at the start.

    Raises:
        UserError: it is too long, somebody else's, or like those that are given by number.
    """
    seen = (c for c in plain(name) if unicodedata.category(c) not in UNSEEN and c not in BLANK)
    name = " ".join("".join(seen).split())
    if len(name) > NAME:
        raise UserError(f"the name has {len(name)} characters; at most {NAME} are shown")
    key = unicodedata.normalize("NFKC", name).casefold()[: 4 * NAME]
    if re.fullmatch(r"reader\s*\d+", key):
        raise UserError(f"{name!r} is like the names that are given by number: choose another, or leave it empty")
    changed = update(Person).where(Person.id == person_id).values(name=name or None, name_key=key or None)
    try:
        with session.begin_nested():
            session.execute(changed)
    except IntegrityError:
        raise UserError(f"somebody is called {name!r} already: choose another name") from None


def everything_of(session: Session, person: Person) -> dict[str, list[dict[str, Any]]]:
    """All that is kept of a person, by table, ready for JSON."""
    found = {}
    for table in Base.metadata.sorted_tables:
        rows = session.execute(select(table).where(_theirs(table, person.email))).mappings()
        columns = [column.name for column in table.columns if column.name not in SECRET]
        found[table.name] = [{name: as_json(row[name]) for name in columns} for row in rows]
    return {name: rows for name, rows in found.items() if rows}


def delete_person(session: Session, email: str) -> int:
    """Delete all that belongs to an address and to the person of that address; returns how many rows there were."""
    tables = reversed(Base.metadata.sorted_tables)
    statements = (table.delete().where(_theirs(table, email)) for table in tables)
    return sum(session.connection().execute(statement).rowcount for statement in statements)


def find_person(session: Session, who: str) -> Person | None:
    """The person of that address or number."""
    number = int(who) if who.isascii() and who.isdigit() and len(who) < 10 else None
    return session.scalar(select(Person).where(or_(Person.email == spelled(who), Person.id == number)))


def every_row(session: Session) -> Iterator[dict[str, Any]]:
    """Every row that somebody wrote, with the name of its table, ready for JSON."""
    for table in Base.metadata.sorted_tables:
        if table.name not in SHORT_LIVED:
            for row in session.execute(select(table).order_by(*table.primary_key)).mappings():
                yield {"table": table.name, **{name: as_json(value) for name, value in row.items()}}


def as_json(value: Any) -> Any:
    """A cell as JSON has it."""
    return value.isoformat() if isinstance(value, date) else value


def added(session: Session, row: Base) -> bool:
    """Whether a row was added; it is not where one with its key is there already, from somebody at the same moment."""
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:
        return False
    return True


def _theirs(table: Table, email: str) -> Any:
    """The condition on a table for what is a person's: rows with their address, and rows that refer to such a row."""
    conditions = [table.columns.email == email] if "email" in table.columns else []
    for key in table.foreign_keys:
        owners = key.column.table
        if "email" in owners.columns:
            conditions.append(key.parent.in_(select(key.column).where(owners.columns.email == email)))
    return or_(False, *conditions)

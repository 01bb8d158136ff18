"""What people leave behind, as tables. What the papers say is not here: it is read from the packages.

A table whose rows belong to somebody has a column `email`, or one that refers to a table which has, with ON DELETE
CASCADE: by these `accounts` collects what is a person's, and deletes it.
"""

from datetime import UTC, datetime

from sqlalchemy import DateTime, Dialect, ForeignKey, MetaData, String, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

EMAIL, NAME, PAPER, ARXIV, DIGEST, REASON = 254, 40, 100, 40, 64, 200  # the longest of each, in characters
SUBSCRIPTION = 16  # the longest of a subscription's keys
MOST = 2**31 - 1  # the largest number of a row


class Base(DeclarativeBase):
    """All tables; constraints have names, so that a migration can find them on any database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def now() -> datetime:
    """The moment, in UTC."""
    return datetime.now(UTC)


class Moment(TypeDecorator[datetime]):
    """A moment in UTC, on databases that keep the zone and on those that do not."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """As the database takes it."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """With its zone, which SQLite forgets."""
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def whose(*, primary_key: bool = False) -> Mapped[int]:
    """A column that says whose a row is; the row goes with the person."""
    return mapped_column(ForeignKey("people.id", ondelete="CASCADE"), primary_key=primary_key, index=not primary_key)


class Person(Base):
    """Somebody who has signed in once.

    Args:
        email: where their links go; nobody else sees it.
        name: as others see them, where they have chosen one.
        name_key: the name as it is compared, so that nobody is called like somebody else.
    """

    __tablename__ = "people"
    __table_args__ = ({"sqlite_autoincrement": True},)  # a number is never given again

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(EMAIL), unique=True)
    name: Mapped[str | None] = mapped_column(String(NAME))
    name_key: Mapped[str | None] = mapped_column(String(4 * NAME), unique=True)
    joined: Mapped[datetime] = mapped_column(Moment, default=now)

    @property
    def shown(self) -> str:
        """What others call them."""
        return self.name or f"reader {self.id}"


class SignInLink(Base):
    """A link that was sent: whoever has it may sign in as its address, once.

    Args:
        digest: of what the link carries, which is kept nowhere.
        paper: whose page it was asked for on; "" for none.
        until: it works before that.
        used: when somebody signed in by it, or by another of the same address.
    """

    __tablename__ = "sign_in_links"

    digest: Mapped[str] = mapped_column(String(DIGEST), primary_key=True)
    email: Mapped[str] = mapped_column(String(EMAIL), index=True)
    paper: Mapped[str] = mapped_column(String(PAPER))
    made: Mapped[datetime] = mapped_column(Moment, default=now, index=True)
    until: Mapped[datetime] = mapped_column(Moment)
    used: Mapped[datetime | None] = mapped_column(Moment)


class SignedIn(Base):
    """A browser in which somebody is signed in, by the digest of what its cookie carries."""

    __tablename__ = "sessions"

    digest: Mapped[str] = mapped_column(String(DIGEST), primary_key=True)
    person_id: Mapped[int] = whose()
    began: Mapped[datetime] = mapped_column(Moment, default=now, index=True)
    person: Mapped[Person] = relationship()


class SubscriptionLink(Base):
    """A link that was sent to confirm a subscription, by the digest of what it carries."""

    __tablename__ = "subscription_links"

    digest: Mapped[str] = mapped_column(String(DIGEST), primary_key=True)
    email: Mapped[str] = mapped_column(String(EMAIL), index=True)
    often: Mapped[str] = mapped_column(String(SUBSCRIPTION))
    made: Mapped[datetime] = mapped_column(Moment, default=now)


class Vote(Base):
    """One a person and paper: the two are the key."""

    __tablename__ = "votes"

    person_id: Mapped[int] = whose(primary_key=True)
    paper: Mapped[str] = mapped_column(String(PAPER), primary_key=True, index=True)
    made: Mapped[datetime] = mapped_column(Moment, default=now)


class Comment(Base):
    """What somebody wrote under a paper, in Markdown; hidden by the operator, where `hidden` says since when."""

    __tablename__ = "comments"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(primary_key=True)
    person_id: Mapped[int] = whose()
    paper: Mapped[str] = mapped_column(String(PAPER), index=True)
    text: Mapped[str] = mapped_column(Text)
    made: Mapped[datetime] = mapped_column(Moment, default=now)
    edited: Mapped[datetime | None] = mapped_column(Moment)
    hidden: Mapped[datetime | None] = mapped_column(Moment)
    person: Mapped[Person] = relationship()


class Report(Base):
    """That a reader holds a comment to be none; one a reader and comment."""

    __tablename__ = "reports"

    person_id: Mapped[int] = whose(primary_key=True)
    comment_id: Mapped[int] = mapped_column(ForeignKey("comments.id", ondelete="CASCADE"), primary_key=True, index=True)
    reason: Mapped[str] = mapped_column(String(REASON))
    made: Mapped[datetime] = mapped_column(Moment, default=now)


class Suggestion(Base):
    """A paper that a reader would like to see here; one a reader and paper."""

    __tablename__ = "suggestions"

    person_id: Mapped[int] = whose(primary_key=True)
    arxiv: Mapped[str] = mapped_column(String(ARXIV), primary_key=True, index=True)
    made: Mapped[datetime] = mapped_column(Moment, default=now)


class Decision(Base):
    """What the operator made of a suggestion."""

    __tablename__ = "decisions"

    arxiv: Mapped[str] = mapped_column(String(ARXIV), primary_key=True)
    approved: Mapped[bool]
    made: Mapped[datetime] = mapped_column(Moment, default=now)

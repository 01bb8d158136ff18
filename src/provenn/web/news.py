"""What is new since a reader last heard: papers that came, claims whose verdict changed, what was voted for.

The catalogue's own state is in the packages and says nothing of yesterday. `observe` compares it with the standings as
they were seen last and writes each difference down once, numbered; a digest then is what lies between two numbers.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import String, func, select, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from provenn.evidence.claim import ClaimVerdict
from provenn.evidence.view import CLAIM_SYMBOLS
from provenn.web.catalogue import Catalogue, Entry
from provenn.web.models import PAPER, Base, Moment, Vote, now

SAYS, STANDING = 500, 20  # the longest claim and the longest verdict that are kept, in characters
MOST_VOTED = 5
VOTES_OF = timedelta(days=7)


class Seen(Base):
    """A claim and its verdict as last seen; of a paper as such, the row whose claim is ""."""

    __tablename__ = "standings"

    paper: Mapped[str] = mapped_column(String(PAPER), primary_key=True)
    claim: Mapped[str] = mapped_column(String(SAYS), primary_key=True)
    standing: Mapped[str] = mapped_column(String(STANDING))


class Change(Base):
    """That a paper came (no claim), or that a claim's verdict became another."""

    __tablename__ = "changes"
    __table_args__ = ({"sqlite_autoincrement": True},)  # a number is never given again

    id: Mapped[int] = mapped_column(primary_key=True)
    paper: Mapped[str] = mapped_column(String(PAPER))
    claim: Mapped[str] = mapped_column(String(SAYS))
    before: Mapped[str] = mapped_column(String(STANDING))
    after: Mapped[str] = mapped_column(String(STANDING))
    made: Mapped[datetime] = mapped_column(Moment, default=now)


@dataclass(frozen=True)
class Changed:
    """A claim's verdict before and now."""

    entry: Entry
    says: str
    before: ClaimVerdict
    after: ClaimVerdict

    @property
    def words(self) -> str:
        """From which sign and word to which."""
        return f"{CLAIM_SYMBOLS[self.before]} {self.before} → {CLAIM_SYMBOLS[self.after]} {self.after}"


@dataclass(frozen=True)
class News:
    """Papers that are new, verdicts that changed, and the papers that readers voted for most of late."""

    papers: list[Entry]
    changed: list[Changed]
    voted: list[tuple[Entry, int]]

    def __bool__(self) -> bool:
        """Votes alone are no news."""
        return bool(self.papers or self.changed)

    @property
    def headline(self) -> str:
        """How much is new."""
        papers, verdicts = len(self.papers), len(self.changed)
        words = [f"{papers} new paper" + "s" * (papers > 1)] * bool(papers)
        words += [f"{verdicts} verdict" + "s" * (verdicts > 1) + " changed"] * bool(verdicts)
        return " and ".join(words) or "nothing new"


def observe(session: Session, catalogue: Catalogue) -> None:
    """Write down what changed since the last look; the first look of all finds nothing new."""
    if session.get_bind().dialect.name == "postgresql":  # two that look at once would both write the same
        session.execute(text("LOCK TABLE standings IN SHARE ROW EXCLUSIVE MODE"))
    seen = {(row.paper, row.claim): row for row in session.scalars(select(Seen))}
    shown = {(entry.slug, ""): "" for entry in catalogue.values()}
    for entry in catalogue.values():
        shown |= {(entry.slug, e.claim.says[:SAYS]): str(e.judgement.verdict) for e in entry.claims}
    for (paper, claim), verdict in shown.items():
        row = seen.get((paper, claim))
        if row is None:
            session.add(Seen(paper=paper, claim=claim, standing=verdict))
            if seen and not claim:
                session.add(Change(paper=paper, claim="", before="", after=""))
        elif row.standing != verdict:
            session.add(Change(paper=paper, claim=claim, before=row.standing, after=verdict))
            row.standing = verdict
    for key in seen.keys() - shown.keys():
        if key[1]:  # a paper that goes and comes back is not new
            session.delete(seen[key])
    session.flush()


def latest(session: Session) -> int:
    """The number of the last change; 0 where there was none."""
    return session.scalar(select(func.max(Change.id))) or 0


def between(session: Session, catalogue: Catalogue, since: int, upto: int) -> News:
    """What changed after one number up to another, taken together: what came back to where it was is left out."""
    rows = session.scalars(select(Change).where(Change.id > since, Change.id <= upto).order_by(Change.id)).all()
    papers = [catalogue[row.paper] for row in rows if not row.claim and row.paper in catalogue]
    first: dict[tuple[str, str], str] = {}
    last: dict[tuple[str, str], str] = {}
    for row in rows:
        if row.claim and row.paper in catalogue:
            first.setdefault((row.paper, row.claim), row.before)
            last[row.paper, row.claim] = row.after
    new = {entry.slug for entry in papers}
    changed = [
        Changed(catalogue[paper], says, ClaimVerdict(first[paper, says]), ClaimVerdict(after))
        for (paper, says), after in last.items()
        if first[paper, says] != after and paper not in new
    ]
    return News(papers, changed, most_voted(session, catalogue))


def most_voted(session: Session, catalogue: Catalogue) -> list[tuple[Entry, int]]:
    """The papers with the most votes of the last seven days, and how many."""
    count = func.count()
    counted = select(Vote.paper, count).where(Vote.made > now() - VOTES_OF).group_by(Vote.paper)
    rows = session.execute(counted.order_by(count.desc(), Vote.paper).limit(MOST_VOTED)).tuples()
    return [(catalogue[paper], votes) for paper, votes in rows if paper in catalogue]

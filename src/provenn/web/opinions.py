"""What people say of papers: votes, comments, reports and suggestions. Nothing here knows of HTTP."""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

import nh3
from markdown_it import MarkdownIt
from markupsafe import Markup
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session, joinedload

from provenn.catalog.citation import arxiv_number
from provenn.core.errors import UserError
from provenn.web.accounts import added, plain
from provenn.web.models import ARXIV, REASON, Comment, Decision, Report, Suggestion, Vote, now

LONGEST = 4000  # characters of a comment
SHOWN = 50  # comments on a page
TAGS = {"p", "br", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "a"}
# A comment has no headings, pictures or rules of its own: it stands below a page's headings.
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("strikethrough")
MARKDOWN.disable(["heading", "lheading", "hr", "image", "html_block", "html_inline"])
# A link leads to another site by its whole address. One without a host would lead to a page of this site, such as /me.
ABSOLUTE = re.compile(r"https?://[^/?#\\]", re.IGNORECASE)
MARKDOWN.validateLink = lambda url: ABSOLUTE.match(url) is not None  # type: ignore[method-assign]  # as its manual says


class Counts(NamedTuple):
    """How many votes and comments each paper has; papers without any are left out."""

    votes: dict[str, int]
    comments: dict[str, int]


class Suggested(NamedTuple):
    """A suggestion, how many readers want it, since when, and what the operator made of it (None: nothing yet)."""

    arxiv: str
    readers: int
    since: datetime
    approved: bool | None


def counts(session: Session, paper: str | None = None) -> Counts:
    """Of all papers, or of one."""
    votes = select(Vote.paper, func.count()).group_by(Vote.paper)
    comments = select(Comment.paper, func.count()).where(Comment.hidden.is_(None)).group_by(Comment.paper)
    if paper is not None:
        votes, comments = votes.where(Vote.paper == paper), comments.where(Comment.paper == paper)
    return Counts(dict(session.execute(votes).tuples().all()), dict(session.execute(comments).tuples().all()))


def votes_by(session: Session, person_id: int) -> set[str]:
    """The papers that somebody voted for."""
    return set(session.scalars(select(Vote.paper).where(Vote.person_id == person_id)))


def vote(session: Session, person_id: int, paper: str, wanted: bool) -> int:
    """Vote for a paper or take the vote back; asked twice, it is done once. Returns the votes that the paper has."""
    if wanted:
        added(session, Vote(person_id=person_id, paper=paper))
    else:
        session.execute(delete(Vote).where(Vote.person_id == person_id, Vote.paper == paper))
    return session.scalar(select(func.count()).select_from(Vote).where(Vote.paper == paper)) or 0


def comments_on(session: Session, paper: str, before: int | None = None) -> Sequence[Comment]:
    """The newest comments on a paper, at most `SHOWN` and one more where there are others; those before a number."""
    wanted = select(Comment).where(Comment.paper == paper)
    if before is not None:
        wanted = wanted.where(Comment.id < before)
    wanted = wanted.order_by(Comment.id.desc()).limit(SHOWN + 1).options(joinedload(Comment.person))
    return session.scalars(wanted).all()


def comments_by(session: Session, person_id: int) -> Sequence[Comment]:
    """All that somebody wrote, the newest first."""
    return session.scalars(select(Comment).where(Comment.person_id == person_id).order_by(Comment.id.desc())).all()


def checked(text: str) -> str:
    """A comment as it is kept.

    Raises:
        UserError: there is nothing in it, or too much.
    """
    text = plain(text.replace("\r\n", "\n").replace("\r", "\n"), keep="\n\t")
    if not text:
        raise UserError("there is nothing in the comment: write something")
    if len(text) > LONGEST:
        raise UserError(f"the comment has {len(text)} characters; at most {LONGEST} are taken")
    return text


def comment(session: Session, person_id: int, paper: str, text: str) -> int:
    """Write under a paper; returns the comment's number."""
    row = Comment(person_id=person_id, paper=paper, text=checked(text))
    session.add(row)
    session.flush()
    return row.id


def edit(session: Session, person_id: int, number: int, text: str) -> Comment | None:
    """Change a comment of one's own; None where it is somebody else's, hidden or gone."""
    row = session.scalar(select(Comment).where(Comment.id == number, Comment.person_id == person_id))
    if row is None or row.hidden:
        return None
    text = checked(text)
    if text != row.text:
        row.text, row.edited = text, now()
    return row


def remove(session: Session, person_id: int, number: int) -> Comment | None:
    """Delete a comment of one's own; None where it is somebody else's or gone."""
    row = session.scalar(select(Comment).where(Comment.id == number, Comment.person_id == person_id))
    if row is not None:
        session.delete(row)
    return row


def report(session: Session, person_id: int, number: int, reason: str) -> Comment | None:
    """Report to the operator somebody else's comment, once; None where it is one's own, hidden or gone."""
    row = session.get(Comment, number)
    if row is None or row.hidden or row.person_id == person_id:
        return None
    added(session, Report(person_id=person_id, comment_id=number, reason=plain(reason)[:REASON]))
    return row


def suggest(session: Session, person_id: int, arxiv: str) -> bool:
    """Suggest a paper by its number; False where this person did so before."""
    return added(session, Suggestion(person_id=person_id, arxiv=arxiv))


def canonical_number(text: str) -> str:
    """The arXiv number in a text that is one.

    Raises:
        UserError: it is none.
    """
    number = arxiv_number(text) if text.isascii() else None
    if number is None or len(number) > ARXIV or not ("/" in number or "01" <= number[2:4] <= "12"):
        raise UserError(
            f"{plain(text)[:60]!r} is not an arXiv number: write one as 1910.03151, or its arxiv.org address"
        )
    return number


def suggestions(session: Session) -> list[Suggested]:
    """All that were suggested, the most wanted first."""
    count, since = func.count(), func.min(Suggestion.made)
    grouped = (
        select(Suggestion.arxiv, count, since, Decision.approved)
        .outerjoin(Decision, Decision.arxiv == Suggestion.arxiv)
        .group_by(Suggestion.arxiv, Decision.approved)
        .order_by(count.desc(), since, Suggestion.arxiv)
    )
    return [Suggested(*row) for row in session.execute(grouped)]


def suggested_by(session: Session, person_id: int) -> set[str]:
    """The numbers that somebody suggested."""
    return set(session.scalars(select(Suggestion.arxiv).where(Suggestion.person_id == person_id)))


def hide(session: Session, number: int, hidden: bool) -> bool:
    """Hide a comment from readers, or show it again; False where there is none of that number."""
    changed = update(Comment).where(Comment.id == number).values(hidden=now() if hidden else None)
    return session.execute(changed.returning(Comment.id)).scalar() is not None


def decide(session: Session, arxiv: str, approved: bool) -> bool:
    """What the operator makes of a suggestion; False where nobody suggested it."""
    if session.scalar(select(Suggestion.arxiv).where(Suggestion.arxiv == arxiv).limit(1)) is None:
        return False
    session.merge(Decision(arxiv=arxiv, approved=approved, made=now()))
    return True


@lru_cache(maxsize=2000)
def as_html(text: str) -> Markup:
    """A comment as HTML: rendered by one library, and what is left of it sanitised by another.

    Links that are not absolute stay text.
    """
    return Markup(
        nh3.clean(
            MARKDOWN.render(text),
            tags=TAGS,
            attributes={"*": set(), "a": {"href"}},
            attribute_filter=lambda tag, name, value: value if name != "href" or ABSOLUTE.match(value) else None,
            url_schemes={"http", "https"},
            link_rel="nofollow ugc noopener",
        )
    )

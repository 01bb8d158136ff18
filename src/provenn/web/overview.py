"""What the operator sees of what people leave behind, as rows for the terminal or for machines."""

from typing import Any

from sqlalchemy import Row, func, select
from sqlalchemy.orm import Session

from provenn.web import opinions
from provenn.web.accounts import as_json
from provenn.web.models import Comment, Person, Report, Suggestion, Vote


def rows(session: Session, what: str) -> list[dict[str, Any]]:
    """Comments, reports, suggestions or people, the newest first; suggestions the most wanted first."""
    if what == "suggestions":
        state = {None: "waiting", True: "approved", False: "declined"}
        found = opinions.suggestions(session)
        return [
            {"arxiv": s.arxiv, "readers": s.readers, "since": as_json(s.since), "state": state[s.approved]}
            for s in found
        ]
    wanted = {"comments": _comments, "reports": _reports, "people": _people}[what]
    return [_as_dict(row) for row in session.execute(wanted())]


def _as_dict(row: Row) -> dict[str, Any]:
    return {name: as_json(value) for name, value in row._mapping.items()}


def _comments() -> Any:
    reports = select(func.count()).where(Report.comment_id == Comment.id).scalar_subquery()
    hidden = Comment.hidden.is_not(None)
    columns = Comment.id, Comment.paper, Person.email, Comment.made, reports.label("reports"), hidden.label("hidden")
    return select(*columns, Comment.text).join(Person).order_by(Comment.id.desc())


def _reports() -> Any:
    columns = Report.comment_id.label("comment"), Comment.paper, Report.made, Person.email.label("reported_by")
    hidden = Comment.hidden.is_not(None).label("hidden")
    wanted = select(*columns, hidden, Report.reason, Comment.text)
    return (
        wanted.join(Comment, Comment.id == Report.comment_id)
        .join(Person, Person.id == Report.person_id)
        .order_by(Report.made.desc())
    )


def _people() -> Any:
    def count(table: type) -> Any:
        of_theirs = select(func.count()).where(table.person_id == Person.id)  # type: ignore[attr-defined]  # all have it
        return of_theirs.scalar_subquery().label(table.__name__.lower() + "s")

    columns = Person.id, Person.email, Person.name, Person.joined
    return select(*columns, count(Vote), count(Comment), count(Suggestion)).order_by(Person.id.desc())

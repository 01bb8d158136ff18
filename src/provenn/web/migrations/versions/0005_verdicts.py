"""The words of verdicts: what was seen before is kept in today's words, so that only what changed is news."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

WORDS = {"holds here": "supported", "partly": "mixed", "open": "inconclusive", "not here": "contradicted"}


def upgrade() -> None:
    """Put today's words for yesterday's in both tables that hold verdicts."""
    for name, columns in (("standings", ("standing",)), ("changes", ("before", "after"))):
        for column in columns:
            for old, new in WORDS.items():
                cell: sa.ColumnClause[str] = sa.column(column)
                op.execute(sa.table(name, cell).update().where(cell == old).values({column: new}))

"""People: links to sign in by, sessions, votes, comments, reports, suggestions and what became of them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "people",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("email", sa.String(254), nullable=False),
        sa.Column("name", sa.String(40)),
        sa.Column("name_key", sa.String(160)),
        sa.Column("joined", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_people"),
        sa.UniqueConstraint("email", name="uq_people_email"),
        sa.UniqueConstraint("name_key", name="uq_people_name_key"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "sign_in_links",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("email", sa.String(254), nullable=False),
        sa.Column("paper", sa.String(100), nullable=False),
        sa.Column("made", MOMENT, nullable=False),
        sa.Column("used", MOMENT),
        sa.PrimaryKeyConstraint("digest", name="pk_sign_in_links"),
    )
    op.create_table(
        "sessions",
        sa.Column("digest", sa.String(64), nullable=False),
        whose("sessions"),
        sa.Column("began", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_sessions"),
    )
    op.create_table(
        "votes",
        whose("votes"),
        sa.Column("paper", sa.String(100), nullable=False),
        sa.Column("made", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("person_id", "paper", name="pk_votes"),
    )
    op.create_table(
        "comments",
        sa.Column("id", sa.Integer(), nullable=False),
        whose("comments"),
        sa.Column("paper", sa.String(100), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("made", MOMENT, nullable=False),
        sa.Column("edited", MOMENT),
        sa.Column("hidden", MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_comments"),
        sqlite_autoincrement=True,
    )
    comment = sa.ForeignKey("comments.id", name="fk_reports_comment_id_comments", ondelete="CASCADE")
    op.create_table(
        "reports",
        whose("reports"),
        sa.Column("comment_id", sa.Integer(), comment, nullable=False),
        sa.Column("reason", sa.String(200), nullable=False),
        sa.Column("made", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("person_id", "comment_id", name="pk_reports"),
    )
    op.create_table(
        "suggestions",
        whose("suggestions"),
        sa.Column("arxiv", sa.String(40), nullable=False),
        sa.Column("made", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("person_id", "arxiv", name="pk_suggestions"),
    )
    op.create_table(
        "decisions",
        sa.Column("arxiv", sa.String(40), nullable=False),
        sa.Column("approved", sa.Boolean(), nullable=False),
        sa.Column("made", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("arxiv", name="pk_decisions"),
    )
    for table, column in (
        ("sign_in_links", "email"),
        ("sign_in_links", "made"),
        ("sessions", "person_id"),
        ("sessions", "began"),
        ("votes", "paper"),
        ("comments", "person_id"),
        ("comments", "paper"),
        ("reports", "comment_id"),
        ("suggestions", "arxiv"),
    ):
        op.create_index(f"ix_{table}_{column}", table, [column])


def whose(table: str) -> sa.Column:
    """The column that says whose a row is; the row goes with the person."""
    person = sa.ForeignKey("people.id", name=f"fk_{table}_person_id_people", ondelete="CASCADE")
    return sa.Column("person_id", sa.Integer(), person, nullable=False)

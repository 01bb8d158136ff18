"""The digest: subscriptions, links that confirm them, standings as last seen and their changes, mails planned, sent."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "subscriptions",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("email", sa.String(254), nullable=False),
        sa.Column("often", sa.String(16), nullable=False),
        sa.Column("considered", sa.Date(), nullable=False),
        sa.Column("seen", sa.Integer(), nullable=False),
        sa.Column("made", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_subscriptions"),
        sa.UniqueConstraint("email", name="uq_subscriptions_email"),
    )
    op.create_table(
        "subscription_links",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("email", sa.String(254), nullable=False),
        sa.Column("often", sa.String(16), nullable=False),
        sa.Column("made", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_subscription_links"),
    )
    op.create_index("ix_subscription_links_email", "subscription_links", ["email"])
    op.create_table(
        "standings",
        sa.Column("paper", sa.String(100), nullable=False),
        sa.Column("statement", sa.String(500), nullable=False),
        sa.Column("standing", sa.String(20), nullable=False),
        sa.PrimaryKeyConstraint("paper", "statement", name="pk_standings"),
    )
    op.create_table(
        "changes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("paper", sa.String(100), nullable=False),
        sa.Column("statement", sa.String(500), nullable=False),
        sa.Column("before", sa.String(20), nullable=False),
        sa.Column("after", sa.String(20), nullable=False),
        sa.Column("made", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_changes"),
        sqlite_autoincrement=True,
    )
    whose = sa.ForeignKey("subscriptions.id", name="fk_mailings_subscription_id_subscriptions", ondelete="CASCADE")
    op.create_table(
        "mailings",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("subscription_id", sa.String(16), whose, nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("since", sa.Integer(), nullable=False),
        sa.Column("upto", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("said", sa.String(400), nullable=False),
        sa.Column("made", MOMENT, nullable=False),
        sa.Column("moved", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_mailings"),
        sa.UniqueConstraint("subscription_id", "day", name="uq_mailings_subscription_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_mailings_state", "mailings", ["state"])

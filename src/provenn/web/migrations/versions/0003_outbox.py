"""The outbox: every mail is a row of `mailings`, whatever it is; links to sign in by say until when they work."""

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

MOMENT = sa.DateTime(timezone=True)
ADDED: dict[str, sa.types.TypeEngine] = {
    "kind": sa.String(10),
    "email": sa.String(254),
    "about": sa.String(100),
    "rank": sa.Integer(),
    "due": MOMENT,
    "until": MOMENT,
    "tries": sa.Integer(),
}
OF_DIGESTS: dict[str, sa.types.TypeEngine] = {
    "subscription_id": sa.String(16),
    "day": sa.Date(),
    "since": sa.Integer(),
    "upto": sa.Integer(),
}
DIGEST = {"kind": "digest", "rank": 2, "about": "", "tries": 0}


def upgrade() -> None:
    """Add what the mails of before had in common, then allow what they all had."""
    soon = datetime.now(UTC) + timedelta(days=4)  # for mails that wait
    with op.batch_alter_table("mailings") as table:
        for name, kind in ADDED.items():
            table.add_column(sa.Column(name, kind))
    columns: list[sa.ColumnClause] = [sa.column(name) for name in ("made", "subscription_id")]
    mailings = sa.table("mailings", *columns, *(sa.column(name, kind) for name, kind in ADDED.items()))
    people = sa.table("subscriptions", sa.column("id"), sa.column("email"))
    whose = sa.select(people.c.email).where(people.c.id == mailings.c.subscription_id).scalar_subquery()
    op.execute(mailings.update().values(**DIGEST, email=whose, due=mailings.c.made, until=soon))
    with op.batch_alter_table("mailings", table_kwargs={"sqlite_autoincrement": True}) as table:
        for name, kind in ADDED.items():
            table.alter_column(name, existing_type=kind, nullable=False)
        for name, kind in OF_DIGESTS.items():
            table.alter_column(name, existing_type=kind, nullable=True)
    op.drop_index("ix_mailings_state", "mailings")
    op.create_index("ix_mailings_state_rank_due", "mailings", ["state", "rank", "due"])
    op.create_index("ix_mailings_email", "mailings", ["email"])

    with op.batch_alter_table("sign_in_links") as table:
        table.add_column(sa.Column("until", MOMENT))
    links = sa.table("sign_in_links", sa.column("until", MOMENT), sa.column("made", MOMENT), sa.column("digest"))
    connection = op.get_bind()
    for digest, made in connection.execute(sa.select(links.c.digest, links.c.made)).all():
        works = links.update().where(links.c.digest == digest).values(until=made + timedelta(minutes=30))
        connection.execute(works)
    with op.batch_alter_table("sign_in_links") as table:
        table.alter_column("until", existing_type=MOMENT, nullable=False)

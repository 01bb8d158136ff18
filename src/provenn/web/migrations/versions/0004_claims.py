"""What an abstract asserts is a claim, here as elsewhere."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Rename the column in both tables that hold it."""
    for name in ("standings", "changes"):
        with op.batch_alter_table(name) as table:
            table.alter_column("statement", new_column_name="claim")

"""The catalogue's database: an embedded SQLite file, or whatever `DATABASE_URL` names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from filelock import FileLock
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session, sessionmaker

from provenn.errors import UserError
from provenn.web.settings import make_home

MIGRATIONS = Path(__file__).with_name("migrations")
WRITES = "writes"  # the option of a connection that tells `_immediate` what its transaction is for
MIGRATING = 1910_03151  # the lock that servers which start at the same moment take in turns
BUSY_MS = 10_000  # that a writer waits for another before it gives up


class Database:
    """Sessions on a migrated database; every `session()` is one transaction.

    Args:
        url: an SQLAlchemy URL. A PostgreSQL one may leave the driver out: psycopg is meant.
    """

    def __init__(self, url: str):
        try:
            parsed = make_url(url)
            if parsed.drivername in ("postgres", "postgresql"):
                parsed = parsed.set(drivername="postgresql+psycopg")
            if parsed.get_backend_name() == "sqlite" and parsed.database:
                make_home(Path(parsed.database).parent)
            self.engine: Engine = create_engine(parsed, pool_pre_ping=True)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            wanted = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
            raise UserError(f"DATABASE_URL: {error}; give {wanted}") from None
        # All that one reader reads is of one moment. SQLite keeps to that by itself.
        self._to_read: dict[str, Any] = {WRITES: False, "isolation_level": "REPEATABLE READ"}
        if self.engine.dialect.name == "sqlite":
            self._to_read = {WRITES: False}
            event.listen(self.engine, "connect", _durable)
            event.listen(self.engine, "begin", _immediate)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)

    def migrate(self) -> None:
        """Bring the tables to this version's form; what is in them stays."""
        url = self.engine.url
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        try:
            if url.get_backend_name() == "sqlite" and url.database:
                with FileLock(f"{url.database}.lock"), self.engine.begin() as connection:
                    config.attributes["connection"] = connection
                    command.upgrade(config, "head")
            else:
                with self.engine.begin() as connection:
                    if self.engine.dialect.name == "postgresql":
                        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATING})")
                    config.attributes["connection"] = connection
                    command.upgrade(config, "head")
        except DBAPIError as error:
            said = str(error.orig).partition("\n")[0]
            raise UserError(f"no database at {url.render_as_string(hide_password=True)}: {said}") from None
        except CommandError as error:
            newer = "was it made by a newer provenn? update this one"
            raise UserError(f"the database at {url.render_as_string(hide_password=True)}: {error}; {newer}") from None

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction: committed where the block ends well, undone where it does not."""
        with self._sessions.begin() as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads, and waits for no writer."""
        with self._sessions() as session:
            session.connection(execution_options=self._to_read)
            yield session

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()


def _durable(connection, _record) -> None:
    """Write-ahead log with a sync at every commit: what was acknowledged survives a loss of power. What is deleted is
    overwritten.
    """
    connection.isolation_level = None  # transactions are begun by `_immediate`, not by the driver's guess
    cursor = connection.cursor()
    wanted = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON")
    for pragma in (*wanted, f"busy_timeout = {BUSY_MS}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _immediate(connection) -> None:
    """A writer takes its lock at once: one that began by reading could not wait for another."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(WRITES, True) else "BEGIN")
